// Chunked backward for Hopper (sm_90a): everything in one kernel, one block for each sequence and query head, its chunks from the last to the first, the
// cotangents of its states in registers. Two warpgroups have the same form, one for the keys, one for the values:
//
//                            keys                                                    values
//     A, B, H                q, k, Hk                                                d_o, v, Hv               H before the chunk
//     scores (hopper.cuh)    o1 without the diagonal                                 dp without the diagonal
//     - exchange: each gets the other's scores -
//     Y                      scale R p (dp - <p, dp>)                                R p                      p = softmax(o1)
//     e                      o1 do1 + p dp, o1 and dp without the diagonal           -
//                            dq = tril(Y S^T) k + (Y exp(ref)) Hk^T
//     W^T = triu(S Y^T)      dk = W^T q + S E                                        dv = W^T d_o + S E       E = exp(G_end - ref) dH
//     inner                  strict triu(k q^T) Y / R                                strict triu(v d_o^T) Y / R
//     outer                  k E^T / R                                               v E^T / R
//     dH <-                  exp(ref) (E + Y^T q)                                    exp(ref) (E + Y^T d_o)   cotangent before the chunk
//
// and then, the sum of both sides:
//     ds_j = inner + outer + diagonal of (B A^T) Y / R
//     dg_t = sum_{u >= t} (e_u - s_u inner_u) + sum_{j < t} s_j outer_j + exp(G_end) <H, dH>     (products with triangles of ones)
// Neither e nor inner has the diagonal, and what comes from after the chunk is summed from the front: nothing large is left to cancel (chunk_backward.cu).
//
// What has to be more exact than 16 bits is an operand in two parts (16 + 16 bits): X in the scores, S, Y, W and E of the values, the terms of dg. A third warpgroup brings the tokens and the states and makes the windows (core/hopper.cuh).
//
//     shared memory                    written by     read by       barriers (full / free)
//     A, B, H [side], window           loader         each side     full / A_free, B_free, H_free [side], window_free
//     E [side]                         its side       its side      the warpgroup's own
//     exchange[2]: scores, then Y of the other side's reader, then ds or dg: both, behind barriers of 256
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D>
struct BackwardShared {
  E A[2][64 * D], B[2][64 * D], H[2][64 * D];
  E E0[2][64 * D], E1[64 * D];  // rounded; of the values, what rounding dropped
  Window<E> window;
  float exchange[2][kTile];
  typename GateMaker<E, 16>::Scratch scratch;
  float edge[2][kSlots], diagonal[64], decay[kSlots];
  uint64_t full, window_free, A_free[2], B_free[2], H_free[2];
};

// Where a side's gradients go: tensors, or, with several query heads to a key/value head, fp32 parts of the workspace.
struct Gradients {
  View dx[2], ds, dg;  // dk, dv; ds, dg
  float* dh0[2];  // [N, heads, ...] or nullptr
  bool parts;
};

[[maybe_unused]] constexpr int kBoth = 4;  // the barrier of both sides

template <class E>
__device__ inline void store_pair(const View& v, int64_t i, float x, float y) {
  if (v.dtype == DType::f32) *reinterpret_cast<float2*>(static_cast<float*>(v.ptr) + i) = make_float2(x, y);
  else *reinterpret_cast<uint32_t*>(static_cast<E*>(v.ptr) + i) = pack<E>(x, y);
}

// Ones where u >= t (upper) or u < t, row t of the warp's 16: an operand.
template <class E, bool upper>
__device__ inline typename Arith<E>::template Op<64> triangle_of_ones(int warp) {
  typename Arith<E>::template Op<64> a;
  const uint32_t one = pack<E>(1.f, 1.f), low = one & 0xffffu;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int d = (i >> 1) * 8 - (i & 1) * 8 + frag_col() - frag_row();  // u - t on the diagonal block
    const uint32_t both = d >= 0 ? one : d == -1 ? one & ~low : 0u;
#pragma unroll
    for (int k = 0; k < 4; ++k) a.r[k][i] = k == warp ? (upper ? both : both ^ one) : (k > warp) == upper ? one : 0u;
  }
  return a;
}

template <int NT>
__device__ inline void put(float* exchange, const float (&x)[NT][4], int tid) {
#pragma unroll
  for (int t = 0; t < NT; ++t) reinterpret_cast<float4*>(exchange)[t * 128 + tid] = make_float4(x[t][0], x[t][1], x[t][2], x[t][3]);
}
[[maybe_unused]] __device__ inline float4 got(const float* exchange, int t, int tid) { return reinterpret_cast<const float4*>(exchange)[t * 128 + tid]; }

