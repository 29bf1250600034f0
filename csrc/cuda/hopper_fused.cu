// Chunked backward for Hopper (sm_90a), what hopper_walk.cu leaves out: sequences and heads that have a chunk of several windows. One block for each, its chunks from the
// last to the first and in each its windows, the cotangents of the states in registers; nothing but inputs, boundary states and gradients in memory. Two warpgroups have the same form, one for the keys, one for the values:
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
// What has to be more exact than 16 bits is an operand in two parts (16 + 16 bits): X in the scores, S, Y, W and E of the values, the terms of dg. A third warpgroup
// brings the tokens and the states and makes the windows (core/hopper.cuh).
//
//     shared memory                    written by     read by       barriers (full / free)
//     A, B, H [side], window           loader         each side     full / A_free, B_free, H_free [side], window_free; exchange_free, where it makes a window's
//                                                                   state from the chunk's in the exchange
//     E [side]                         its side       its side      the warpgroup's own
//     exchange[2]: scores, then Y of the other side's reader, then ds or dg: both, behind barriers of 256
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D>
struct FusedShared {
  E A[2][64 * D], B[2][64 * D], H[2][64 * D];
  E E0[2][64 * D], E1[64 * D];  // rounded; of the values, what rounding dropped
  Window<E> window;
  float exchange[2][kTile];
  typename GateMaker<E, 16>::Scratch scratch;
  float edge[2][kSlots], diagonal[64], decay[kSlots];
  uint64_t full, window_free, exchange_free, A_free[2], B_free[2], H_free[2];
  int found;
};

[[maybe_unused]] constexpr int kBoth = 4;  // the barrier of both sides

[[maybe_unused]] __device__ inline float4 got(const float* exchange, int t, int tid) { return reinterpret_cast<const float4*>(exchange)[t * 128 + tid]; }

// Both sides run the same instructions (two copies would not fit the instruction cache); `values` says which side this warpgroup is.
template <class E, int D>
__device__ __forceinline__ void fused_side(const BackwardParams& p, FusedShared<E, D>& m, Chunk c, int64_t n, int64_t head, const int values) {
  constexpr int NT = D / 8;
  const int own = 2 + values;  // barrier of this warpgroup
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = frag_col();
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
    if (in) load_registers(dH, in + (n * p.H + head) * D * p.M, values, D, p.M, warp);
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
        for (int d = warp * 16; d < D; d += 64) Advance<E>{reinterpret_cast<E*>(m.exchange[0]), m.decay}.apply(H, B, d);
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
      scores<E, D, false>(o, d, A, B, H, w.S[0], w.in, warp);
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
          store_window<E>(rows_of(p.dq, c, head), dq, warp, begin, end, g * 64);
        }
      }
      {  // exp(G_end) <H, dH> of every slot
        float sum[2];
        state_products(sum, H, dH, warp);
        sum[0] *= w.in[row], sum[1] *= w.in[row + 8];
        if ((lane_id() & 3) == 0) m.edge[values][row] = sum[0], m.edge[values][row + 8] = sum[1];
        arrive(&m.H_free[values]);
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
          store_window<E>(rows_of(values ? p.dv : p.dk, c, head), dx, warp, begin, end, g * 64);
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
        if (first) arrive(&m.A_free[values]);
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
        if (first) arrive(&m.B_free[values]);
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
      arrive(&m.window_free);
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
        const View& out = values ? p.ds : p.dg;
        const Rows rows = rows_of(out, c, head);
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
      arrive(&m.exchange_free);
    }
  }
  if (float* out = static_cast<float*>(values ? p.dhv0 : p.dhk0)) store_registers(out + (n * p.H + head) * D * p.M, dH, values, D, p.M, warp);
}

// packed: sequences of several lengths. In a kernel of its own: finding the longest costs registers all along (4 x 4096, 32/32, forward + backward: 1.91 ms became 1.99).
template <class E, int D, bool packed>
__global__ __launch_bounds__(384, 1) void fused_kernel(const __grid_constant__ BackwardParams p, const E* boundary, const int* cut) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<FusedShared<E, D>*>(memory);
  const int64_t head = blockIdx.x % p.H, n = packed ? longest_first(p, blockIdx.x / p.H, m.found) : blockIdx.x / p.H;
  if (!cut[n * p.H + head]) return;
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    init(&m.full, 128), init(&m.window_free, 256), init(&m.exchange_free, 256);  // every thread: racecheck does not see that one speaks for its warp
    for (int i = 0; i < 2; ++i) init(m.A_free + i, 128), init(m.B_free + i, 128), init(m.H_free + i, 128);
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
          load_state<D, 128>(m.H[side], boundary + ((c.slot * p.H + head) * 2 + side) * int64_t(D) * p.M, p.M, tid);
        }
        if (begin > 0) {
          wait(&m.window_free, parity), wait(&m.exchange_free, parity);
          Advance<E>{reinterpret_cast<E*>(m.exchange[0]), m.decay}.write(gates, begin);
        }
        gates.make(begin, end, before, total);
        if (end == c.length) {
#pragma unroll 1
          for (int side = 0; side < 4; ++side) {  // q, d_o, k, v
            wait(side & 2 ? m.B_free + (side & 1) : m.A_free + (side & 1), chunk_parity);
            const View& x = side & 2 ? (side & 1 ? p.v : p.k) : side & 1 ? p.d_o : p.q;
            load_tokens<D, 128>(side & 2 ? m.B[side & 1] : m.A[side & 1], rows_of(x, c, head), c.length, tid);
          }
        }
        cp_async_commit();
        wait(&m.window_free, parity);
        if (tid == 0) m.window.begin = begin, m.window.end = end;
        gates.store(m.window, total);
        cp_async_wait_for<0>();
        publish();
        arrive(&m.full);
        wait(&m.exchange_free, parity);
        parity ^= 1;
        end = begin;
      }
    }
    return;
  }
  take_registers<200>();
  fused_side<E, D>(p, m, c, n, head, role - 1);
#endif
}

}  // namespace

void hopper_fused(const BackwardParams& p, const void* boundary, const int* cut) {
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_fused", p.cu_seqlens ? fused_kernel<E, D, true> : fused_kernel<E, D, false>, p.N * p.H, 384, sizeof(FusedShared<E, D>), p.stream, p,
           static_cast<const E*>(boundary), cut);
  });
}

}  // namespace gsa::cuda
