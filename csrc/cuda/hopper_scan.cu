// Chunked forward and backward for Hopper (sm_90a): the states before each chunk, and the cotangents of the states after each chunk. One block for each sequence,
// key/value head, side (keys, values) and 64 of its dimensions; one chunk after the other, the state H or dH [64 slots x 64 dimensions] in registers.
//
//     forward                                                    backward, from the last chunk to the first
//     H to the boundary states                                   E = exp(G_end - ref) dH to hopper_keys.cu, rounded; of the values also what rounding dropped
//                                                                edge = exp(G_end) <H, dH> of every slot, these dimensions' part, for dg
//     H <- exp(G_end - ref) (exp(ref) H + S^T X)                 dH <- exp(ref) (E + sum over the query heads of Y^T X)
//     X: k, v                                                    X: q, d_o
//
// S and the two factors come from hopper_gates.cu, Y from hopper_queries.cu. A sequence with a chunk of several windows is left to hopper_forward.cu and
// hopper_windows.cu. Tiles come three steps (a chunk and query head) ahead.
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 128, kStages = 3;

template <class E>
struct ScanShared {
  E Y[kStages][2][kTile], X[kStages][kTile], H[kStages][kTile], out[2][kTile];  // Y: or S
  uint64_t full[kStages];
};
static_assert(sizeof(ScanShared<bf16>) <= 113 * 1024);

// Where the states begin and end: [N, H, K, M] and [N, H, M, V], nullptr: zero; not wanted.
struct Ends {
  const void* first[2];
  void* last[2];
  bool broadcast;
};

