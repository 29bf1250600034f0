// Hopper (sm_90a), heads of 256 and 512 dimensions: what hopper_wide_*.cu share. A block has a chunk and streams over slices of 64 dimensions, which come by
// asynchronous copies two steps ahead; what is summed over all dimensions stays in registers.
//
// Chunks that have to be cut into windows (core/hopper.cuh) are not cut here. What is relative to a reference is [64 x 64] tokens times slots and small beside the
// streams: in such a chunk it is made token by token in fp32, decays as products of exp(g_t) <= 1, by four threads for each row and 16 slots for each thread:
//
//     apply         O_i <- exp(G_i) O_i + sum_{j < i} X_ij exp(G_i - G_j) s_j
//     contract      A_ij = sum_m y_i s_j exp(G_i - G_j), j <= i               y_i <- exp(G_i) y_i
//     inner_j       = sum_{i > j} X_ij exp(G_i - G_j) y_i
//
// Exact for any gates, a reset (-inf) is a product with zero.
#pragma once
#include "hopper.cuh"

namespace gsa::cuda::hopper {

constexpr int kWideThreads = 256;

// Blocks by time, then sequence: what a scan over the chunks touched last is in the L2 still, and comes first. The slot of the i-th.
[[maybe_unused]] __device__ inline int64_t slot_by_time(const Params& p, uint32_t i, bool last_first) {
  if (p.cu_seqlens) return i;
  const uint32_t each = static_cast<uint32_t>(p.T / kChunk + 2), count = static_cast<uint32_t>(p.N), chunk = i / count;
  return int64_t(i % count) * each + (last_first ? each - 1 - chunk : chunk);
}
// One cp.async of 16 bytes; valid false: zeros.
__device__ inline void copy16(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// 64 columns of the tokens of a head, from d on: a tile. Two pieces a thread.
template <class E>
__device__ inline void load_slice(E* tile, const Rows& src, int d, int rows) {
  const int r = threadIdx.x / 8, c = threadIdx.x % 8 * 8;
  const uint32_t to = address(at(tile, r, c));
  const E* from = static_cast<const E*>(src.ptr) + src.at(r) + (d + c);
  copy16(to, from, r < rows), copy16(to + 32 * 128, from + 32 * src.step, r + 32 < rows);
}
// 64 rows of a boundary state [D][M], from d on.
template <class E>
__device__ inline void load_state_slice(E* tile, const E* state, int d, int M) {
  const int r = threadIdx.x / 8, c = threadIdx.x % 8 * 8;
  const uint32_t to = address(at(tile, r, c));
  const E* from = state + (d + r) * M + (c < M ? c : 0);
  copy16(to, from, c < M), copy16(to + 32 * 128, from + 32 * M, c < M);
}

// The warp's 16 rows of a tile as an operand, and of its transpose.
template <class E>
__device__ inline void load_operand(typename Arith<E>::template Op<64>& x, const E* tile, int warp) {
  const uint32_t from = place(tile, warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4<false>(x.r[k], from ^ (k * 32));
}
template <class E>
__device__ inline void load_transposed(typename Arith<E>::template Op<64>& x, const E* tile, int warp) {
  const int l = lane_id();
  const uint32_t from = place(tile, (l & 7) + (l >> 4) * 8, 0) ^ ((warp * 2 + ((l >> 3) & 1)) * 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4<true>(x.r[k], from + k * 16 * 128);
}

// Columns from `column` on: keeps x[i, j] with i - j >= least.
template <int least>
__device__ inline void keep_lower(float (&x)[4][4], int warp, int column) {
  const int i = warp * 16 + frag_row() - frag_col() - column;
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i - (t * 8 + (e & 1) - (e >> 1) * 8) < least) x[t][e] = 0.f;
}
// To an fp32 tile that load_R reads.
template <int NT>
__device__ inline void store_R(float* R, const float (&x)[NT][4], int row, int column) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(R + R_at(row + 8 * h, column + t * 8)) = make_float2(x[t][2 * h], x[t][2 * h + 1]);
}
// Half of the slots of what lies as accumulators do, [column / 8][thread of a warpgroup][4].
[[maybe_unused]] __device__ inline void load_half(float (&x)[4][4], const float* R, int half, int tid) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 y = reinterpret_cast<const float4*>(R)[half * 512 + t * 128 + tid];
    x[t][0] = y.x, x[t][1] = y.y, x[t][2] = y.z, x[t][3] = y.w;
  }
}
template <int NT>
__device__ inline void times(float (&x)[NT][4], const float (&y)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] *= y[t][e];
}

