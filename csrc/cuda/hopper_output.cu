// Chunked forward for Hopper (sm_90a), in parts: what is left of a chunk once the state before it is there. One block for each chunk and key/value head; the query
// heads of a group one after the other.
//
//     X  = tril(q k^T)                                o1 = R (exp(ref) (q Hk) + X S)               p = softmax(scale o1)
//     P  = p R
//     A2 = tril(P S^T)                                o  = A2 v + (P exp(ref)) Hv
//
// S, R, ref are those of hopper_gates.cu, the states those of hopper_scan.cu. The windows of a chunk that has several are made here, one after the other. Two
// warpgroups, each with half of the slots (o1, p, P) and of the dimensions (o); what is [64 x 64] tokens is made by both. Operands in two parts: X, S, P, A2,
// except P exp(ref). Two blocks on a multiprocessor: while one waits the other works.
//
//     shared memory      written by            read until
//     q                  cp.async              o1 is there: then the next head's is on its way
//     k, Hk; v, Hv       cp.async              the end
//     S (two parts), in  bulk copy             the end
//     P (two parts)      both halves           o
//     sums               both halves           P: log2 of the sum of 2^(o1 scale log2 e) over half of the slots, of every row
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256;

template <class E, int D>
struct OutputShared {
  alignas(1024) E q[64 * D];
  E k[64 * D], v[64 * D], H[2][64 * D], S[2][kTile], P[2][kTile];
  float in[kSlots], sums[2][64];
  uint64_t S_full;
};
static_assert(sizeof(OutputShared<bf16, 128>) <= 113 * 1024);

// x of half of the slots, rows over those of both: exp2(c x) over its sum.
[[maybe_unused]] __device__ inline void softmax_of_halves(float (&x)[4][4], float c, int M, float (&sums)[2][64], int half, int row) {
  float top[2], sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = -INFINITY, sum[h] = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = half * 32 + t * 8 < M ? x[t][e] * c : -INFINITY, top[h] = fmaxf(top[h], x[t][e]);
    top[h] = fmaxf(quad_max(top[h]), -1e30f);  // a half without slots
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = fast_exp2(x[t][e] - top[h]), sum[h] += x[t][e];
    sum[h] = top[h] + __log2f(quad_sum(sum[h]));
    if ((lane_id() & 3) == 0) sums[half][row + 8 * h] = sum[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float other = sums[!half][row + 8 * h];
    const float both = fmaxf(sum[h], other) + __log2f(1.f + fast_exp2(-fabsf(sum[h] - other))), f = fast_exp2(top[h] - both);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] *= f;
  }
}

template <int NT>
__device__ inline void multiply(float (&x)[NT][4], const float (&y)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] *= y[t][e];
}

template <class E, int D>
__global__ __launch_bounds__(kThreads, 2) void output_kernel(const __grid_constant__ ForwardParams p, const E* boundary, const GateImage<E>* images,
                                                             int heads) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<OutputShared<E, D>*>(memory);
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c)) return;
  const GateImage<E>& image = images[c.slot * p.H + head];
  const bool cut = image.cut;
  // Everything is on its way before anything is waited for.
  const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
  load_tokens<D, kThreads>(m.q, rows_of(p.q, c, first_head), c.length, threadIdx.x);
  load_tokens<D, kThreads>(m.k, rows_of(p.k, c, head), c.length, threadIdx.x);
  load_state<D, kThreads>(m.H[0], states, p.M, threadIdx.x);
  cp_async_commit();
  load_tokens<D, kThreads>(m.v, rows_of(p.v, c, head), c.length, threadIdx.x);
  load_state<D, kThreads>(m.H[1], states + int64_t(D) * p.M, p.M, threadIdx.x);
  cp_async_commit();
  if (threadIdx.x == 0 && !cut) {
    init(&m.S_full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_expecting(&m.S_full, sizeof(m.S) + sizeof(m.in));
    bulk_load(m.S, image.S, sizeof(m.S), &m.S_full);
    bulk_load(m.in, image.in, sizeof(m.in), &m.S_full);
  }
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  __syncthreads();
#pragma unroll 1
  for (int begin = 0, end = c.length; begin < c.length; begin = end) {
    float R[4][4];
    if (!cut) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float4 x = reinterpret_cast<const float4*>(image.R)[half * 512 + t * 128 + tid];
        R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
      }
      wait(&m.S_full, 0);
    } else {
      float* const R_tile = reinterpret_cast<float*>(m.P);
      end = make_window<E, D>(p, blockIdx.x / turns / p.H, head, begin, Advance<E>{m.q, m.sums[0]}, R_tile, m.S[0], m.in, m.H[0], m.k, m.v, states);
      load_R(R, R_tile, tid / 32 * 16 + frag_row(), half * 32 + frag_col());
      __syncthreads();
      load_tokens<D, kThreads>(m.q, rows_of(p.q, c, first_head), c.length, threadIdx.x);
      cp_async_commit();
    }

