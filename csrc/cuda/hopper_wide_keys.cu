// Chunked backward for Hopper (sm_90a), heads of 256 and 512 dimensions, last part: all that is as wide as a head, and the gradients of s and g. One block for each
// chunk and key/value head, which streams over slices of 64 dimensions, first of its keys, then of its values; S is that of hopper_gates.cu, A1, A2, Yk exp(ref), T, U
// those of hopper_wide_queries.cu, E and the edges of hopper_scan.cu:
//
//                            keys                               values
//     a, b                   q, k                               d_o, v
//     first warpgroup        dk = A1^T q + S E                  dv = A2^T d_o + S E
//     second                 dq = A1 k + (Yk exp(ref)) Hk^T
//                            outer += k E^T                     outer += v E^T
//
// dk and dv are sums over the query heads of the group. And then:
//     ds_j = U_j + outer_j / R_j
//     dg_t = sum_{u >= t} T_u + sum_{j < t} S_j outer_j + edge           (products with triangles of ones)
// T and U have no diagonal and the sum from the front what comes from after the chunk: nothing large is left to cancel (hopper_keys.cu). A chunk of several windows
// differs in 1 / R_j alone, in the place of which is exp(G_end - G_j).
//
// Operands that stay are in registers: S and A^T of the first warpgroup, A1 and Yk exp(ref) of the second. They come as a step of the stream: once a side; with several
// query heads before each slice of each of them. Two parts: S, A2, E of the values, the terms of dg. Two blocks on a multiprocessor.
//
//     shared memory      three stages of four tiles: a, b, E, and Hk or the second part of E; or S in two parts, and A1, Yk exp(ref) or A2 in two parts. In the end S, and
//                        in the other stages outer (fp32), and the terms of dg of either half of the slots, in two parts side by side
#include "core/wide.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kStages = Stream::stages;

template <class E>
struct WideKeysShared {
  alignas(1024) E tiles[kStages][4][kTile];
  float edge[kSlots];
  Stream stream;
  uint64_t met;
};
static_assert(sizeof(WideKeysShared<bf16>) <= 113 * 1024);

// What comes in what order: operands, then slices; in the end S.
struct Step {
  int side = 0, slice = 0, head = 0;
  bool operands = true;
  __device__ void advance(int slices, int r) {
    if (side == 2) {
      side = 3;
    } else if (operands) {
      operands = false;
    } else {
      if (++head == r) head = 0, ++slice;
      operands = r > 1;
      if (slice == slices) slice = 0, ++side, operands = true;
    }
  }
};