// acc to rows begin .. end - 1: a gradient, or an fp32 part of one.
template <class E>
__device__ inline void store_gradient(const View& v, const Rows& out, const float (&x)[8][4], int warp, int begin, int end, int d0) {
  if (v.dtype != DType::f32) return store_window<E>(out, x, warp, begin, end, d0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + frag_row() + 8 * h;
    float* to = kept(static_cast<float*>(const_cast<void*>(out.ptr)) + out.at(row) + d0 + frag_col());
    if (row >= begin && row < end)
#pragma unroll
      for (int t = 0; t < 8; ++t) *reinterpret_cast<float2*>(to + t * 8) = make_float2(x[t][2 * h], x[t][2 * h + 1]);
  }
}

// Both sides run the same instructions (two copies would not fit the instruction cache); `values` says which side this warpgroup is.
template <class E, int D>
__device__ __forceinline__ void backward_side(const BackwardParams& p, const Gradients& to, BackwardShared<E, D>& m, Chunk c, int64_t n, int64_t head,
                                              int64_t q_head, const int values) {
  constexpr int NT = D / 8;
  const int own = 2 + values;  // barrier of this warpgroup
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = frag_col();
  const int r = p.HQ / p.H;
  const bool coupled = p.s.ptr == nullptr;
  const E *A = m.A[values], *B = m.B[values];
  E *H = m.H[values], *E0 = m.E0[values], *E1 = m.E1;
  const Window<E>& w = m.window;
  float* const mine = m.exchange[values];  // what this side leaves for the other
  float* const theirs = m.exchange[!values];
  E *Y0 = reinterpret_cast<E*>(theirs), *Y1 = Y0 + kTile;  // read by nobody else once this side has its scores

  float dH[NT][4];
  {
    const float* in = static_cast<const float*>(values ? p.dhvT : p.dhkT);
    if (in && !(to.parts && q_head % r)) load_registers(dH, in + (n * p.H + head) * D * p.M, values, D, p.M, warp);
    else zero(dH);
  }
  uint32_t parity = 0;
#pragma unroll 1
  for (int64_t i = c.seq.chunks - 1; i >= 0; --i) {
    c.select(p, i, kChunk);
#pragma unroll 1
    for (bool first = false; !first; parity ^= 1) {
      wait(&m.full, parity);
      first = w.begin == 0;
      const int begin = w.begin, end = w.end;
      if (begin > 0) {  // the state before this window
#pragma unroll 1
        for (int d0 = 0; d0 < D; d0 += 64) {
          float x[8][4];
          hand_over(x);
          products_begin();
          product<E, 4, 1, 1>(x, mnmajor(B + d0 * 64), mnmajor(m.exchange[0]), false);
          products_commit();
          products_wait<0>();
          hand_over(x);
#pragma unroll
          for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int slot = t * 8 + col, d = d0 + row + 8 * h;
              const float2 before = pair_at<E>(address(at(H, d, slot))), f = *reinterpret_cast<const float2*>(m.decay + slot);
              *reinterpret_cast<uint32_t*>(at(H, d, slot)) = pack<E>(before.x * f.x + x[t][2 * h], before.y * f.y + x[t][2 * h + 1]);
            }
        }
        publish();
        sync(kBoth, 256);
      }

      scale_rows(dH, w.out[row], w.out[row + 8]);  // E
#pragma unroll
      for (int g = 0; g < D / 64; ++g) {
        float x[8][4];
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) x[t][e] = dH[g * 8 + t][e];
        if (values) {
          const auto X = split<E>(x);
          store_operand<E>(E0 + g * kTile, X.hi, warp);
          store_operand<E>(E1 + g * kTile, X.lo, warp);
        } else {
          store_operand<E>(E0 + g * kTile, operand<E>(x), warp);
        }
      }
      publish();

      // o: scores without the diagonal; d s: the diagonal of theirs.
      float o[8][4], y[8][4], d[2];
      scores<E, D, false>(o, d, A, B, H, w, warp);
      float s[8][4];
      {
        const float* R = w.R + row * ldr + col;
        const uint32_t S_row = place(w.S[0], row, col);
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), f = *reinterpret_cast<const float2*>(R + h * 8 * ldr + t * 8);
            o[t][2 * h] *= f.x, o[t][2 * h + 1] *= f.y;
            s[t][2 * h] = S.x * f.x, s[t][2 * h + 1] = S.y * f.y;
          }
      }
      if (values) {  // dp without the diagonal, the diagonal apart
        put(mine, o, tid);
        if ((lane_id() & 3) == 0) m.diagonal[row] = d[0], m.diagonal[row + 8] = d[1];
      } else {  // o1, whole
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) y[t][e] = fmaf(d[e >> 1], s[t][e], o[t][e]);
        put(mine, y, tid);
      }
      sync(kBoth, 256);
      if (values) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const float4 x = got(theirs, t, tid);
          y[t][0] = x.x, y[t][1] = x.y, y[t][2] = x.z, y[t][3] = x.w;
        }
      }
      softmax(y, static_cast<float>(p.scale) * 1.4426950408889634f, p.M);
      if (!values) {
        const float b[2] = {m.diagonal[row], m.diagonal[row + 8]}, scale = static_cast<float>(p.scale);
        float dot[2] = {0.f, 0.f};
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const float4 dp = got(theirs, t, tid);
          dot[0] += y[t][0] * fmaf(b[0], s[t][0], dp.x) + y[t][1] * fmaf(b[0], s[t][1], dp.y);
          dot[1] += y[t][2] * fmaf(b[1], s[t][2], dp.z) + y[t][3] * fmaf(b[1], s[t][3], dp.w);
        }
        dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const float4 x = got(theirs, t, tid);
          const float dp[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float prob = y[t][e];
            y[t][e] = scale * prob * (fmaf(b[e >> 1], s[t][e], dp[e]) - dot[e >> 1]);
            o[t][e] = fmaf(o[t][e], y[t][e], prob * dp[e]);  // e
          }
        }
      } else {
        zero(o);  // e is the keys'
      }
      scale_by_R(y, w, warp);
      sync(own, 128);  // everybody has read `theirs`
      {
        const auto Y = split<E>(y);
        store_operand<E>(Y0, Y.hi, warp);
        store_operand<E>(Y1, Y.lo, warp);
      }
      publish();
      sync(own, 128);

      if (!values) {  // dq
        scale_columns(y, w.in);
        const auto Yref = operand<E>(y);
        float x[8][4];
        hand_over(x);
        products_begin();
        product<E, 4, 0, 0>(x, kmajor(Y0), kmajor(w.S[0]), false);
        product<E, 4, 0, 0>(x, kmajor(Y1), kmajor(w.S[0]), true);
        product<E, 4, 0, 0>(x, kmajor(Y0), kmajor(w.S[1]), true);
        products_commit();
        products_wait<0>();
        hand_over(x);
        keep<true, 0>(x, warp);
        const auto dA1 = operand<E>(x);
#pragma unroll 1
        for (int g = 0; g < D / 64; ++g) {
          float dq[8][4];
          zero(dq);
          hand_over(dq);
          products_begin();
          product<E, 1>(dq, dA1, mnmajor(B + g * kTile));
          product<E, 0>(dq, Yref, kmajor(H + g * kTile));
          products_commit();
          products_wait<0>();
          hand_over(dq);
          store_window<E>(rows_of(p.dq, c, q_head), dq, warp, begin, end, g * 64);
        }
      }
      {  // exp(G_end) <H, dH> of every slot
        float sum[2] = {0.f, 0.f};
        const int l = lane_id();
        const uint32_t H_row = place(H, (l & 7) + (l >> 4) * 8, 0) ^ ((warp * 2 + ((l >> 3) & 1)) * 16);
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
          uint32_t h[4];
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                       : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
                       : "r"(H_row + t * 1024)
                       : "memory");
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const E* e = reinterpret_cast<const E*>(&h[x]);
            const float (&g)[4] = dH[t + (x >> 1)];
            sum[x & 1] += to_float(e[0]) * g[(x & 1) * 2] + to_float(e[1]) * g[(x & 1) * 2 + 1];
          }
        }
        sum[0] = quad_sum(sum[0]) * w.in[row], sum[1] = quad_sum(sum[1]) * w.in[row + 8];
        if ((l & 3) == 0) m.edge[values][row] = sum[0], m.edge[values][row + 8] = sum[1];
        arrive_warp(&m.H_free[values]);
      }
      {  // dk or dv
        float x[8][4];
        hand_over(x);
        products_begin();
        product<E, 4, 0, 0>(x, kmajor(w.S[0]), kmajor(Y0), false);
        product<E, 4, 0, 0>(x, kmajor(w.S[1]), kmajor(Y0), true);
        product<E, 4, 0, 0>(x, kmajor(w.S[0]), kmajor(Y1), true);
        products_commit();
        products_wait<0>();
        hand_over(x);
        keep<false, 0>(x, warp);
        const auto W = split<E>(x);
#pragma unroll 1
        for (int g = 0; g < D / 64; ++g) {
          float dx[8][4];
          hand_over(dx);
          products_begin();
          product<E, 4, 0, 1>(dx, kmajor(w.S[0]), mnmajor(E0 + g * kTile), false);
          product<E, 4, 0, 1>(dx, kmajor(w.S[1]), mnmajor(E0 + g * kTile), true);
          product<E, 1>(dx, W.hi, mnmajor(A + g * kTile));
          if (values) {
            product<E, 4, 0, 1>(dx, kmajor(w.S[0]), mnmajor(E1 + g * kTile), true);
            product<E, 1>(dx, W.lo, mnmajor(A + g * kTile));
          }
          products_commit();
          products_wait<0>();
          hand_over(dx);
          store_gradient<E>(to.dx[values], rows_of(to.dx[values], c, to.parts ? q_head : head), dx, warp, begin, end, g * 64);
        }
      }
      // dH, and the rest of ds
      float inner[8][4], outer[8][4];
      {
        float x[8][4];
        hand_over(dH);
        hand_over(x);
        products_begin();
        product<E, D / 16, 0, 0>(x, kmajor(B), kmajor(A), false);
        products_commit();
        product<E, 4, 1, 1>(dH, mnmajor(Y0), mnmajor(A), true);
        product<E, 4, 1, 1>(dH, mnmajor(Y1), mnmajor(A), true);
        products_commit();
        products_wait<1>();
        hand_over(x);
        keep<false, 1>(x, warp);
        const auto X = split<E>(x);
        products_wait<0>();
        hand_over(dH);
        if (first) arrive_warp(&m.A_free[values]);
        scale_rows(dH, w.in[row], w.in[row + 8]);
        zero(inner);
        hand_over(inner);
        hand_over(outer);
        products_begin();
        product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(E0), false);
        if (values) product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(E1), true);
        product<E, 1>(inner, X.hi, mnmajor(Y0));
        product<E, 1>(inner, X.lo, mnmajor(Y0));
        product<E, 1>(inner, X.hi, mnmajor(Y1));
        products_commit();
        products_wait<0>();
        hand_over(inner);
        hand_over(outer);
        if (first) arrive_warp(&m.B_free[values]);
      }

      // ds in the place of outer, dg's sums from the back in that of o, from the front in that of inner
      {
        const float* R = w.R + row * ldr + col;
        const uint32_t S_row = place(w.S[0], row, col), Y_row = place(Y0, row, col);
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), Y = both_at<E>((Y_row + h * 1024) ^ (t * 16));
            const float2 f = *reinterpret_cast<const float2*>(R + h * 8 * ldr + t * 8);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int k = 2 * h + e;
              const float in = inner[t][k], out = outer[t][k];
              outer[t][k] = __fdividef(in + out + d[h] * (e ? Y.y : Y.x), e ? f.y : f.x);  // outside the window: not stored
              o[t][k] -= (e ? S.y : S.x) * in;
              inner[t][k] = (e ? S.y : S.x) * out;
            }
          }
      }
      float dg[8][4];
      zero(dg);
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        sync(own, 128);  // what the tiles held is done with
        const auto T = split<E>(o);
        store_operand<E>(Y0, T.hi, warp);
        store_operand<E>(Y1, T.lo, warp);
        publish();
        sync(own, 128);
        auto ones = triangle_of_ones<E, true>(warp);
        if (side) ones = triangle_of_ones<E, false>(warp);
        hand_over(dg);
        products_begin();
        product<E, 1>(dg, ones, mnmajor(Y0));
        product<E, 1>(dg, ones, mnmajor(Y1));
        products_commit();
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[t][e] = inner[t][e];
        products_wait<0>();
        hand_over(dg);
      }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float2 edge = *reinterpret_cast<const float2*>(m.edge[values] + t * 8 + col);
        dg[t][0] += edge.x, dg[t][1] += edge.y, dg[t][2] += edge.x, dg[t][3] += edge.y;
      }
      if (row == begin || row + 8 == begin)  // a reset forgets whatever the gate would have changed
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (row + 8 * (e >> 1) == begin && w.start[t * 8 + col + (e & 1)] == 0.f) dg[t][e] = 0.f;
      if (coupled) {  // s = 1 - exp(g)
        const float* R = w.R + row * ldr + col;
        const uint32_t S_row = place(w.S[0], row, col);
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), f = *reinterpret_cast<const float2*>(R + h * 8 * ldr + t * 8);
            dg[t][2 * h] -= (1.f - S.x * f.x) * outer[t][2 * h], dg[t][2 * h + 1] -= (1.f - S.y * f.y) * outer[t][2 * h + 1];
          }
      }
      sync(kBoth, 256);  // both are done with the exchange
      // The keys' side writes dg, the values' ds: each gives the other its part.
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        float (&give)[4] = outer[t], (&have)[4] = dg[t];
        if (values)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = give[e];
            give[e] = have[e], have[e] = x;
          }
      }
      put(mine, outer, tid);
      sync(kBoth, 256);
      if (!values || !coupled) {
        const View& out = values ? to.ds : to.dg;
        const Rows rows = rows_of(out, c, to.parts ? q_head : head);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int j = row + 8 * h;
          const int64_t first = rows.at(j) + col;
          if (j >= begin && j < end)
#pragma unroll
            for (int t = 0; t < 8; ++t) {
              const float2 x = *reinterpret_cast<const float2*>(theirs + (t * 128 + tid) * 4 + 2 * h);
              if (t * 8 < p.M) store_pair<E>(out, first + t * 8, dg[t][2 * h] + x.x, dg[t][2 * h + 1] + x.y);
            }
        }
      }
      sync(kBoth, 256);  // both have read it
      arrive_warp(&m.window_free);
    }
  }
  if (to.dh0[values]) store_registers(to.dh0[values] + (to.parts ? n * p.HQ + q_head : n * p.H + head) * D * p.M, dH, values, D, p.M, warp);
}

