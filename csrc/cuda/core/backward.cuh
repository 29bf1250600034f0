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

// S of half of the slots.
template <class E>
__device__ inline void strengths(float (&s)[4][4], const E* S, int half, int row) {
  const uint32_t S_row = place(S, row, frag_col()) ^ (half * 64);
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x = both_at<E>((S_row + h * 1024) ^ (t * 16));
      s[t][2 * h] = x.x, s[t][2 * h + 1] = x.y;
    }
}
// Write strengths, s = S R.
template <class E>
__device__ inline void strengths(float (&s)[4][4], const E* S, const float (&R)[4][4], int half, int row) {
  strengths(s, S, half, row);
  times(s, R);
}

// p = softmax(scale o1) over all shares, o1 = o + d s, dp + b s the cotangent of p; then e in the place of o, Yk R in that of dp, and Yv R in y:
//     Yk = scale p (dp - <p, dp>)        Yv = p        e = o1 Yk + p dp without their diagonals
// first: of the share's slots; M: how many there are. meet: all shares' threads. Rounded: a type that Yk R will be rounded to, and is in e: what of e and of inner
// (hopper_keys.cu) cancels in dg then does so to the last bit. Then o, dp and s are without R, too.
template <class Rounded = float, int SHARES, class Meet>
__device__ __forceinline__ void cotangents(float (&o)[4][4], float (&dp)[4][4], float (&y)[4][4], const float (&s)[4][4], const float (&R)[4][4],
                                           const float (&d)[2], const float (&b)[2], RowSums<SHARES>& sums, int share, int first, int M, float scale, int row,
                                           Meet&& meet) {
  constexpr bool rounds = !std::is_same_v<Rounded, float>;
  auto with_R = [&](float x, int t, int e) { return rounds ? x * R[t][e] : x; };
  float top[2], sum[2], dot[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = -INFINITY, sum[h] = dot[h] = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        y[t][e] = first + t * 8 < M ? with_R(fmaf(d[h], s[t][e], o[t][e]), t, e) * (scale * 1.4426950408889634f) : -INFINITY;
        top[h] = fmaxf(top[h], y[t][e]);
      }
    }
    top[h] = fmaxf(quad_max(top[h]), -1e30f);  // a share without slots
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e)
        y[t][e] = fast_exp2(y[t][e] - top[h]), sum[h] += y[t][e], dot[h] += y[t][e] * with_R(fmaf(b[h], s[t][e], dp[t][e]), t, e);
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
      const float prob = y[t][e], cotangent = scale * prob * (with_R(fmaf(b[e >> 1], s[t][e], dp[t][e]), t, e) - dot[e >> 1]);
      if constexpr (rounds) {
        const float Yk = cotangent * R[t][e], Yv = prob * R[t][e];
        o[t][e] = fmaf(o[t][e], to_float(from_float<Rounded>(Yk)), Yv * dp[t][e]);
        dp[t][e] = Yk, y[t][e] = Yv;
      } else {
        o[t][e] = fmaf(o[t][e], cotangent, prob * dp[t][e]);
        dp[t][e] = cotangent * R[t][e];
        y[t][e] = prob * R[t][e];
      }
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

// Of gates, pairs of slots of eight tokens from `row` on.
template <class E>
__device__ __forceinline__ void store_pairs(const View& v, const Rows& rows, const float2 (&x)[8], int row, int length, int slot) {
  auto store = [&]<class Pair>(Pair* to, auto&& pair) {
#pragma unroll
    for (int i = 0; i < 8; ++i, to += rows.step / 2)
      if (row + i < length) *to = pair(x[i]);
  };
  const int64_t first = rows.at(row) + slot;
  if (v.dtype == DType::f32) store(reinterpret_cast<float2*>(static_cast<float*>(v.ptr) + first), [](float2 y) { return y; });
  else store(reinterpret_cast<uint32_t*>(static_cast<E*>(v.ptr) + first), [](float2 y) { return pack<E>(y.x, y.y); });
}