template <class E, int D, bool reverse>
__global__ __launch_bounds__(kThreads, 2) void scan_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Ends ends, E* boundary,
                                                           const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<ScanShared<E>*>(memory);
  constexpr int slices = D / 64;
  const int r = reverse ? p.HQ / p.H : 1, slice = blockIdx.x % slices, side = blockIdx.x / slices % 2, head = blockIdx.x / (2 * slices) % p.H;
  const int64_t n = blockIdx.x / (2 * slices) / p.H;
  Chunk c;
  c.seq = sequence<false>(p, n, kChunk);
  const int chunks = static_cast<int>(c.seq.chunks);
  bool cut = false;
  if (reverse) {
    cut = w.cut[n * p.H + head];
  } else {
    for (int i = threadIdx.x; i < chunks; i += kThreads) cut |= w.gates[(c.seq.slot + i) * p.H + head].cut != 0;
    cut = __syncthreads_or(cut);
    if (threadIdx.x == 0 && side == 0 && slice == 0) w.cut[n * p.H + head] = cut;
  }
  if (cut || !boundary) return;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), row = warp * 16 + frag_row(), l = lane_id();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init(m.full + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  float h[8][4];
  auto each_element = [&](bool broadcast, auto&& f) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int slot = row + (e >> 1) * 8, d = slice * 64 + t * 8 + frag_col() + (e & 1);
        if (slot < p.M) f(h[t][e], ((broadcast ? 0 : n) * p.H + head) * D * p.M + (side ? slot * D + d : d * p.M + slot));
      }
  };
  zero(h);
  if (const float* in = static_cast<const float*>(ends.first[side])) each_element(ends.broadcast, [&](float& x, int64_t i) { x = in[i]; });

  const int steps = chunks * r;
  auto chunk_of = [&](int s) { return reverse ? chunks - 1 - s / r : s; };
  auto state_of = [&](int64_t slot) { return boundary + ((slot * p.H + head) * 2 + side) * int64_t(D) * p.M + slice * 64 * p.M; };
  auto load = [&](int s) {
    if (s < steps) {
      const int stage = s % kStages;
      Chunk next = c;
      next.select(p, chunk_of(s), kChunk);
      const int64_t x_head = reverse ? head * r + s % r : head;
      if (threadIdx.x == 0) {
        arrive_expecting(m.full + stage, 2 * kTile * 2);
        const E* from = reverse ? w.saved[next.slot * p.HQ + x_head].Y[side][0] : w.gates[next.slot * p.H + head].S[0];
        bulk_load(m.Y[stage], from, 2 * kTile * 2, m.full + stage);
      }
      Rows x = rows_of(reverse ? side ? p.d_o : p.q : side ? p.v : p.k, next, x_head);
      x.base += slice * 64;
      load_tokens<64, kThreads>(m.X[stage], x, next.length, threadIdx.x);
      if (reverse && s % r == 0) load_state<64, kThreads>(m.H[s / r % kStages], state_of(next.slot), p.M, threadIdx.x);
    }
    cp_async_commit();
  };
  load(0), load(1);
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int step = 0; step < steps;) {
    const int64_t slot = c.seq.slot + chunk_of(step), at = slot * p.H + head;
    const GateImage<E>& gates = w.gates[at];
    const float in[2] = {gates.in[row], gates.in[row + 8]}, out[2] = {gates.out[row], gates.out[row + 8]};
    if (reverse) scale_rows(h, out[0], out[1]);
    if (reverse && threadIdx.x == 0) bulk_wait();
    __syncthreads();
    if (reverse) {
      const auto X = split<E>(h);
      store_operand<E>(m.out[0], X.hi, warp);
      if (side) store_operand<E>(m.out[1], X.lo, warp);
      publish();
    } else {
      store_transposed<E>(m.out[0], h, warp);
      scale_rows(h, in[0], in[1]);
    }
    __syncthreads();
    if (!reverse) {
      store_state<64>(state_of(slot), m.out[0], p.M, threadIdx.x);
    } else if (threadIdx.x == 0) {
      bulk_store(w.E0 + (at * 3 + side) * 64 * D + slice * kTile, m.out[0], kTile * 2);
      if (side) bulk_store(w.E0 + (at * 3 + 2) * 64 * D + slice * kTile, m.out[1], kTile * 2);
      bulk_commit();
    }
    const int first = step;
#pragma unroll 1
    do {
      cp_async_wait_for<1>();
      wait(m.full + stage, parity);
      publish();
      __syncthreads();  // and everybody is done with the stage before this one
      load(step + 2);
      if (reverse && step == first) {  // <H, dH>
        float sum[2] = {0.f, 0.f};
        const uint32_t H_row = place(m.H[step / r % kStages], (l & 7) + (l >> 4) * 8, 0) ^ ((warp * 2 + ((l >> 3) & 1)) * 16);
#pragma unroll
        for (int t = 0; t < 8; t += 2) {
          uint32_t x[4];
          ldmatrix4<true>(x, H_row + t * 1024);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 y = unpack<E>(x[k]);
            const float (&g)[4] = h[t + (k >> 1)];
            sum[k & 1] += y.x * g[(k & 1) * 2] + y.y * g[(k & 1) * 2 + 1];
          }
        }
        sum[0] = quad_sum(sum[0]) * in[0], sum[1] = quad_sum(sum[1]) * in[1];
        float* edge = w.edge + (at * 2 + side) * D + slice * 64;  // D / 64 parts of 64 slots
        if ((l & 3) == 0) edge[row] = sum[0], edge[row + 8] = sum[1];
      }
      hand_over(h);
      products_begin();
      product<E, 4, 1, 1>(h, mnmajor(m.Y[stage][0]), mnmajor(m.X[stage]), true);
      product<E, 4, 1, 1>(h, mnmajor(m.Y[stage][1]), mnmajor(m.X[stage]), true);
      products_commit();
      products_wait<0>();
      hand_over(h);
      if (++stage == kStages) stage = 0, parity ^= 1;
    } while (++step < first + r);
    reverse ? scale_rows(h, in[0], in[1]) : scale_rows(h, out[0], out[1]);
  }
  if (float* out = static_cast<float*>(ends.last[side])) each_element(false, [&](float& x, int64_t i) { out[i] = x; });
  if (reverse && threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

template <bool reverse>
void scan(const BackwardParams& p, const Ends& ends, void* boundary, const BackwardWorkspace& w) {
  select_hopper(p, [&]<class E, int D>() {
    launch(reverse ? "hopper_cotangents" : "hopper_states", scan_kernel<E, D, reverse>, p.N * p.H * 2 * (D / 64), kThreads, sizeof(ScanShared<E>), p.stream, p,
           ends, static_cast<E*>(boundary), Backward<E>(w));
  });
}

}  // namespace

void hopper_states(const ForwardParams& p, const void* images, void* boundary, int* cut) {
  BackwardParams b{};
  static_cast<Params&>(b) = p;
  scan<false>(b, {{p.hk0, p.hv0}, {p.hkT, p.hvT}, p.h0_broadcast}, boundary, {const_cast<void*>(images), nullptr, nullptr, nullptr, cut});
  if (boundary) hopper_forward(p, boundary, cut);
}

void hopper_cotangents(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  scan<true>(p, {{p.dhkT, p.dhvT}, {p.dhk0, p.dhv0}, false}, const_cast<void*>(boundary), w);
}

}  // namespace gsa::cuda
