// Hopper (sm_90a), in parts: chunks that would have to be cut into windows (core/hopper.cuh) are not cut. What is as wide as a head uses S relative to the
// chunk's end and Y relative to its beginning, factors <= 1. What is relative to a reference else is [64 x 64] tokens times slots, and in such a chunk made
// token by token in fp32, decays as products of exp(g_t) <= 1, by 256 threads for each bank: four for each row, 16 slots for each thread.
//
//     apply         O_i <- exp(G_i) O_i + sum_{j < i} X_ij exp(G_i - G_j) s_j
//     contract      A_ij = sum_m y_i s_j exp(G_i - G_j), j <= i               y_i <- exp(G_i) y_i
//     inner         inner_j = sum_{i > j} X_ij exp(G_i - G_j) y_i
//
// Exact for any gates, a reset (-inf) is a product with zero; a NaN is in what follows it and in nothing before. Rare: mostly not inlined, for what surrounds
// it has no registers to spare. Tiles are [64 x 64] in fp32, those of gates plain [token][slot], all others as R_at says.
#pragma once
#include "hopper.cuh"

namespace gsa::cuda::hopper {

constexpr int kExactThreads = 256;  // of a bank

template <int NT>
__device__ inline void store_R(float* R, const float (&x)[NT][4], int row, int column) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(R + R_at(row + 8 * h, column + t * 8)) = make_float2(x[t][2 * h], x[t][2 * h + 1]);
}
template <int NT>
__device__ inline void load_R(float (&x)[NT][4], const float* R, int row, int column) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 y = *reinterpret_cast<const float2*>(R + R_at(row + 8 * h, column + t * 8));
      x[t][2 * h] = y.x, x[t][2 * h + 1] = y.y;
    }
}
// Of a plain tile.
template <int NT>
__device__ inline void load_plain(float (&x)[NT][4], const float* tile, int row, int column) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 y = *reinterpret_cast<const float2*>(tile + (row + 8 * h) * 64 + column + t * 8);
      x[t][2 * h] = y.x, x[t][2 * h + 1] = y.y;
    }
}
template <int NT>
__device__ inline void add(float (&x)[NT][4], const float (&y)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] += y[t][e];
}

template <int NT>
__device__ inline void times(float (&x)[NT][4], const float (&y)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] *= y[t][e];
}

// x of the slots of the share `own`, of which the first `slots` count, rows over those of all shares: exp2(c x) over its sum. meet: a barrier of all shares' threads,
// between writing and reading `sums`.
template <int SHARES, int NT, class Meet>
__device__ inline void softmax_of_shares(float (&x)[NT][4], float c, int slots, float (&sums)[SHARES][64], int own, int row, Meet&& meet) {
  float top[2], sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = -INFINITY, sum[h] = 0.f;
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = t * 8 < slots ? x[t][e] * c : -INFINITY, top[h] = fmaxf(top[h], x[t][e]);
    top[h] = fmaxf(quad_max(top[h]), -1e30f);  // a share without slots
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = fast_exp2(x[t][e] - top[h]), sum[h] += x[t][e];
    sum[h] = top[h] + __log2f(quad_sum(sum[h]));
    if ((lane_id() & 3) == 0) sums[own][row + 8 * h] = sum[h];
  }
  meet();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float all = sum[h];
#pragma unroll
    for (int i = 1; i < SHARES; ++i) {
      const float other = sums[own ^ i][row + 8 * h];
      all = fmaxf(all, other) + __log2f(1.f + fast_exp2(-fabsf(all - other)));
    }
    const float f = fast_exp2(top[h] - all);
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] *= f;
  }
}

// Of 32 slots, by a block, M slots in all.
template <int SHARES>
__device__ inline void softmax_of_shares(float (&x)[4][4], float c, int M, float (&sums)[SHARES][64], int own, int row) {
  softmax_of_shares(x, c, M - own * 32, sums, own, row, [] { __syncthreads(); });
}

// exp(g) and s of a chunk and bank; 1 and 0 where there is none.
template <class E>
__device__ __noinline__ void exact_gates(const Params& p, int64_t slot, int64_t head, int bank, float* a, float* s) {
  Chunk c;
  if (!find_chunk(p, slot, kChunk, c)) return;
  const Rows g = rows_of(p.g, c, head), w = rows_of(p.s, c, head);
#pragma unroll 4
  for (int e = threadIdx.x % kExactThreads; e < kTile; e += kExactThreads) {
    const int i = e / 64, m = bank * kSlots + e % 64;
    const bool valid = i < c.length && m < p.M;
    const float x = valid ? load_as_float(g.ptr, g.at(i) + m, g.dtype) : 0.f;
    a[e] = expf(x);
    s[e] = !valid ? 0.f : w.ptr ? load_as_float(w.ptr, w.at(i) + m, w.dtype) : GateMaker<E, 8>::one_minus_exp(x);
  }
}

// A thread's 16 slots of a row.
struct RowSlots {
  static __device__ int row() { return threadIdx.x % kExactThreads / 4; }
  static __device__ int column(int u) { return u * 16 + threadIdx.x % 4 * 4; }
  template <bool plain>
  static __device__ void load(float (&x)[16], const float* tile, int row) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float4 y = *reinterpret_cast<const float4*>(tile + (plain ? row * 64 + column(u) : R_at(row, column(u))));
      x[4 * u] = y.x, x[4 * u + 1] = y.y, x[4 * u + 2] = y.z, x[4 * u + 3] = y.w;
    }
  }
  template <bool plain>
  static __device__ void store(float* tile, int row, const float (&x)[16]) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
      *reinterpret_cast<float4*>(tile + (plain ? row * 64 + column(u) : R_at(row, column(u)))) =
          make_float4(x[4 * u], x[4 * u + 1], x[4 * u + 2], x[4 * u + 3]);
  }
};