template <class E, int D>
__global__ __launch_bounds__(384, 1) void backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Gradients to, const E* boundary) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<BackwardShared<E, D>*>(memory);
  const int64_t q_head = blockIdx.x % p.HQ, n = blockIdx.x / p.HQ, head = q_head / (p.HQ / p.H);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    init(&m.full, 128), init(&m.window_free, 8);
    for (int i = 0; i < 2; ++i) init(m.A_free + i, 4), init(m.B_free + i, 4), init(m.H_free + i, 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Chunk c;
  c.seq = sequence<false>(p, n, kChunk);

  if (role == 0) {
    give_registers<104>();
    GateMaker<E, 16> gates(m.scratch, tid, 1);
    uint32_t chunk_parity = 1, parity = 1;  // of what is free
    for (int64_t i = c.seq.chunks - 1; i >= 0; --i, chunk_parity ^= 1) {
      c.select(p, i, kChunk);
      uint64_t starts = 0;
      for (int end = c.length; end > 0;) {
        gates.load(p, c, head);
        const int begin = starts ? 63 - __clzll(starts & (end == 64 ? ~0ull : (1ull << end) - 1)) : 0;
        float before[2], total[2];
        gates.sums(begin, end, before, total);
        if (!starts) {
          starts = gates.safe(total) ? 1 : gates.cut(c.length);
          if (starts != 1) continue;
        }
        for (int side = 0; side < 2; ++side) {
          wait(m.H_free + side, parity);
          load_state<D>(m.H[side], boundary + ((c.slot * p.H + head) * 2 + side) * int64_t(D) * p.M, p.M, tid);
        }
        if (begin > 0) {
          wait(&m.window_free, parity);
          Advance<E>{reinterpret_cast<E*>(m.exchange[0]), m.decay}.write(gates, begin);
        }
        gates.make(begin, end, before, total);
        if (end == c.length) {
#pragma unroll 1
          for (int side = 0; side < 4; ++side) {  // q, d_o, k, v
            wait(side & 2 ? m.B_free + (side & 1) : m.A_free + (side & 1), chunk_parity);
            const View& x = side & 2 ? (side & 1 ? p.v : p.k) : side & 1 ? p.d_o : p.q;
            load_tokens<D, 128>(side & 2 ? m.B[side & 1] : m.A[side & 1], rows_of(x, c, side & 2 ? head : q_head), c.length, tid);
          }
        }
        cp_async_commit();
        wait(&m.window_free, parity);
        if (tid == 0) m.window.begin = begin, m.window.end = end;
        gates.store(m.window, total);
        cp_async_wait_for<0>();
        publish();
        arrive(&m.full);
        parity ^= 1;
        end = begin;
      }
    }
    return;
  }
  take_registers<200>();
  backward_side<E, D>(p, to, m, c, n, head, q_head, role - 1);
#endif
}

