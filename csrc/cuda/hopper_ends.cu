// Chunked backward for Hopper (sm_90a), where it walks in segments (hopper_walk.cu): the cotangents of the states at the end of each segment but the last.
//
//     ends_kernel                each segment but the first from its last chunk to its first, as if nothing came after it (after the last one, the cotangents of the final
//                                states), one block for each segment and head. Of each chunk, as in hopper_walk.cu,
//                                    o1, dp, p, Yk, Yv          dH <- exp(ref) (exp(G_end - ref) dH + Y^T A)          decay <- exp(G_end) decay
//                                with A = q of the keys, d_o of the values. Chunks whose cotangents the gates leave nothing of before the segment (remembered_chunks) are left out.
//     join_kernel (hopper_starts.cu)     dH <- decay dH + that of the segment, from the last one back
//
// Two warpgroups, as in hopper_queries.cu: one has o1, the other dp, of all slots; they give each other half, and each has p and Y of 32 slots; then one has the keys' dH in
// its registers, the other the values'. One thread brings everything, as soon as there is room. In memory, as hopper_starts.cu leaves it: of each segment dHk, dHv, decay.
// A head that has a chunk of several windows is not the walk's, and nothing is done for it here.
//
//     shared memory        holds
//     A[2], B, H           q, d_o, of two chunks by turns; k, v; states before the chunk
//     Y                    what the warpgroups give each other, sums of rows; Yk, Yv
//     gates                R, S and the factors of the chunk
#include "core/backward.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256;

template <class E, int D>
struct EndsShared {
  alignas(1024) E A[2][2][64 * D], B[2][64 * D], H[2][64 * D];  // [turn][side], [side]
  E Y[2][2][kTile];  // [side][part]
  GateImage<E> gates;
  float diagonal[2][64], sums_of_gates[kThreads / 32][kSlots];  // of q k^T, of d_o v^T
  uint64_t A_full[2], B_full, gates_full;
  Sequence sequence;
  __device__ float* given(int half) { return reinterpret_cast<float*>(Y[0]) + half * 64 * 32; }
  __device__ RowSums<2>& sums() { return *reinterpret_cast<RowSums<2>*>(Y[1]); }
};
using LargestEnds = EndsShared<bf16, 128>;
static_assert(sizeof(LargestEnds) <= 227 * 1024 && offsetof(LargestEnds, gates) % 1024 == 0);

