// What the warpgroups of backward share. The queries' half of a chunk, from o1 and dp to Y, for two warpgroups a bank: one has made o1, the other dp, of all its slots; from here on each has both
// of 32 slots. And the end of it, from the terms of dg. For hopper_queries.cu, hopper_keys.cu and hopper_walk.cu.
#pragma once
#include "exact.cuh"

namespace gsa::cuda::hopper {

// Sums of rows over the slots that each warpgroup has, its share.
template <int SHARES>
struct RowSums {
  float top[SHARES][64], sum[SHARES][64], dot[SHARES][64];
};

// The half of x that is the other warpgroup's, as accumulators lie.
__device__ inline void give_half(float* to, const float (&x)[8][4], int half, int tid) {
  float4* const to4 = reinterpret_cast<float4*>(to) + tid;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float (&mine)[4] = x[t], (&theirs)[4] = x[t + 4];
    to4[t * 128] = half ? make_float4(mine[0], mine[1], mine[2], mine[3]) : make_float4(theirs[0], theirs[1], theirs[2], theirs[3]);
  }
}
// After a barrier: o, which the first has made, and dp, the second.
__device__ inline void take_half(float (&o)[4][4], float (&dp)[4][4], const float (&x)[8][4], const float* from, int half, int tid) {
  const float4* const from4 = reinterpret_cast<const float4*>(from) + tid;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 y = from4[t * 128];
    const float got[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float kept_back = half ? x[t + 4][e] : x[t][e];
      o[t][e] = half ? got[e] : kept_back, dp[t][e] = half ? kept_back : got[e];
    }
  }
}

// Write strengths of half of the slots, s = S R.
template <class E>
__device__ inline void strengths(float (&s)[4][4], const E* S, const float (&R)[4][4], int half, int row) {
  const uint32_t S_row = place(S, row, frag_col()) ^ (half * 64);
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x = both_at<E>((S_row + h * 1024) ^ (t * 16));
      s[t][2 * h] = x.x * R[t][2 * h], s[t][2 * h + 1] = x.y * R[t][2 * h + 1];
    }
}

// p = softmax(scale o1) over all shares, o1 = o + d s, dp + b s the cotangent of p; then e in the place of o, Yk R in that of dp, and Yv R in y:
//     Yk = scale p (dp - <p, dp>)        Yv = p        e = o1 Yk + p dp without their diagonals
// first: of the share's slots; M: how many there are. meet: all shares' threads.
template <int SHARES, class Meet>
__device__ __forceinline__ void cotangents(float (&o)[4][4], float (&dp)[4][4], float (&y)[4][4], const float (&s)[4][4], const float (&R)[4][4],
                                           const float (&d)[2], const float (&b)[2], RowSums<SHARES>& sums, int share, int first, int M, float scale, int row,
                                           Meet&& meet) {
  float top[2], sum[2], dot[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = -INFINITY, sum[h] = dot[h] = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        y[t][e] = first + t * 8 < M ? fmaf(d[h], s[t][e], o[t][e]) * (scale * 1.4426950408889634f) : -INFINITY;
        top[h] = fmaxf(top[h], y[t][e]);
      }
    }
    top[h] = fmaxf(quad_max(top[h]), -1e30f);  // a share without slots
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) y[t][e] = fast_exp2(y[t][e] - top[h]), sum[h] += y[t][e], dot[h] += y[t][e] * fmaf(b[h], s[t][e], dp[t][e]);
    sum[h] = quad_sum(sum[h]), dot[h] = quad_sum(dot[h]);
    if ((lane_id() & 3) == 0) sums.top[share][row + 8 * h] = top[h], sums.sum[share][row + 8 * h] = sum[h], sums.dot[share][row + 8 * h] = dot[h];
  }
  meet();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h;
    float all = top[h];
#pragma unroll
    for (int x = 1; x < SHARES; ++x) all = fmaxf(all, sums.top[share ^ x][i]);
    const float mine = fast_exp2(top[h] - all);
    sum[h] *= mine, dot[h] *= mine;
#pragma unroll
    for (int x = 1; x < SHARES; ++x) {
      const float theirs = fast_exp2(sums.top[share ^ x][i] - all);
      sum[h] += sums.sum[share ^ x][i] * theirs, dot[h] += sums.dot[share ^ x][i] * theirs;
    }
    const float inv = 1.f / sum[h], f = mine * inv;
    dot[h] *= inv;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) y[t][e] *= f;
  }
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float prob = y[t][e], cotangent = scale * prob * (fmaf(b[e >> 1], s[t][e], dp[t][e]) - dot[e >> 1]);
      o[t][e] = fmaf(o[t][e], cotangent, prob * dp[t][e]);
      dp[t][e] = cotangent * R[t][e];
      y[t][e] = prob * R[t][e];
    }
}