// out[row, head] = the sum of its group's parts [row, q head], `size` values each.
template <class E>
__global__ void sum_parts(const float* parts, View out, int64_t rows, int64_t T, int H, int r, int64_t size) {
  const int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * 2, each = int64_t(H) * size;
  if (i >= rows * each) return;
  const int64_t row = i / each, head = i % each / size, x = i % size;
  float2 sum = make_float2(0.f, 0.f);
  for (int q = 0; q < r; ++q) {
    const float2 y = *reinterpret_cast<const float2*>(parts + (row * H + head) * r * size + q * size + x);
    sum.x += y.x, sum.y += y.y;
  }
  store_pair<E>(out, row / T * out.batch + row % T * out.token + head * out.head + x, sum.x, sum.y);
}

// What lies in the workspace: the states where they were not kept, and the parts of the query heads.
struct Plan {
  int64_t boundary = 0, dx[2] = {}, ds = 0, dg = 0, dh0[2] = {}, bytes = 0;
  explicit Plan(const Params& p) {
    auto take = [&](int64_t n) {
      const int64_t at = bytes;
      bytes += (n + 255) / 256 * 256;
      return at;
    };
    if (!p.boundary) boundary = take(boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H * (p.K + p.V) * p.M * 2);
    if (p.HQ == p.H) return;
    const int64_t rows = p.B * p.T * p.HQ * 4;
    dx[0] = take(rows * p.K), dx[1] = take(rows * p.V);
    dg = take(rows * p.M);
    if (p.s.ptr) ds = take(rows * p.M);
    if (p.hk0)
      for (int64_t& x : dh0) x = take(p.N * p.HQ * p.K * p.M * 4);
  }
};

}  // namespace