// f(j, j < i) for j <= i, from i down. A warp's eight rows go together, for they read the same words: first to where all of them have begun.
template <class F>
__device__ inline void exact_back(int i, F&& f) {
#pragma unroll 1
  for (int j = i | 7; j >= (i & ~7); --j)
    if (j <= i) f(j, j < i);
#pragma unroll 2
  for (int j = (i & ~7) - 1; j >= 0; --j) f(j, true);
}
__device__ inline void exact_multiply(float (&x)[16], const float* tile, int row) {
  float y[16];
  RowSlots::load<true>(y, tile, row);
#pragma unroll
  for (int m = 0; m < 16; ++m) x[m] *= y[m];
}

// apply, with j = i.
[[maybe_unused]] static __device__ __noinline__ void exact_apply_with_diagonal(const float* a, const float* s, float* O, const float* X) {
  const int i = RowSlots::row();
  float sum[16], f[16], x[16];
#pragma unroll
  for (int m = 0; m < 16; ++m) sum[m] = 0.f, f[m] = 1.f;
  exact_back(i, [&](int j, bool) {
    const float b = X[R_at(i, j)];
    float x[16];
    RowSlots::load<true>(x, s, j);
#pragma unroll
    for (int m = 0; m < 16; ++m) sum[m] += b * (f[m] * x[m]);
    exact_multiply(f, a, j);
  });
  RowSlots::load<false>(x, O, i);
#pragma unroll
  for (int m = 0; m < 16; ++m) sum[m] += f[m] * x[m];
  RowSlots::store<false>(O, i, sum);
}
// Without, for two O and X at once; exp(G_i) to `factors`, plain, if there are any.
[[maybe_unused]] static __device__ __noinline__ void exact_apply(const float* a, const float* s, float* O1, const float* X1, float* O2, const float* X2,
                                                                 float* factors) {
  const int i = RowSlots::row();
  float sum1[16], sum2[16], f[16], x[16];
#pragma unroll
  for (int m = 0; m < 16; ++m) sum1[m] = sum2[m] = 0.f, f[m] = 1.f;
  exact_back(i, [&](int j, bool before) {
    if (before) {
      const float b1 = X1[R_at(i, j)], b2 = X2[R_at(i, j)];
      float x[16];
      RowSlots::load<true>(x, s, j);
#pragma unroll
      for (int m = 0; m < 16; ++m) {
        const float decayed = f[m] * x[m];
        sum1[m] += b1 * decayed, sum2[m] += b2 * decayed;
      }
    }
    exact_multiply(f, a, j);
  });
  RowSlots::load<false>(x, O1, i);
#pragma unroll
  for (int m = 0; m < 16; ++m) sum1[m] += f[m] * x[m];
  RowSlots::store<false>(O1, i, sum1);
  RowSlots::load<false>(x, O2, i);
#pragma unroll
  for (int m = 0; m < 16; ++m) sum2[m] += f[m] * x[m];
  RowSlots::store<false>(O2, i, sum2);
  if (factors) RowSlots::store<true>(factors, i, f);
}

// contract; y in and out. f(j, A_ij) by all threads of the row, j from 63 down to 0, A_ij = 0 where j > i.
template <class F>
__device__ inline void exact_contract(float (&y)[16], const float* a, const float* s, F&& f) {
  const int i = RowSlots::row();
  auto next = [&](int j) {
    float x[16], sum[4] = {0.f, 0.f, 0.f, 0.f};
    RowSlots::load<true>(x, s, j);
#pragma unroll
    for (int m = 0; m < 16; ++m) sum[m % 4] += y[m] * x[m];
    exact_multiply(y, a, j);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  };
#pragma unroll 1
  for (int j = 63; j > (i | 7); --j) f(j, 0.f);
#pragma unroll 1
  for (int j = i | 7; j >= (i & ~7); --j) {
    const float sum = j <= i ? next(j) : 0.f;
    __syncwarp();
    f(j, quad_sum(sum));
  }
#pragma unroll 1
  for (int j = (i & ~7) - 1; j >= 0; j -= 2) {  // two at a time, before anything is stored
    float first = next(j), second = next(j - 1);
    first = quad_sum(first), second = quad_sum(second);
    f(j, first), f(j - 1, second);
  }
}
// Y becomes exp(G) Y.
[[maybe_unused]] static __device__ __noinline__ void exact_contract(const float* a, const float* s, float* Y, float* A) {
  const int i = RowSlots::row();
  float y[16];
  RowSlots::load<false>(y, Y, i);
  exact_contract(y, a, s, [&](int j, float x) {
    if (threadIdx.x % 4 == 0) A[R_at(i, j)] = x;
  });
  RowSlots::store<false>(Y, i, y);
}

// f(u), u from j + 1 on, where `decay` is exp(G_u - G_j); in the end it is exp(G_end - G_j).
template <class F>
__device__ inline void exact_inner(float (&decay)[16], const float* a, F&& f) {
  const int j = RowSlots::row();
#pragma unroll
  for (int m = 0; m < 16; ++m) decay[m] = 1.f;
#pragma unroll 1
  for (int u = (j & ~7) + 1; u < (j | 7) + 1; ++u)  // a warp's rows together
    if (u > j) exact_multiply(decay, a, u), f(u);
#pragma unroll 2
  for (int u = (j | 7) + 1; u < 64; ++u) exact_multiply(decay, a, u), f(u);
}

}  // namespace gsa::cuda::hopper
