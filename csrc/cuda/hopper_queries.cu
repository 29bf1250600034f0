// Chunked backward for Hopper (sm_90a), first part: all that the states before a chunk suffice for. One block for each chunk and key/value head; the query
// heads of a group one after the other.
//
//     X1 = tril(q k^T), X2 = tril(d_o v^T)            o1 = R (exp(ref) (q Hk) + X1 S)       dp = R (exp(ref) (d_o Hv) + X2 S)        p = softmax(scale o1)
//     Yk = scale R p (dp - <p, dp>)                   Yv = R p                              e = o1 do1 + p dp, o1 and dp without their diagonals
//     dq = tril(Yk S^T) k + (Yk exp(ref)) Hk^T
//
// S, R, ref are those of hopper_gates.cu; a chunk that has to be cut makes them here, for one window after the other. Yk, Yv and e go to hopper_scan.cu and
// hopper_keys.cu. Two warpgroups, each with half of the slots (o1, dp, p, Y) and of the dimensions (dq); what is [64 x 64] tokens is made by both. What has to be
// more exact than 16 bits is an operand in two parts: X, S, Y. Two blocks on a multiprocessor: while one waits the other works.
//
//     shared memory      holds
//     A[0], A[1]         q, R; then q, d_o; then sums of rows and Yk, Yv
//     B, H, S            k, v; states before the window; gates' sums, then S in two parts
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256;

template <class E, int D>
struct QueriesShared {
  static constexpr int rows = D == 64 ? 2 * kTile : 64 * D;  // of A: room for Y in two parts
  struct Before {  // of Advance, in A[0]
    alignas(1024) E S[kTile];
    float decay[kSlots];
  };
  struct RowSums {  // of either half of the slots, in A[0]
    float top[2][64], sum[2][64], dot[2][64];
  };
  alignas(1024) E A[2][rows];
  E B[2][64 * D], H[2][64 * D], S[2][kTile];
  float in[kSlots];
  uint64_t S_full;
  static_assert(sizeof(Before) <= rows * 2 && 64 * 64 * 4 <= rows * 2 && sizeof(typename GateMaker<E, 8>::Scratch) <= kTile * 2);
};
static_assert(sizeof(QueriesShared<bf16, 128>) <= 113 * 1024);

template <class E, int D>
__global__ __launch_bounds__(kThreads, 2) void queries_kernel(const __grid_constant__ BackwardParams p, const E* boundary,
                                                              const __grid_constant__ Backward<E> w, int heads) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  using Shared = QueriesShared<E, D>;
  auto& m = *reinterpret_cast<Shared*>(memory);
  auto& before_window = *reinterpret_cast<typename Shared::Before*>(m.A[0]);
  auto& sums = *reinterpret_cast<typename Shared::RowSums*>(m.A[0]);
  const int r = p.HQ / p.H, turns = r / heads;
  const int64_t head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c)) return;
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const float scale = static_cast<float>(p.scale);

  const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
  // Everything is on its way before anything is waited for.
  GateImage<E>& image = w.gates[c.slot * p.H + head];
  const bool cut = image.cut;
  load_tokens<D, kThreads>(m.A[0], rows_of(p.q, c, first_head), c.length, threadIdx.x);
  load_tokens<D, kThreads>(m.B[0], rows_of(p.k, c, head), c.length, threadIdx.x);
  for (int side = 0; side < 2; ++side) load_state<D, kThreads>(m.H[side], states + side * int64_t(D) * p.M, p.M, threadIdx.x);
  cp_async_commit();
  load_tokens<D, kThreads>(m.A[1], rows_of(p.d_o, c, first_head), c.length, threadIdx.x);
  load_tokens<D, kThreads>(m.B[1], rows_of(p.v, c, head), c.length, threadIdx.x);
  cp_async_commit();
  if (!cut) {
    if (threadIdx.x == 0) {
      init(&m.S_full, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      arrive_expecting(&m.S_full, sizeof(m.S));
      bulk_load(m.S, image.S, sizeof(m.S), &m.S_full);
    }
    if (threadIdx.x < kSlots) m.in[threadIdx.x] = image.in[threadIdx.x];
  }
  __syncthreads();
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
      const Advance<E> advance{before_window.S, before_window.decay};
      float* const R_tile = reinterpret_cast<float*>(m.A[1]);
      end = make_window<E, D>(p, blockIdx.x / turns / p.H, head, begin, advance, R_tile, m.S[0], m.in, m.H[0], m.B[0], m.B[1], states);
      load_R(R, R_tile, row, col);
      if (first_head == head * r)  // for the cotangents' scan
        for (int i = threadIdx.x; i < (end - begin) * kSlots; i += kThreads)
          image.R[begin * kSlots + i] = m.in[i % kSlots] * (begin ? advance.decay[i % kSlots] : 1.f);
    }