// Four numbers to memory; or, always by the same thread, added to what is there.
__device__ inline void save_four(float4* to, const float (&x)[4], bool first) {
  if (first) *to = make_float4(x[0], x[1], x[2], x[3]);
  else asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// e of half of the slots of a bank to memory, as accumulators lie; or, always the same thread, added to what is there.
__device__ inline void save_e(float* tile, const float (&e)[4][4], bool first, int half, int tid) {
  float4* const to = reinterpret_cast<float4*>(tile) + half * 512 + tid;
  if (first) {
#pragma unroll
    for (int t = 0; t < 4; ++t) save_four(to + t * 128, e[t], true);
  } else {
#pragma unroll
    for (int t = 0; t < 4; ++t) save_four(to + t * 128, e[t], false);
  }
}

// Half of Yk or Yv into the tile of a bank and what rounding drops into the one after it.
template <class E>
__device__ inline void store_half(E* tile, const float (&x)[4][4], int half, int warp) {
  const auto X = split<E>(x);
  store_operand<E>(tile, X.hi, warp, half * 32);
  store_operand<E>(tile + kTile, X.lo, warp, half * 32);
}

// Half of the slots of a bank, from `first` on, of tokens 0 .. length - 1.
template <class E>
__device__ __forceinline__ void store_gates(const View& v, const Rows& rows, const float (&x)[4][4], int row, int length, int first, int M) {
  auto store = [&](auto&& pair) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t to = rows.at(row + 8 * h) + first + frag_col();
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (row + 8 * h < length && first + t * 8 < M) pair(to + t * 8, x[t][2 * h], x[t][2 * h + 1]);
    }
  };
  if (v.dtype == DType::f32) store([&](int64_t i, float a, float b) { *reinterpret_cast<float2*>(static_cast<float*>(v.ptr) + i) = make_float2(a, b); });
  else store([&](int64_t i, float a, float b) { *reinterpret_cast<uint32_t*>(static_cast<E*>(v.ptr) + i) = pack<E>(a, b); });
}

// dg_t = sum_{u >= t} T_u + sum_{j < t} F_j + edge, and ds, of half of the slots of a bank; each by products of two parts of the terms with triangles of ones. terms: room
// for two tiles; barrier: of this warpgroup. edge(t, e), forgets(row, t, k): whether the gate is a reset, which forgets whatever it would have changed. Where s is not given
// but 1 - exp(g), ds is exp(g) ds, and goes into dg.
template <class E, class ChunkOf, class Edge, class Forgets>
__device__ __forceinline__ void store_gate_gradients(const BackwardParams& p, ChunkOf&& chunk, int head, int bank, int half, const float (&T)[4][4],
                                                     const float (&F)[4][4], const float (&ds)[4][4], E* terms, int barrier, int warp, Edge&& edge,
                                                     Forgets&& forgets) {
  E *const T_tile = terms, *const F_tile = terms + kTile;  // the two parts side by side
  {
    auto X = split<E>(T);
    store_operand<E>(T_tile, X.hi, warp), store_operand<E>(T_tile, X.lo, warp, 32);
    X = split<E>(F);
    store_operand<E>(F_tile, X.hi, warp), store_operand<E>(F_tile, X.lo, warp, 32);
  }
  publish();
  sync(barrier, 128);
  float dg[4][4], edges[4][2];
  zero(dg);
  hand_over(dg);
  products_begin();
  {
    const auto ones = triangle_of_ones<E, true>(warp);
    product<E, 1>(dg, ones, mnmajor(T_tile));
    product<E, 1>(dg, ones, mnmajor(T_tile + 32));
  }
  {
    const auto ones = triangle_of_ones<E, false>(warp);
    product<E, 1>(dg, ones, mnmajor(F_tile));
    product<E, 1>(dg, ones, mnmajor(F_tile + 32));
  }
  products_commit();
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) edges[t][e] = edge(t, e);
  products_wait<0>();
  hand_over(dg);
  const bool coupled = p.s.ptr == nullptr;
  const int row = warp * 16 + frag_row(), first = bank * kSlots + half * 32;
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      dg[t][k] += edges[t][k & 1];
      if (forgets(row + k / 2 * 8, t, k)) dg[t][k] = 0.f;
      if (coupled) dg[t][k] -= ds[t][k];
    }
  const Chunk c = chunk();
  store_gates<E>(p.dg, rows_of(p.dg, c, head), dg, row, c.length, first, p.M);
  if (!coupled) store_gates<E>(p.ds, rows_of(p.ds, c, head), ds, row, c.length, first, p.M);
}

}  // namespace gsa::cuda::hopper
