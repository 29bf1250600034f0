// Chunked forward for Hopper (sm_90a), heads of 256 and 512 dimensions: what is left of a chunk once the state before it is there, as hopper_output.cu for smaller
// ones. One block for each chunk and query head, two passes over slices of 64 dimensions:
//
//     X  = tril(sum over the slices of q k^T)         o1 = R (exp(ref) (sum over the slices of q Hk) + X S)         p = softmax(scale o1)
//     P  = p R
//     A2 = tril(P S^T)                                o  = A2 v + (P exp(ref)) Hv, slice by slice
//
// S, R, ref are those of hopper_gates.cu, the states those of hopper_scan.cu. A chunk of several windows: o1, A2 and P exp(G) token by token (core/wide.cuh). Two
// warpgroups, each with half of the columns of X, of the slots (o1, p, P) and of a slice (o); A2 is made by both. Operands in two parts: X, S, P, A2, except
// P exp(ref). Two blocks on a multiprocessor.
//
//     shared memory      written by            read until
//     tiles              cp.async              three stages of q, k, Hk; then of v, Hv. Between the passes, of a chunk of several windows: gates, X, then A2, o1,
//                                              then p exp(G); the second pass is on its way after that, else before
//     S (two parts), in  bulk copy             A2
//     X, then P          both halves           o1; A2
#include "core/wide.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kStages = 3;

template <class E>
struct WideOutputShared {
  alignas(1024) E tiles[kStages][3][kTile];
  E S[2][kTile], X[2][kTile];
  float in[kSlots], sums[2][64];
  uint64_t S_full;
};
static_assert(sizeof(WideOutputShared<bf16>) <= 113 * 1024);
struct Exact {  // in `tiles`
  float a[kTile], s[kTile], X[kTile], O[kTile];
};
static_assert(sizeof(Exact) <= sizeof(WideOutputShared<bf16>::tiles));

// X becomes A2, O, which holds p, p exp(G).
[[maybe_unused]] __device__ __noinline__ void exact_outputs(Exact& m) {
  const int i = threadIdx.x / 4;
  float y[16];
  RowSlots::load<false>(y, m.O, i);
  exact_contract(y, m.a, m.s, [&](int j, float x) {
    if (threadIdx.x % 4 == 0) m.X[R_at(i, j)] = x;
  });
  RowSlots::store(m.O, i, y);
}