template <class E, int D>
__global__ __launch_bounds__(kWideThreads, 2) void wide_keys_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ InputMaps maps,
                                                                    const __grid_constant__ CUtensorMap states, const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideKeysShared<E>*>(memory);
  constexpr int slices = D / 64;
  const int r = p.HQ / p.H, head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, slot_by_time(p, blockIdx.x / p.H, false), kChunk, c)) return;
  const int64_t place_of = c.slot * p.H + head;
  const GateImage<E>& image = w.gates[place_of];
  const WideSaved<E>* const saved = reinterpret_cast<const WideSaved<E>*>(w.saved) + c.slot * p.HQ + head * r;
  if (threadIdx.x == 0) {
    init(&m.met, kWideThreads);
    m.stream.init();
  }
  __syncthreads();

  Step next;  // to be sent for
  int sent = 0, step = 0;
  auto send = [&] {
    if (threadIdx.x || next.side == 3) return;
    const bool operands = next.operands;
    const int side = next.side, tiles = operands ? (side == 2 ? 2 : 4) : 4;
    m.stream.send(sent++, tiles * sizeof(m.tiles[0][0]), [&](int stage, uint64_t* full) {
      E(&to)[4][kTile] = m.tiles[stage];
      if (operands) {
        bulk_load(to[0], image.S, 2 * kTile * 2, full);
        if (side < 2) bulk_load(to[2], saved[next.head].A[side ? 0 : 2], 2 * kTile * 2, full);
        return;
      }
      const E* const E_at = w.E0 + (place_of * 3 + side) * 64 * D + next.slice * kTile;
      bring_tokens<64>(to[0], side ? maps.d_o : maps.q, p, c, head * r + next.head, full, next.slice * 64);
      bring_tokens<64>(to[1], side ? maps.v : maps.k, p, c, head, full, next.slice * 64);
      bulk_load(to[2], E_at, kTile * 2, full);
      if (side) bulk_load(to[3], E_at + 64 * D, kTile * 2, full);
      else bring_state<64>(to[3], states, place_of * 2 * D + next.slice * 64, full);
    });
    next.advance(slices, r);
  };
  // The next stage, complete; the one before it is done with, the one two steps on is sent for.
  auto arrived = [&]() -> const E* {
    if (step) m.stream.done(step - 1);
    send();
    return m.tiles[m.stream.arrived(step++)][0];
  };
  send();
  send();
  if (threadIdx.x < kSlots) {
    const float* edges = w.edge + place_of * 2 * D + threadIdx.x;  // D / 64 parts of either side
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) sum += edges[i * 64];
    m.edge[threadIdx.x] = sum;
  }
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  typename Arith<E>::template Op<64> x0, x1;
  Step now;
  const E* S;
  if (half == 0) {
    typename Arith<E>::template Op<64> S0, S1;
    float dx[8][4];
#pragma unroll 1
    for (;; now.advance(slices, r)) {
      const E* const t = arrived();
      S = t;
      if (now.side == 2) break;
      if (now.operands) {
        load_operand(S0, t, warp), load_operand(S1, t + kTile, warp);
        load_transposed(x0, t + 2 * kTile, warp);
        if (now.side) load_transposed(x1, t + 3 * kTile, warp);
        publish();
        continue;
      }
      if (now.head == 0) zero(dx);
      hand_over(dx);
      products_begin();
      if (now.head == 0) {
        product<E, 1>(dx, S0, mnmajor(t + 2 * kTile));
        product<E, 1>(dx, S1, mnmajor(t + 2 * kTile));
        if (now.side) product<E, 1>(dx, S0, mnmajor(t + 3 * kTile));
      }
      product<E, 1>(dx, x0, mnmajor(t));
      if (now.side) product<E, 1>(dx, x1, mnmajor(t));
      products_commit();
      products_wait<0>();
      hand_over(dx);
      if (now.head == r - 1) store_window<E>(rows_of(now.side ? p.dv : p.dk, c, head), dx, warp, 0, c.length, now.slice * 64);
    }
    arrive(&m.met);
  } else {
    float outer[8][4], dq[8][4];
    zero(outer);
#pragma unroll 1
    for (;; now.advance(slices, r)) {
      const E* const t = arrived();
      S = t;
      if (now.side == 2) break;
      if (now.operands) {
        if (!now.side) load_operand(x0, t + 2 * kTile, warp), load_operand(x1, t + 3 * kTile, warp);
        publish();
        continue;
      }
      zero(dq);
      hand_over(dq);
      hand_over(outer);
      products_begin();
      if (now.head == 0) product<E, 4, 0, 0>(outer, kmajor(t + kTile), kmajor(t + 2 * kTile), true);
      if (now.side) {
        if (now.head == 0) product<E, 4, 0, 0>(outer, kmajor(t + kTile), kmajor(t + 3 * kTile), true);
      } else {
        product<E, 1>(dq, x0, mnmajor(t + kTile));
        product<E, 0>(dq, x1, kmajor(t + 3 * kTile));
      }
      products_commit();
      products_wait<0>();
      hand_over(dq);
      hand_over(outer);
      if (!now.side) store_window<E>(rows_of(p.dq, c, head * r + now.head), dq, warp, 0, c.length, now.slice * 64);
    }
    arrive(&m.met), wait(&m.met, 0);  // the other may be a step behind
    store_R(reinterpret_cast<float*>(m.tiles[step % kStages]), outer, row, frag_col());
  }
  __syncthreads();

  const bool cut = image.cut, coupled = p.s.ptr == nullptr;
  float T[4][4], U[4][4], F[4][4], outer[4][4];  // F: R, or exp(G_end - G); then write strengths, of several windows exp(g)
  auto sum_of = [&](float (&sum)[4][4], const float* of_first) {
    get(sum, of_first + half * 2048, tid);
#pragma unroll 1
    for (int h = 1; h < r; ++h) {
      float x[4][4];
      get(x, of_first + h * (sizeof(WideSaved<E>) / 4) + half * 2048, tid);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[t][e] += x[t][e];
    }
  };
  sum_of(T, saved->T);
  sum_of(U, saved->U);
  get(F, image.R + half * 2048, tid);
  load_R(outer, reinterpret_cast<const float*>(m.tiles[step % kStages]), row, col);
  const uint32_t S_row = place(S, row, frag_col()) ^ (half * 64);
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 S2 = both_at<E>((S_row + h * 1024) ^ (t * 16));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = 2 * h + e;
        const float S_ = e ? S2.y : S2.x;
        const float inverse = __fdividef(1.f, F[t][k]);
        U[t][k] += outer[t][k] * (cut ? F[t][k] : inverse);  // after the sequence: not stored
        outer[t][k] *= S_;
        F[t][k] *= S_;
      }
    }
  const Rows ds_rows = rows_of(p.ds, c, head), dg_rows = rows_of(p.dg, c, head);
  if (cut) {  // exp(g)
    const Rows g = rows_of(p.g, c, head);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = row + (e >> 1) * 8, slot = col + t * 8 + (e & 1);
        F[t][e] = j < c.length && slot < p.M ? expf(load_as_float(g.ptr, g.at(j) + slot, g.dtype)) : 1.f;
      }
  }
  E* const terms = m.tiles[(step + 1) % kStages][0] + half * 2 * kTile;  // of this half's columns, two parts side by side
  {
    auto X = split<E>(T);
    store_operand<E>(terms, X.hi, warp), store_operand<E>(terms, X.lo, warp, 32);
    X = split<E>(outer);
    store_operand<E>(terms + kTile, X.hi, warp), store_operand<E>(terms + kTile, X.lo, warp, 32);
  }
  publish();
  sync(2 + half, 128);
  float dg[4][4];
  zero(dg);
  hand_over(dg);
  products_begin();
  {
    const auto ones = triangle_of_ones<E, true>(warp);
    product<E, 1>(dg, ones, mnmajor(terms));
    product<E, 1>(dg, ones, mnmajor(terms + 32));
  }
  {
    const auto ones = triangle_of_ones<E, false>(warp);
    product<E, 1>(dg, ones, mnmajor(terms + kTile));
    product<E, 1>(dg, ones, mnmajor(terms + kTile + 32));
  }
  products_commit();
  products_wait<0>();
  hand_over(dg);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int j = row + 8 * h;
    if (j < c.length)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int slot = col + t * 8;
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = dg[t][2 * h + e] + m.edge[slot + e];
          const float f = F[t][2 * h + e];
          const bool reset = cut ? f == 0.f : j == 0 && image.start[slot + e] == 0.f;
          if (reset) x[e] = 0.f;  // it forgets whatever the gate would have changed
          if (coupled) x[e] -= (cut ? f : 1.f - f) * U[t][2 * h + e];  // s = 1 - exp(g)
        }
        if (half * 32 + t * 8 < p.M) {
          store_pair<E>(p.dg, dg_rows.at(j) + slot, x[0], x[1]);
          if (!coupled) store_pair<E>(p.ds, ds_rows.at(j) + slot, U[t][2 * h], U[t][2 * h + 1]);
        }
      }
  }
#endif
}

}  // namespace

void hopper_wide_keys(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_wide(p, [&]<class E, int D>() {
    launch_early("hopper_wide_keys", wide_keys_kernel<E, D>, slots * p.H, kWideThreads, sizeof(WideKeysShared<E>), p.stream, p, input_maps(p),
                 boundary_map(p, boundary), Backward<E>(w));
  });
}

}  // namespace gsa::cuda