template <class E, int D>
__global__ __launch_bounds__(kThreads, 1) void ends_kernel(const __grid_constant__ BackwardParams p, const GateImage<E>* images,
                                                           const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states,
                                                           const __grid_constant__ Segments segments, float* ends, int* cut) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<EndsShared<E, D>*>(memory);
  const int head = blockIdx.x % p.H, half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
  const int64_t item = blockIdx.x / p.H, n = item / segments.before();
  const int segment = static_cast<int>(item % segments.before()) + 1;
  const Sequence whole = sequence<false>(p, n, kChunk), own = part(whole, segment, segments.length(), kChunk);
  if (threadIdx.x == 0) {
    m.sequence = own;
    for (uint64_t* barrier : {&m.A_full[0], &m.A_full[1], &m.B_full, &m.gates_full}) init(barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  bool several = false;
  for (int64_t i = threadIdx.x; i < whole.chunks; i += kThreads) several |= images[(whole.slot + i) * p.H + head].cut != 0;
  several = __syncthreads_or(several);
  if (threadIdx.x == 0 && segment == 1) cut[n * p.H + head] = several;
  const int needed = several ? 0 : remembered_chunks<E, false>(p, own, head, m.sums_of_gates), first_slot = static_cast<int>(own.slot);

  // By one thread.
  auto send_A = [&](int i) {
    const Chunk c = chunk_of(p, m.sequence, i, kChunk);
    arrive_expecting(m.A_full + i % 2, 2 * 64 * D * 2);
    bring_tokens<D>(m.A[i % 2][0], maps.q, p, c, head, m.A_full + i % 2);
    bring_tokens<D>(m.A[i % 2][1], maps.d_o, p, c, head, m.A_full + i % 2);
  };
  auto send_B = [&](int i) {
    const Chunk c = chunk_of(p, m.sequence, i, kChunk);
    arrive_expecting(&m.B_full, 4 * 64 * D * 2);
    bring_tokens<D>(m.B[0], maps.k, p, c, head, &m.B_full);
    bring_tokens<D>(m.B[1], maps.v, p, c, head, &m.B_full);
    for (int side = 0; side < 2; ++side) bring_state<D>(m.H[side], states, ((c.slot * p.H + head) * 2 + side) * D, &m.B_full);
  };
  auto send_gates = [&](int i) {
    constexpr uint32_t bytes = offsetof(GateImage<E>, cut);
    arrive_expecting(&m.gates_full, bytes);
    bulk_load(&m.gates, images + int64_t(first_slot + i) * p.H + head, bytes, &m.gates_full);
  };
  if (threadIdx.x == 0 && needed) send_gates(needed - 1), send_B(needed - 1), send_A(needed - 1);

  float dH[D / 8][4], decay[2];
  {
    const bool last = segment == segments.count - 1 && !several && needed == static_cast<int>(own.chunks);
    const float* in = last ? static_cast<const float*>(half ? p.dhvT : p.dhkT) : nullptr;
    load_registers(dH, in ? in + (n * p.H + head) * D * p.M : nullptr, half, D, p.M, warp);
    decay[0] = decay[1] = needed == static_cast<int>(own.chunks) ? 1.f : 0.f;
  }
  const float scale = static_cast<float>(p.scale);
  uint32_t turn = 0;  // the parity of B and of the gates
#pragma unroll 1
  for (int i = needed - 1; i >= 0; --i, turn ^= 1) {
    const E* const A = m.A[i % 2][half];
    float o[4][4], dp[4][4], R[4][4], y[4][4];
    wait(&m.gates_full, turn);
    wait(&m.B_full, turn);
    wait(m.A_full + i % 2, (needed - 1 - i) / 2 & 1);
    {
      float x[8][4], other[2];
      scores<E, D, false>(x, other, A, m.B[half], m.H[half], m.gates.S[0], m.gates.in, warp, m.diagonal[half]);
      __syncthreads();  // k, v and the states are done with, and the chunk after this one
      if (threadIdx.x == 0 && i > 0) send_B(i - 1), send_A(i - 1);
      give_half(m.given(half), x, half, tid);
      get_R(R, m.gates.R, row, half * 32);
      __syncthreads();
      take_half(o, dp, x, m.given(!half), half, tid);
    }
    {
      float s[4][4], d[2], b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) d[h] = m.diagonal[0][row + 8 * h], b[h] = m.diagonal[1][row + 8 * h];
      strengths(s, m.gates.S[0], R, half, row);
      times(o, R), times(dp, R);
      cotangents(o, dp, y, s, R, d, b, m.sums(), half, half * 32, p.M, scale, row, [] { __syncthreads(); });
      __syncthreads();  // what lies in Y is done with
      store_half(m.Y[0][0], dp, half, warp);
      store_half(m.Y[1][0], y, half, warp);
    }
    const float in[2] = {m.gates.in[row], m.gates.in[row + 8]}, out[2] = {m.gates.out[row], m.gates.out[row + 8]};
    publish();
    __syncthreads();  // Y is whole, the gates are done with
    if (threadIdx.x == 0 && i > 0) send_gates(i - 1);
    decay[0] *= in[0] * out[0], decay[1] *= in[1] * out[1];
    scale_rows(dH, out[0], out[1]);
    const E* const Y = m.Y[half][0];
    hand_over(dH);
    products_begin();
    product<E, 4, 1, 1>(dH, mnmajor(Y), mnmajor(A), true);
    product<E, 4, 1, 1>(dH, mnmajor(Y + kTile), mnmajor(A), true);
    products_commit();
    products_wait<0>();
    hand_over(dH);
    scale_rows(dH, in[0], in[1]);
  }
  float* const to = ends + (item * p.H + head) * start_floats(p);
  store_registers(to + half * D * p.M, dH, half, D, p.M, warp);
  if (half == 0 && (lane_id() & 3) == 0) to[2 * D * p.M + row] = decay[0], to[2 * D * p.M + row + 8] = decay[1];
#endif
}

}  // namespace

void hopper_ends(const BackwardParams& p, const void* boundary, const void* images, float* ends, int* cut) {
  const Segments segments = hopper_segments(p).undivided();
  select_hopper(p, [&]<class E, int D>() {
    launch_early("hopper_ends", ends_kernel<E, D>, p.N * segments.before() * p.H, kThreads, sizeof(EndsShared<E, D>), p.stream, p,
                 static_cast<const GateImage<E>*>(images), input_maps(p), boundary_map(p, boundary), segments, ends, cut);
  });
  hopper_join_ends(p, ends, cut);
}

}  // namespace gsa::cuda