#pragma unroll 1
    for (int q_head = first_head; q_head < first_head + heads; ++q_head) {
      auto& m = *reinterpret_cast<OutputShared<E, D>*>(memory + kept(0));  // addresses are made where they are used: there are no registers to keep them in
      const int thread = kept(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread % 128 / 32, 0);
      cut || q_head > first_head ? cp_async_wait_for<0>() : cp_async_wait_for<1>();
      publish();
      __syncthreads();  // and P and the sums are done with
      float o1[4][4], none[2];
      scores<E, D, true>(o1, none, m.q, m.k, m.H[0] + half * 32, m.S[0] + half * 32, m.in + half * 32, warp);
      multiply(o1, R);
      softmax_of_halves(o1, static_cast<float>(p.scale) * 1.4426950408889634f, p.M, m.sums, half, warp * 16 + frag_row());  // q is done with
      if (q_head + 1 < first_head + heads) load_tokens<D, kThreads>(m.q, rows_of(p.q, c, q_head + 1), c.length, threadIdx.x);
      cp_async_commit();
      multiply(o1, R);
      {
        const auto P = split<E>(o1);
        store_operand<E>(m.P[0], P.hi, warp, half * 32);
        store_operand<E>(m.P[1], P.lo, warp, half * 32);
      }
      cp_async_wait_for<1>();  // v and Hv
      publish();
      __syncthreads();
      float x[8][4];
      hand_over(x);
      products_begin();
      product<E, 4, 0, 0>(x, kmajor(m.P[0]), kmajor(m.S[0]), false);
      product<E, 4, 0, 0>(x, kmajor(m.P[1]), kmajor(m.S[0]), true);
      product<E, 4, 0, 0>(x, kmajor(m.P[0]), kmajor(m.S[1]), true);
      products_commit();
      const auto P_in = operand_times(m.P[0], m.in, warp);
      products_wait<0>();
      hand_over(x);
      keep<true, 0>(x, warp);
      const auto A2 = split<E>(x);
      float o[D / 16][4];
      zero(o);
      hand_over(o);
      products_begin();
      product<E, 0>(o, P_in, kmajor(m.H[1] + half * (D / 2) * 64));
      product<E, 1>(o, A2.hi, mnmajor(columns<E>(m.v, half * (D / 2))));
      product<E, 1>(o, A2.lo, mnmajor(columns<E>(m.v, half * (D / 2))));
      products_commit();
      products_wait<0>();
      hand_over(o);
      store_window<E>(rows_of(p.o, c, q_head), o, warp, begin, end, half * (D / 2));
    }
    __syncthreads();
  }
#endif
}

}  // namespace

void hopper_output(const ForwardParams& p, const void* boundary, const void* images) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  const int r = p.HQ / p.H;
  const int heads = slots * p.H >= 8 * hopper_multiprocessors() ? r : 1;  // of one block
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_output", output_kernel<E, D>, slots * p.H * (r / heads), kThreads, sizeof(OutputShared<E, D>), p.stream, p, static_cast<const E*>(boundary),
           static_cast<const GateImage<E>*>(images), heads);
  });
}

}  // namespace gsa::cuda