// x of half of the slots, rows over those of both: 2^x over its sum; slots >= M nothing. A barrier of all threads between writing and reading `sums`.
[[maybe_unused]] __device__ inline void softmax_over_halves(float (&x)[4][4], int M, float (&sums)[2][64], int half, int row) {
  float top[2], sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = -INFINITY, sum[h] = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = half * 32 + t * 8 < M ? x[t][e] : -INFINITY, top[h] = fmaxf(top[h], x[t][e]);
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

// ------------------------------------------------------------------------------------------------------------ chunks of several windows

// exp(g) and s [token][slot] of a chunk; 1 and 0 where there is none.
template <class E>
__device__ __noinline__ void exact_gates(const Params& p, int64_t slot, int64_t head, float* a, float* s) {
  Chunk c;
  if (!find_chunk(p, slot, kChunk, c)) return;
  const Rows g = rows_of(p.g, c, head), w = rows_of(p.s, c, head);
#pragma unroll 1
  for (int e = threadIdx.x; e < kTile; e += kWideThreads) {
    const int i = e / 64, m = e % 64;
    const bool valid = i < c.length && m < p.M;
    const float x = valid ? load_as_float(g.ptr, g.at(i) + m, g.dtype) : 0.f;
    a[e] = expf(x);
    s[e] = !valid ? 0.f : w.ptr ? load_as_float(w.ptr, w.at(i) + m, w.dtype) : GateMaker<E, 8>::one_minus_exp(x);
  }
}

// A thread's 16 slots of a row of a tile as accumulators leave it (R_at), or of one [row][slot].
struct RowSlots {
  static __device__ int column(int u) { return u * 16 + threadIdx.x % 4 * 4; }
  template <bool plain>
  static __device__ void load(float (&x)[16], const float* tile, int row) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float4 y = *reinterpret_cast<const float4*>(tile + (plain ? row * 64 + column(u) : R_at(row, column(u))));
      x[4 * u] = y.x, x[4 * u + 1] = y.y, x[4 * u + 2] = y.z, x[4 * u + 3] = y.w;
    }
  }
  static __device__ void store(float* tile, int row, const float (&x)[16]) {
#pragma unroll
    for (int u = 0; u < 4; ++u) *reinterpret_cast<float4*>(tile + R_at(row, column(u))) = make_float4(x[4 * u], x[4 * u + 1], x[4 * u + 2], x[4 * u + 3]);
  }
};

// apply; diagonal: with j = i.
template <bool diagonal>
__device__ __noinline__ void exact_apply(float* O, const float* X, const float* a, const float* s) {
  const int i = threadIdx.x / 4;
  float sum[16], f[16], x[16];
#pragma unroll
  for (int m = 0; m < 16; ++m) sum[m] = 0.f, f[m] = 1.f;
#pragma unroll 1
  for (int j = i | 7; j >= 0; --j) {  // a warp's rows together: they read the same words
    if (j > i) continue;
    if (diagonal || j < i) {
      const float b = X[R_at(i, j)];
      RowSlots::load<true>(x, s, j);
#pragma unroll
      for (int m = 0; m < 16; ++m) sum[m] += b * (f[m] * x[m]);
    }
    RowSlots::load<true>(x, a, j);
#pragma unroll
    for (int m = 0; m < 16; ++m) f[m] *= x[m];
  }
  RowSlots::load<false>(x, O, i);
#pragma unroll
  for (int m = 0; m < 16; ++m) sum[m] += f[m] * x[m];
  RowSlots::store(O, i, sum);
}

// contract; y in and out. f(j, A_ij) by all threads of the row, j from 63 down to 0, A_ij = 0 where j > i.
template <class F>
__device__ inline void exact_contract(float (&y)[16], const float* a, const float* s, F&& f) {
  const int i = threadIdx.x / 4;
#pragma unroll 1
  for (int j = 63; j >= 0; --j) {
    float sum = 0.f, x[16];
    if (j <= i) {
      RowSlots::load<true>(x, s, j);
#pragma unroll
      for (int m = 0; m < 16; ++m) sum += y[m] * x[m];
      RowSlots::load<true>(x, a, j);
#pragma unroll
      for (int m = 0; m < 16; ++m) y[m] *= x[m];
    }
    __syncwarp();
    f(j, quad_sum(sum));
  }
}

}  // namespace gsa::cuda::hopper