#pragma unroll 1
    for (int64_t q_head = first_head; q_head < first_head + heads; ++q_head) {
      auto& m = *reinterpret_cast<Shared*>(memory + kept(0));  // addresses are made where they are used: there are no registers to keep them in
      const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
      if (cut || q_head > first_head) {
        __syncthreads();  // A is free
        load_tokens<D, kThreads>(m.A[0], rows_of(p.q, c, q_head), c.length, threadIdx.x);
        cp_async_commit();
        load_tokens<D, kThreads>(m.A[1], rows_of(p.d_o, c, q_head), c.length, threadIdx.x);
        cp_async_commit();
      }
      cp_async_wait_for<1>();
      publish();
      __syncthreads();
      float o[4][4], dp[4][4], d[2], b[2];
      scores<E, D, false>(o, d, m.A[0], m.B[0], m.H[0] + half * 32, m.S[0] + half * 32, m.in + half * 32, warp);
      cp_async_wait_for<0>();
      publish();
      __syncthreads();
      scores<E, D, false>(dp, b, m.A[1], m.B[1], m.H[1] + half * 32, m.S[0] + half * 32, m.in + half * 32, warp);

      // softmax, and <p, dp>, over both halves
      float y[4][4], s[4][4], top[2], sum[2], dot[2];
      const uint32_t S_row = place(m.S[0], row, frag_col()) ^ (half * 64);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = -INFINITY, sum[h] = dot[h] = 0.f;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16));
          s[t][2 * h] = S.x * R[t][2 * h], s[t][2 * h + 1] = S.y * R[t][2 * h + 1];
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            o[t][e] *= R[t][e], dp[t][e] *= R[t][e];
            y[t][e] = half * 32 + t * 8 < p.M ? fmaf(d[h], s[t][e], o[t][e]) * (scale * 1.4426950408889634f) : -INFINITY;
            top[h] = fmaxf(top[h], y[t][e]);
          }
        }
        top[h] = fmaxf(quad_max(top[h]), -1e30f);  // a half without slots
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) y[t][e] = fast_exp2(y[t][e] - top[h]), sum[h] += y[t][e], dot[h] += y[t][e] * fmaf(b[h], s[t][e], dp[t][e]);
        sum[h] = quad_sum(sum[h]), dot[h] = quad_sum(dot[h]);
        if ((lane_id() & 3) == 0) sums.top[half][row + 8 * h] = top[h], sums.sum[half][row + 8 * h] = sum[h], sums.dot[half][row + 8 * h] = dot[h];
      }
      __syncthreads();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = row + 8 * h;
        const float other = sums.top[!half][i], all = fmaxf(top[h], other), mine = fast_exp2(top[h] - all), theirs = fast_exp2(other - all);
        const float inv = 1.f / (sum[h] * mine + sums.sum[!half][i] * theirs);
        dot[h] = (dot[h] * mine + sums.dot[!half][i] * theirs) * inv;
        const float f = mine * inv;
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) y[t][e] *= f;
      }
      // e in the place of o, Yk in that of dp, Yv in that of y
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float prob = y[t][e], cotangent = scale * prob * (fmaf(b[e >> 1], s[t][e], dp[t][e]) - dot[e >> 1]);
          o[t][e] = fmaf(o[t][e], cotangent, prob * dp[t][e]);
          dp[t][e] = cotangent * R[t][e];
          y[t][e] = prob * R[t][e];
        }
      __syncthreads();  // the sums of rows and d_o are done with
      {
        auto Y = split<E>(dp);
        store_operand<E>(m.A[0], Y.hi, warp, half * 32);
        store_operand<E>(m.A[0] + kTile, Y.lo, warp, half * 32);
        Y = split<E>(y);
        store_operand<E>(m.A[1], Y.hi, warp, half * 32);
        store_operand<E>(m.A[1] + kTile, Y.lo, warp, half * 32);
      }
      publish();
      __syncthreads();
      Saved<E>& save = w.saved[c.slot * p.HQ + q_head];
      const int last = end == c.length ? 64 : end;  // rows after the sequence are zero
      if (threadIdx.x == 0) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
          for (int part = 0; part < 2; ++part) bulk_store(save.Y[side][part] + begin * 64, m.A[side] + part * kTile + begin * 64, (last - begin) * 128);
        bulk_commit();
      }
      {  // e
        float4* to = reinterpret_cast<float4*>(save.e) + half * 512 + tid;
        if (last - begin == 64) {
#pragma unroll
          for (int t = 0; t < 4; ++t) to[t * 128] = make_float4(o[t][0], o[t][1], o[t][2], o[t][3]);
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (row + 8 * h >= begin && row + 8 * h < last)
#pragma unroll
              for (int t = 0; t < 4; ++t) reinterpret_cast<float2*>(to + t * 128)[h] = make_float2(o[t][2 * h], o[t][2 * h + 1]);
        }
      }
      {  // dq
        float x[8][4];
        hand_over(x);
        products_begin();
        product<E, 4, 0, 0>(x, kmajor(m.A[0]), kmajor(m.S[0]), false);
        product<E, 4, 0, 0>(x, kmajor(m.A[0] + kTile), kmajor(m.S[0]), true);
        product<E, 4, 0, 0>(x, kmajor(m.A[0]), kmajor(m.S[1]), true);
        products_commit();
        const auto Yref = operand_times(m.A[0], m.in, warp);
        products_wait<0>();
        hand_over(x);
        keep<true, 0>(x, warp);
        const auto dA1 = operand<E>(x);
        float dq[D / 16][4];
        zero(dq);
        hand_over(dq);
        products_begin();
        product<E, 1>(dq, dA1, mnmajor(columns<E>(m.B[0], half * (D / 2))));
        product<E, 0>(dq, Yref, kmajor(m.H[0] + half * (D / 2) * 64));
        products_commit();
        products_wait<0>();
        hand_over(dq);
        store_window<E>(rows_of(p.dq, c, q_head), dq, warp, begin, end, half * (D / 2));
      }
      if (threadIdx.x == 0) bulk_wait();
    }
    __syncthreads();
  }
#endif
}

}  // namespace

void hopper_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  const int r = p.HQ / p.H;
  const int heads = slots * p.H >= 8 * hopper_multiprocessors() ? r : 1;  // of one block
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_queries", queries_kernel<E, D>, slots * p.H * (r / heads), kThreads, sizeof(QueriesShared<E, D>), p.stream, p,
           static_cast<const E*>(boundary), Backward<E>(w), heads);
  });
}

}  // namespace gsa::cuda