int64_t hopper_backward_workspace(const Params& p) { return Plan(p).bytes; }

void hopper_backward(const BackwardParams& p) {
  const Plan plan(p);
  char* base = static_cast<char*>(p.workspace);
  const void* boundary = p.boundary;
  if (!boundary) {
    ForwardParams f{};
    static_cast<Params&>(f) = p;
    hopper_forward(f, base + plan.boundary);
    boundary = base + plan.boundary;
  }
  const int r = p.HQ / p.H;
  Gradients to{{p.dk, p.dv}, p.ds, p.dg, {static_cast<float*>(p.dhk0), static_cast<float*>(p.dhv0)}, r > 1};
  auto part = [&](int64_t at, int64_t size) { return View{base + at, p.T * p.HQ * size, p.HQ * size, size, DType::f32}; };
  if (to.parts) {
    to.dx[0] = part(plan.dx[0], p.K), to.dx[1] = part(plan.dx[1], p.V), to.dg = part(plan.dg, p.M);
    if (p.s.ptr) to.ds = part(plan.ds, p.M);
    for (int i = 0; i < 2; ++i)
      if (to.dh0[i]) to.dh0[i] = reinterpret_cast<float*>(base + plan.dh0[i]);
  }
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_backward", backward_kernel<E, D>, p.N * p.HQ, 384, sizeof(BackwardShared<E, D>), p.stream, p, to, static_cast<const E*>(boundary));
  });
  if (!to.parts) return;
  const auto kernel = p.q.dtype == DType::bf16 ? sum_parts<bf16> : sum_parts<half>;
  auto sum = [&](const View& parts, const View& out, int64_t rows, int64_t T, int64_t size) {
    launch("sum_parts", kernel, ceil_div(rows * p.H * size / 2, 256), 256, 0, p.stream, static_cast<const float*>(parts.ptr), out, rows, T, int(p.H), r, size);
  };
  sum(to.dx[0], p.dk, p.B * p.T, p.T, p.K);
  sum(to.dx[1], p.dv, p.B * p.T, p.T, p.V);
  sum(to.dg, p.dg, p.B * p.T, p.T, p.M);
  if (p.s.ptr) sum(to.ds, p.ds, p.B * p.T, p.T, p.M);
  void* dh0[2] = {p.dhk0, p.dhv0};
  for (int i = 0; i < 2; ++i)
    if (dh0[i]) {
      const int64_t size = int64_t(p.K) * p.M;
      sum(View{to.dh0[i]}, View{dh0[i], p.H * size, 0, size, DType::f32}, p.N, 1, size);
    }
}

}  // namespace gsa::cuda