template <class E, int D>
__global__ __launch_bounds__(kWideThreads, 2) void wide_output_kernel(const __grid_constant__ ForwardParams p, const E* boundary, const GateImage<E>* images) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideOutputShared<E>*>(memory);
  auto& exact = *reinterpret_cast<Exact*>(m.tiles);
  constexpr int slices = D / 64;
  const int q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.HQ, kChunk, c)) return;
  const GateImage<E>& image = images[c.slot * p.H + head];
  const bool cut = image.cut;
  const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
  auto load = [&](int step, int stage, int last) {
    if (step < last) {
      const int side = step >= slices, d = (step - side * slices) * 64;
      E(&to)[3][kTile] = m.tiles[stage];
      if (!side) load_slice(to[0], rows_of(p.q, c, q_head), d, c.length);
      load_slice(to[1], rows_of(side ? p.v : p.k, c, head), d, c.length);
      load_state_slice(to[2], states, side * D + d, p.M);
    }
    cp_async_commit();
  };
  load(0, 0, slices);
  load(1, 1, slices);
  if (threadIdx.x == 0 && !cut) {
    init(&m.S_full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_expecting(&m.S_full, sizeof(m.S) + sizeof(m.in));
    bulk_load(m.S, image.S, sizeof(m.S), &m.S_full);
    bulk_load(m.in, image.in, sizeof(m.in), &m.S_full);
  }
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  int stage = 0, free = 2;  // of the next slice; of the one two steps on
  float x[4][4], o1[4][4], R[4][4];
  if (!cut) load_half(R, image.R, half, tid);
#pragma unroll 1
  for (int step = 0; step < slices; ++step) {
    cp_async_wait_for<1>();
    publish();
    __syncthreads();  // the slice is there, and everybody is done with the one before it
    load(step + 2, free, cut ? slices : 2 * slices);
    const E* t = m.tiles[stage][0];
    hand_over(x);
    hand_over(o1);
    products_begin();
    product<E, 4, 0, 0>(x, kmajor(t), kmajor(t + kTile + half * 32 * 64), step > 0);
    product<E, 4, 0, 1>(o1, kmajor(t), mnmajor(t + 2 * kTile + half * 32), step > 0);
    products_commit();
    products_wait<0>();
    hand_over(x);
    hand_over(o1);
    free = stage, stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  const float scale = static_cast<float>(p.scale) * 1.4426950408889634f;
  typename Arith<E>::template Split<64> A2;
  typename Arith<E>::template Op<64> P_in;
  if (!cut) {
    keep_lower<0>(x, warp, half * 32);
    {
      const auto X = split<E>(x);
      store_operand<E>(m.X[0], X.hi, warp, half * 32);
      store_operand<E>(m.X[1], X.lo, warp, half * 32);
    }
    publish();
    __syncthreads();
    wait(&m.S_full, 0);
    scale_columns(o1, m.in + half * 32);
    hand_over(o1);
    products_begin();
    product<E, 4, 0, 1>(o1, kmajor(m.X[0]), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(o1, kmajor(m.X[1]), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(o1, kmajor(m.X[0]), mnmajor(m.S[1] + half * 32), true);
    products_commit();
    products_wait<0>();
    hand_over(o1);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o1[t][e] *= R[t][e] * scale;
    softmax_over_halves(o1, p.M, m.sums, half, row);  // X is done with
    times(o1, R);
    {
      const auto P = split<E>(o1);
      store_operand<E>(m.X[0], P.hi, warp, half * 32);
      store_operand<E>(m.X[1], P.lo, warp, half * 32);
    }
    publish();
    __syncthreads();
    float y[8][4];
    hand_over(y);
    products_begin();
    product<E, 4, 0, 0>(y, kmajor(m.X[0]), kmajor(m.S[0]), false);
    product<E, 4, 0, 0>(y, kmajor(m.X[1]), kmajor(m.S[0]), true);
    product<E, 4, 0, 0>(y, kmajor(m.X[0]), kmajor(m.S[1]), true);
    products_commit();
    P_in = operand_times(m.X[0], m.in, warp);
    products_wait<0>();
    hand_over(y);
    keep<true, 0>(y, warp);
    A2 = split<E>(y);
  } else {
    __syncthreads();
    exact_gates<E>(p, blockIdx.x / p.HQ, head, exact.a, exact.s);
    store_R(exact.X, x, row, col);
    store_R(exact.O, o1, row, col);
    __syncthreads();
    exact_apply<true>(exact.O, exact.X, exact.a, exact.s);
    __syncthreads();
    load_R(o1, exact.O, row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o1[t][e] *= scale;
    softmax_over_halves(o1, p.M, m.sums, half, row);  // both halves have read O
    store_R(exact.O, o1, row, col);
    __syncthreads();
    exact_outputs(exact);
    __syncthreads();
    float y[8][4];
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      load_R(x, exact.O, row, g * 32 + frag_col());
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[g * 4 + t][e] = x[t][e];
    }
    P_in = operand<E>(y);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      load_R(x, exact.X, row, g * 32 + frag_col());
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[g * 4 + t][e] = x[t][e];
    }
    A2 = split<E>(y);
    __syncthreads();
    load(slices, stage, 2 * slices);
    load(slices + 1, stage == kStages - 1 ? 0 : stage + 1, 2 * slices);
  }

#pragma unroll 1
  for (int step = slices; step < 2 * slices; ++step) {
    cp_async_wait_for<1>();
    publish();
    __syncthreads();
    load(step + 2, free, 2 * slices);
    const E* t = m.tiles[stage][0];
    float o[4][4];
    zero(o);
    hand_over(o);
    products_begin();
    product<E, 0>(o, P_in, kmajor(t + 2 * kTile + half * 32 * 64));
    product<E, 1>(o, A2.hi, mnmajor(t + kTile + half * 32));
    product<E, 1>(o, A2.lo, mnmajor(t + kTile + half * 32));
    products_commit();
    products_wait<0>();
    hand_over(o);
    store_window<E>(rows_of(p.o, c, q_head), o, warp, 0, c.length, (step - slices) * 64 + half * 32);
    free = stage, stage = stage == kStages - 1 ? 0 : stage + 1;
  }
#endif
}

}  // namespace

void hopper_wide_output(const ForwardParams& p, const void* boundary, const void* images) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_wide(p, [&]<class E, int D>() {
    launch("hopper_wide_output", wide_output_kernel<E, D>, slots * p.HQ, kWideThreads, sizeof(WideOutputShared<E>), p.stream, p,
           static_cast<const E*>(boundary), static_cast<const GateImage<E>*>(images));
  });
}

}  // namespace gsa::cuda