// dg_t = sum_{u >= t} T_u + sum_{j < t} F_j + edge, and ds, of half of the slots of a bank, in fp32: a warp's 16 rows change hands in shared memory, so that a thread has two
// slots of eight tokens; then what the other threads' tokens come to. terms: room for two tiles; barrier: of this warpgroup. edge(slot): of a pair of slots;
// forgets(token, slot, dg): 0 in the place of those whose gate is a reset, which forgets whatever it would have changed. Where s is not given but 1 - exp(g), ds is exp(g) ds,
// and goes into dg.
template <class E, class ChunkOf, class Edge, class Forgets>
__device__ __forceinline__ void store_gate_gradients(const BackwardParams& p, ChunkOf&& chunk, int head, int bank, int half, const float (&T)[4][4],
                                                     const float (&F)[4][4], const float (&ds)[4][4], E* terms, int barrier, int warp, Edge&& edge,
                                                     Forgets&& forgets) {
  float *const tile = reinterpret_cast<float*>(terms), *const T_rows = tile + warp * 16 * 32,
               *const F_rows = T_rows + 64 * 32;  // [token][32], permuted by token % 4
  auto put_rows = [&](float* rows, const float (&x)[4][4]) {
    float* const to = rows + frag_row() * 32 + frag_col();
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) *reinterpret_cast<float2*>(to + h * 256 + ((t * 8) ^ ((frag_row() & 3) * 8))) = make_float2(x[t][2 * h], x[t][2 * h + 1]);
  };
  const int lower = lane_id() >> 4, column = (lane_id() & 15) * 2;
  auto get_rows = [&](float2(&x)[8], const float* rows) {
    const float* const from = rows + lower * 256;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const float2*>(from + i * 32 + (column ^ ((i & 3) * 8)));
  };
  auto plus = [](float2 x, float2 y) { return make_float2(x.x + y.x, x.y + y.y); };
  float2 dg[8], base;
  __syncwarp();
  put_rows(T_rows, T), put_rows(F_rows, F);
  __syncwarp();
  {
    float2 front[8], sum = make_float2(0.f, 0.f);
    get_rows(dg, T_rows), get_rows(front, F_rows);
    __syncwarp();
    put_rows(F_rows, ds);
#pragma unroll
    for (int i = 6; i >= 0; --i) dg[i] = plus(dg[i], dg[i + 1]);
    const float2 all = dg[0];
#pragma unroll
    for (int i = 0; i < 8; ++i) dg[i] = plus(dg[i], sum), sum = plus(sum, front[i]);
    const float2 T_other = make_float2(__shfl_xor_sync(0xffffffffu, all.x, 16), __shfl_xor_sync(0xffffffffu, all.y, 16));
    const float2 F_other = make_float2(__shfl_xor_sync(0xffffffffu, sum.x, 16), __shfl_xor_sync(0xffffffffu, sum.y, 16));
    base = lower ? F_other : T_other;
    *reinterpret_cast<float2*>(T_rows + lower * 32 + column) = lower ? plus(sum, F_other) : plus(all, T_other);  // of the warp
  }
  sync(barrier, 128);
  base = plus(base, edge(half * 32 + column));
#pragma unroll
  for (int w = 0; w < 4; ++w)
    if (w != warp) base = plus(base, *reinterpret_cast<const float2*>(tile + (w * 16 + (w < warp)) * 32 + column));
  const bool coupled = p.s.ptr == nullptr;
  const int row = warp * 16 + lower * 8, slot = bank * kSlots + half * 32 + column;
  float2 own[8];
  get_rows(own, F_rows);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    dg[i] = plus(dg[i], base);
    forgets(row + i, half * 32 + column, dg[i]);
    if (coupled) dg[i].x -= own[i].x, dg[i].y -= own[i].y;
  }
  if (slot >= p.M) return;
  const Chunk c = chunk();
  store_pairs<E>(p.dg, rows_of(p.dg, c, head), dg, row, c.length, slot);
  if (!coupled) store_pairs<E>(p.ds, rows_of(p.ds, c, head), own, row, c.length, slot);
}

}  // namespace gsa::cuda::hopper
