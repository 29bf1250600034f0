// Chunked backward for Hopper (sm_90a), first part: all that the states before a chunk suffice for. One block for each chunk and key/value head; the query
// heads of a group one after the other.
//
//     X1 = tril(q k^T), X2 = tril(d_o v^T)            o1 = R (exp(ref) (q Hk) + X1 S)       dp = R (exp(ref) (d_o Hv) + X2 S)        p = softmax(scale o1)
//     Yk = scale R p (dp - <p, dp>)                   Yv = R p                              e = o1 do1 + p dp, o1 and dp without their diagonals
//     dq = tril(Yk S^T) k + (Yk exp(ref)) Hk^T
//
// S, R, ref are those of hopper_gates.cu. Yk, Yv and e go to hopper_scan.cu and hopper_keys.cu. What has to be more exact than 16 bits is an operand in two
// parts: X, S, Y; Yk goes on rounded, and is in e as it goes on. e is summed over the heads of a block, in memory.
//
// One bank: queries_kernel. Two warpgroups: first one has o1, the other dp, of all slots; then they give each other half, and each has o1, dp, p, Y of 32 slots
// and its share of the dimensions of dq. Two blocks on a multiprocessor: while one waits the other works. The next query head's tokens come as soon as there is
// room: when Y has been saved (d_o) and has become operands (q), while dq is made.
//
//     shared memory      holds
//     Y                  q, d_o; what the warpgroups give each other, sums of rows; Yk, Yv
//     B, H, S            k, v; states before the chunk; S in two parts
//
// Two banks: banks_kernel. Four warpgroups. Two make the scores of one query head, one o1, the other dp, of both banks' slots, while the other two, one for
// each bank, make of those of the head before it what comes after: p, Y, e, dq. What is [64 x 64] tokens is made once for each bank: dq is a sum over the
// banks, for which those two give each other half of the dimensions. Y stays in registers where it is an operand; a warp saves its 16 rows by itself.
//
//     shared memory      holds                                                       barriers (full / empty)
//     Y                  o1, dp as accumulators lie; Yk, Yv; half of dq for Yv       full / free [side]
//     tokens             q, d_o of the next head                                     side_full [side] / the warpgroup's own
//     B, H, S            k, v; states before the chunk; S in two parts               B_full [side]; S_full
//
// A chunk of several windows, in a branch of its own: o1, dp, tril(Yk S^T) and Yk exp(G) token by token (core/exact.cuh), Yk and Yv saved without R, and exp(G)
// in its place for hopper_scan.cu. Shared memory: ExactQueries.
#include "core/backward.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D>
struct QueriesShared {
  static constexpr int rows = std::max(64 * D, 2 * kTile);  // Yk or Yv in two parts; or q, d_o
  struct Sums {  // diagonals of q k^T and d_o v^T. In Y[1]
    RowSums<2> of;
    float diagonal[2][64];
  };
  alignas(1024) E Y[2][rows];
  E B[2][64 * D], H[2][1][64 * D], S[2][kTile];
  float in[kSlots];
  uint64_t S_full, side_full[2], Y_free;  // side: its A; of the first head B and H too
  __device__ E* A(int side) { return Y[side]; }
  // By a warpgroup: half of the slots, as accumulators lie.
  __device__ float* given(int half) { return reinterpret_cast<float*>(Y[0]) + half * 64 * 32; }
  __device__ void wait_for_first() { wait(side_full, 0), wait(side_full + 1, 0); }
  static_assert(2 * 64 * 32 * 4 <= rows * 2 && sizeof(Sums) <= rows * 2);
};
template <class E, int D>
struct BanksShared {
  alignas(1024) E Y[2][2][2][kTile];  // [side][bank][part]
  E B[2][64 * D], H[2][2][64 * D], S[2][2][kTile], tokens[2][64 * D];
  float in[2 * kSlots];
  struct {
    float sum[2][64], dot[2][64];  // of a bank: log2 of the sum of 2^(o1 scale log2 e), and <p, dp> by itself
  } sums;
  float diagonal[2][2][64];  // of q k^T and d_o v^T; of a head and the next one
  Chunk chunk;
  uint64_t S_full, side_full[2], B_full[2], full[2], free[2];
  __device__ E* A(int side) { return tokens[side]; }
  __device__ void wait_for_first() {
    for (int side = 0; side < 2; ++side) wait(side_full + side, 0), wait(B_full + side, 0);
  }
  // Accumulators of a warpgroup, 8 columns from 8 t on: where the warp's rows of the two parts of Y will be.
  __device__ float4* accumulators(int side, int bank, int t, int tid) {
    return reinterpret_cast<float4*>(Y[side][bank][t / 4]) + tid / 32 * 128 + t % 4 * 32 + tid % 32;
  }
};
// Of a chunk of several windows, in the place of tokens, states and S. X: of both sides, then A1 of each bank; O: o1, then Yk, then Yk exp(G); exp(g); s;
// dp, then k and Hk.
template <class E, int D, int BANKS>
struct ExactQueries {
  float X[2][kTile], O[BANKS][kTile], a[BANKS][kTile], s[BANKS][kTile];
  union {
    struct {
      float dp[BANKS][kTile], diagonal[2][64];  // of q k^T and d_o v^T
    };
    struct {
      E k[64 * D], Hk[BANKS][64 * D];
    };
  };
  __device__ RowSums<2 * BANKS>& sums() { return *reinterpret_cast<RowSums<2 * BANKS>*>(X[0]); }  // when X has been applied
};
template <class E, int D, int BANKS>
using Queries = std::conditional_t<BANKS == 1, QueriesShared<E, D>, BanksShared<E, D>>;
template <class E, int D, int BANKS>
constexpr int64_t queries_shared() {
  return std::max(sizeof(Queries<E, D, BANKS>), sizeof(ExactQueries<E, D, BANKS>));
}
static_assert(queries_shared<bf16, 64, 1>() <= 97 * 1024);  // two blocks leave the L1 60 KB
static_assert(queries_shared<bf16, 128, 1>() <= 113 * 1024 && queries_shared<bf16, 128, 2>() <= 227 * 1024);

// A chunk of several windows, whose tokens and states are on their way. Finds everything anew: what the usual way keeps in registers is its own.
template <class E, int D, int BANKS>
__device__ __forceinline__ void exact_queries(const BackwardParams& p, char* memory, const E* boundary, const Backward<E>& w, int heads) {
#if GSA_HOPPER
  constexpr int width = D / (2 * BANKS);
  auto& tokens = *reinterpret_cast<Queries<E, D, BANKS>*>(memory);
  const int r = p.HQ / p.H, turns = r / heads, block = kept(blockIdx.x), slot = block / turns / p.H, head = block / turns % p.H;
  const int first_head = head * r + block % turns * heads;
  Chunk c;
  if (!find_chunk(p, slot, kChunk, c)) return;
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head) {
    auto& m = *reinterpret_cast<ExactQueries<E, D, BANKS>*>(memory + kept(0));
    const int thread = kept(threadIdx.x), own = __shfl_sync(0xffffffffu, thread / 128, 0), bank = own % BANKS, half = own / BANKS, share = bank * 2 + half;
    const int tid = thread % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
    const int rows_bank = thread / kExactThreads;  // whose rows this thread has where it is token by token
    const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
    if (q_head == first_head) {
      tokens.wait_for_first();
    } else {
      __syncthreads();  // everything is done with
      const int side_thread = thread % (128 * BANKS);
      load_tokens<D, 128 * BANKS>(tokens.B[half], rows_of(half ? p.v : p.k, c, head), c.length, side_thread);
      load_tokens<D, 128 * BANKS>(tokens.A(half), rows_of(half ? p.d_o : p.q, c, q_head), c.length, side_thread);
      load_state<D, 128>(tokens.H[half][bank], states + half * int64_t(D) * p.M, p.M, tid, bank);
      cp_async_commit();
    }
    cp_async_wait_for<0>();
    publish();
    __syncthreads();
    {
      float x[8][4], o[8][4], d[2];
      hand_over(x);
      hand_over(o);
      products_begin();
      product<E, D / 16, 0, 0>(x, kmajor(tokens.A(half)), kmajor(tokens.B[half]), false);
      product<E, D / 16, 0, 1>(o, kmajor(tokens.A(half)), mnmajor(tokens.H[half][bank]), false);
      products_commit();
      products_wait<0>();
      hand_over(x);
      hand_over(o);
      diagonal_of(d, x, warp);
      __syncthreads();  // tokens and states are done with
      store_R(half ? m.dp[bank] : m.O[bank], o, row, frag_col());
      if (bank == 0) {
        store_R(m.X[half], x, row, frag_col());
        if ((lane_id() & 3) == 0) m.diagonal[half][row] = d[0], m.diagonal[half][row + 8] = d[1];
      }
    }
    exact_gates<E>(p, slot, head, rows_bank, m.a[rows_bank], m.s[rows_bank]);
    __syncthreads();
    // exp(G) for the cotangents' scan
    float* const factors = q_head == head * r ? w.factors[(c.slot * p.H + head) * BANKS + rows_bank].R : nullptr;
    exact_apply(m.a[rows_bank], m.s[rows_bank], m.O[rows_bank], m.X[0], m.dp[rows_bank], m.X[1], factors);
    __syncthreads();
    {
      Saved<E>& save = w.saved[(c.slot * p.HQ + q_head) * BANKS + bank];
      float o[4][4], dp[4][4], s[4][4], y[4][4];
      load_R(o, m.O[bank], row, col);
      load_R(dp, m.dp[bank], row, col);
      load_plain(s, m.s[bank], row, col);
      const float d[2] = {m.diagonal[0][row], m.diagonal[0][row + 8]}, b[2] = {m.diagonal[1][row], m.diagonal[1][row + 8]}, scale = static_cast<float>(p.scale);
      float valid[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) valid[t][e] = row + (e >> 1) * 8 < c.length ? 1.f : 0.f;
      // Everybody has read O and the diagonals when they meet.
      cotangents<E>(o, dp, y, s, valid, d, b, m.sums(), share, share * 32, p.M, scale, row, [] { __syncthreads(); });
      store_R(m.O[bank], dp, row, col);
      save_e(w.saved[(c.slot * p.HQ + first_head) * BANKS + bank].e, o, q_head == first_head, half, tid);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          E *const Yk = at(save.Y[0][0], row + 8 * h, col + t * 8), *const Yv = at(save.Y[1][0], row + 8 * h, col + t * 8);
          Arith<E>::split_pair(dp[t][2 * h], dp[t][2 * h + 1], *reinterpret_cast<uint32_t*>(Yk), *reinterpret_cast<uint32_t*>(Yk + kTile));
          Arith<E>::split_pair(y[t][2 * h], y[t][2 * h + 1], *reinterpret_cast<uint32_t*>(Yv), *reinterpret_cast<uint32_t*>(Yv + kTile));
        }
    }
    __syncthreads();  // dp and the sums are done with
    load_tokens<D, 256 * BANKS>(m.k, rows_of(p.k, c, head), c.length, thread);
    for (int b = 0; b < BANKS; ++b) load_state<D, 256 * BANKS>(m.Hk[b], states, p.M, thread, b);
    cp_async_commit();
    exact_contract(m.a[rows_bank], m.s[rows_bank], m.O[rows_bank], m.X[rows_bank]);
    cp_async_wait_for<0>();
    publish();
    __syncthreads();
    float dq[width / 8][4], x[8][4];
    zero(dq);
    load_R(x, m.X[0], row, frag_col());
    if constexpr (BANKS > 1) {
      float other[8][4];
      load_R(other, m.X[1], row, frag_col());
      add(x, other);
    }
    const auto A1 = operand<E>(x);
#pragma unroll
    for (int b = 0; b < BANKS; ++b) {
      load_R(x, m.O[b], row, frag_col());
      const auto Y = operand<E>(x);
      hand_over(dq);
      products_begin();
      if (b == 0) product<E, 1>(dq, A1, mnmajor(columns<E>(m.k, own * width)));
      product<E, 0>(dq, Y, kmajor(m.Hk[b] + own * width * 64));
      products_commit();
      products_wait<0>();
      hand_over(dq);
    }
    store_window<E>(rows_of(p.dq, c, q_head), dq, warp, 0, c.length, own * width);
  }
#endif
}

template <class E, int D>
__global__ __launch_bounds__(256, 2) void queries_kernel(const __grid_constant__ BackwardParams p, const E* boundary, const __grid_constant__ Backward<E> w,
                                                         int heads, const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  if (w.all_elsewhere()) return;
  extern __shared__ __align__(1024) char memory[];
  using Shared = QueriesShared<E, D>;
  constexpr int kThreads = 256, width = D / 2;  // dimensions of a warpgroup
  auto& m = *reinterpret_cast<Shared*>(memory);
  auto& sums = *reinterpret_cast<typename Shared::Sums*>(m.Y[1]);
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c) || w.elsewhere(p, c.seq.n, head)) return;
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // of the slots, and side
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const float scale = static_cast<float>(p.scale);

  // Everything is on its way before anything is waited for.
  GateImage<E>* const image = w.gates + (c.slot * p.H + head);
  const bool cut = image->cut;
  // By one thread.
  auto send_A = [&](int q_head, int side) { bring_tokens<D>(m.A(side), side ? maps.d_o : maps.q, p, c, q_head, m.side_full + side); };
  auto send_next_A = [&](int q_head, int side) {
    arrive_expecting(m.side_full + side, 64 * D * 2);
    send_A(q_head, side);
  };
  if (threadIdx.x == 0) {
    init(&m.S_full, 1), init(m.side_full, 1), init(m.side_full + 1, 1), init(&m.Y_free, kThreads);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int side = 0; side < 2; ++side) {
      arrive_expecting(m.side_full + side, 3 * 64 * D * 2);
      send_A(first_head, side);
      bring_tokens<D>(m.B[side], side ? maps.v : maps.k, p, c, head, m.side_full + side);
      bring_state<D>(m.H[side][0], states, ((c.slot * p.H + head) * 2 + side) * D, m.side_full + side);
    }
    arrive_expecting(&m.S_full, sizeof(m.S));
    bulk_load(m.S, image->S, sizeof(m.S), &m.S_full);
  }
  if (threadIdx.x < kSlots && !cut) m.in[threadIdx.x] = image->in[threadIdx.x];
  __syncthreads();
  wait(&m.S_full, 0);
  if (cut) return exact_queries<E, D, 1>(p, memory + kept(0), boundary, w, heads);
  float R[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 x = reinterpret_cast<const float4*>(image->R)[half * 512 + t * 128 + tid];
    R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
  }

  uint32_t turn = 0;
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head, turn ^= 1) {
    auto& m = *reinterpret_cast<Shared*>(memory + kept(0));  // addresses are made where they are used: there are no registers to keep them in
    const bool last = q_head + 1 == first_head + heads;
    const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
    if (q_head == first_head) wait(m.side_full, 0);  // all have k and Hk in dq
    wait(m.side_full + half, turn);
    float o[4][4], dp[4][4], d[2], b[2];
    {
      float x[8][4], other[2];
      scores<E, D, false>(x, other, m.A(half), m.B[half], m.H[half][0], m.S[0], m.in, warp);
      __syncthreads();  // A is done with
      give_half(m.given(half), x, half, tid);
      if ((lane_id() & 3) == 0) sums.diagonal[half][row] = other[0], sums.diagonal[half][row + 8] = other[1];
      __syncthreads();
      take_half(o, dp, x, m.given(!half), half, tid);
#pragma unroll
      for (int h = 0; h < 2; ++h) d[h] = sums.diagonal[0][row + 8 * h], b[h] = sums.diagonal[1][row + 8 * h];
    }

    float y[4][4];  // e in the place of o, Yk in that of dp, Yv in y
    {
      float s[4][4];
      strengths(s, m.S[0], half, row);
      cotangents<E>(o, dp, y, s, R, d, b, sums.of, half, half * 32, p.M, scale, row, [] { __syncthreads(); });
    }
    __syncthreads();  // what lies in Y is done with
    store_half(m.Y[0], dp, half, warp);
    store_half(m.Y[1], y, half, warp);
    publish();
    __syncthreads();
    Saved<E>& save = w.saved[c.slot * p.HQ + q_head];
    if (threadIdx.x == 0) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int side = x / 2, part = x % 2;
        if (x != 1 || exact_dH(p)) bulk_store<kTile * 2>(save.Y[side][part], m.Y[side] + part * kTile);
      }
      bulk_commit();
    }
    save_e(w.saved[c.slot * p.HQ + first_head].e, o, q_head == first_head, half, tid);
    {  // dq
      float x[8][4];
      hand_over(x);
      products_begin();
      product<E, 4, 0, 0>(x, kmajor(m.Y[0]), kmajor(m.S[0]), false);
      product<E, 4, 0, 0>(x, kmajor(m.Y[0] + kTile), kmajor(m.S[0]), true);
      product<E, 4, 0, 0>(x, kmajor(m.Y[0]), kmajor(m.S[1]), true);
      products_commit();
      const auto Yref = operand_times(m.Y[0], m.in, warp);
      products_wait<0>();
      hand_over(x);
      arrive(&m.Y_free);
      keep<true, 0>(x, warp);
      const auto dA1 = operand<E>(x);
      float dq[width / 8][4];
      zero(dq);
      hand_over(dq);
      products_begin();
      product<E, 1>(dq, dA1, mnmajor(columns<E>(m.B[0], half * width)));
      product<E, 0>(dq, Yref, kmajor(m.H[0][0] + half * width * 64));
      products_commit();
      if (threadIdx.x == 0) {
        bulk_wait();
        if (!last) {
          send_next_A(q_head + 1, 1);
          wait(&m.Y_free, turn);
          send_next_A(q_head + 1, 0);
        }
      }
      products_wait<0>();
      hand_over(dq);
      store_window<E>(rows_of(p.dq, c, q_head), dq, warp, 0, c.length, half * width);
    }
  }
#endif
}

// What is between o1, dp and Y of a bank's slots, and the end of it, dq: the way of cotangents (core/backward.cuh), with o1 and dp read where they lie, twice.
template <class E, int D>
__device__ __forceinline__ void banks_second(const BackwardParams& p, const Backward<E>& w, const GateImage<E>& image, char* memory, int bank, int first_head,
                                             int heads) {
  constexpr int width = D / 2;  // dimensions that a warpgroup has of the sum over the banks
  using Shared = BanksShared<E, D>;
  const float4* const R_own = reinterpret_cast<const float4*>(image.R) + threadIdx.x % 128;
  {
    auto& m = *reinterpret_cast<Shared*>(memory);
    wait(&m.S_full, 0), wait(m.B_full, 0);
  }
  float R[8][4];
  auto load_R = [&] {  // for the next head while dq of this one is made: there are no registers to keep it in
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const float4 x = R_own[t * 128];
      R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
    }
  };
  load_R();
  uint32_t turn = 0;
#pragma unroll 1
  for (int h = 0; h < heads; ++h, turn ^= 1) {
    auto& m = *reinterpret_cast<Shared*>(memory + kept(0));  // addresses are made where they are used: there are no registers to keep them in
    const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
    const float scale = static_cast<float>(p.scale);
    float y[8][4], dp[8][4], top[2] = {-INFINITY, -INFINITY}, dot[2];
    wait(m.full, turn), wait(m.full + 1, turn);
    {
      const float d[2] = {m.diagonal[turn][0][row], m.diagonal[turn][0][row + 8]}, b[2] = {m.diagonal[turn][1][row], m.diagonal[turn][1][row + 8]};
      const uint32_t S_row = place(m.S[bank][0], warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4);
      const int slots = p.M - bank * kSlots;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t hi[4], lo[4];
        ldmatrix4<false>(hi, S_row ^ (k * 32)), ldmatrix4<false>(lo, (S_row ^ (k * 32)) + kTile * 2);
#pragma unroll
        for (int t = 2 * k; t < 2 * k + 2; ++t) {
          const float4 o_at = *m.accumulators(0, bank, t, tid), dp_at = *m.accumulators(1, bank, t, tid);
          const float o_here[4] = {o_at.x, o_at.y, o_at.z, o_at.w}, dp_here[4] = {dp_at.x, dp_at.y, dp_at.z, dp_at.w};
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const float2 x = unpack<E>(hi[t % 2 * 2 + g]), rest = unpack<E>(lo[t % 2 * 2 + g]);
            const float S[2] = {x.x + rest.x, x.y + rest.y};
#pragma unroll
            for (int e = 2 * g; e < 2 * g + 2; ++e) {
              const float o1 = fmaf(d[g], S[e & 1], o_here[e]) * R[t][e];
              y[t][e] = t * 8 < slots ? o1 * (scale * 1.4426950408889634f) : -INFINITY;
              top[g] = fmaxf(top[g], y[t][e]);
              dp[t][e] = fmaf(b[g], S[e & 1], dp_here[e]) * R[t][e];
            }
          }
        }
      }
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      float sum = 0.f;
      dot[g] = 0.f;
      top[g] = quad_max(top[g]);
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 2 * g; e < 2 * g + 2; ++e) y[t][e] = fast_exp2(y[t][e] - top[g]), sum += y[t][e], dot[g] += y[t][e] * dp[t][e];
      sum = quad_sum(sum), dot[g] = __fdividef(quad_sum(dot[g]), sum);
      sum = top[g] + __log2f(sum);
      top[g] -= sum;
      if ((lane_id() & 3) == 0) m.sums.sum[bank][row + 8 * g] = sum, m.sums.dot[bank][row + 8 * g] = dot[g];
    }
    sync(3, 256);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      // The banks' shares of the sum.
      const float more = m.sums.sum[!bank][row + 8 * g] - m.sums.sum[bank][row + 8 * g], share = __fdividef(1.f, 1.f + fast_exp2(more));
      dot[g] = scale * fmaf(share, dot[g] - m.sums.dot[!bank][row + 8 * g], m.sums.dot[!bank][row + 8 * g]);
      top[g] = fast_exp2(top[g]) * share;
    }
    {
      float4* const e_tile = reinterpret_cast<float4*>(w.saved[(m.chunk.slot * p.HQ + first_head) * 2 + bank].e) + tid;
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float4 o_at = *m.accumulators(0, bank, t, tid), dp_at = *m.accumulators(1, bank, t, tid);
        const float o_here[4] = {o_at.x, o_at.y, o_at.z, o_at.w}, dp_here[4] = {dp_at.x, dp_at.y, dp_at.z, dp_at.w};
        float sum[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float Yv = y[t][e] * top[e >> 1] * R[t][e], Yk = Yv * fmaf(scale, dp[t][e], -dot[e >> 1]);
          sum[e] = fmaf(o_here[e], to_float(from_float<E>(Yk)), dp_here[e] * Yv);
          y[t][e] = Yv, dp[t][e] = Yk;
        }
        save_four(e_tile + t * 128, sum, h == 0);
      }
    }
    __syncwarp();  // o1 and dp of the warp's rows have been read
    {
      const auto Yv = split<E>(y);
      store_operand<E>(m.Y[1][bank][0], Yv.hi, warp);
      store_operand<E>(m.Y[1][bank][1], Yv.lo, warp);
    }
    float x[8][4];
    typename Arith<E>::template Op<64> Yref;
    {
      const auto Yk = split<E>(dp);
      store_operand<E>(m.Y[0][bank][0], Yk.hi, warp);
      if (exact_dH(p)) store_operand<E>(m.Y[0][bank][1], Yk.lo, warp);
      scale_columns(dp, m.in + bank * kSlots);
      Yref = operand<E>(dp);
      publish();
      __syncwarp();
      if (lane_id() == 0) {
        Saved<E>& save = w.saved[(m.chunk.slot * p.HQ + first_head + h) * 2 + bank];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i != 1 || exact_dH(p)) bulk_store<1024 * 2>(save.Y[i / 2][i % 2] + warp * 1024, m.Y[i / 2][bank][i % 2] + warp * 1024);
        bulk_commit();
      }
      zero(x);
      hand_over(x);
      products_begin();
      product<E, 0>(x, Yk.hi, kmajor(m.S[bank][0]));
      product<E, 0>(x, Yk.lo, kmajor(m.S[bank][0]));
      product<E, 0>(x, Yk.hi, kmajor(m.S[bank][1]));
      products_commit();
      products_wait<0>();
      hand_over(x);
    }
    keep<true, 0>(x, kept(warp));
    const auto dA1 = operand<E>(x);
    if (lane_id() == 0) bulk_wait();
    __syncwarp();
    arrive(m.free);
    float dq[width / 8][4];
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int part = i ? bank : !bank;  // of the dimensions
      zero(dq);
      hand_over(dq);
      products_begin();
      product<E, 1>(dq, dA1, mnmajor(columns<E>(m.B[0], part * width)));
      product<E, 0>(dq, Yref, kmajor(m.H[0][bank] + part * width * 64));
      products_commit();
      products_wait<0>();
      hand_over(dq);
      if (i == 0) {
#pragma unroll
        for (int t = 0; t < width / 8; ++t) *m.accumulators(1, bank, t, tid) = make_float4(dq[t][0], dq[t][1], dq[t][2], dq[t][3]);
      }
    }
    load_R();
    sync(3, 256);
#pragma unroll
    for (int t = 0; t < width / 8; ++t) {
      const float4 other = *m.accumulators(1, !bank, t, tid);
      dq[t][0] += other.x, dq[t][1] += other.y, dq[t][2] += other.z, dq[t][3] += other.w;
    }
    arrive(m.free + 1);
    store_window<E>(rows_of(p.dq, m.chunk, first_head + h), dq, warp, 0, m.chunk.length, bank * width);
  }
}

template <class E, int D>
__global__ __launch_bounds__(512, 1) void banks_kernel(const __grid_constant__ BackwardParams p, const E* boundary, const __grid_constant__ Backward<E> w,
                                                       int heads, const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  using Shared = BanksShared<E, D>;
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c)) return;
  const GateImage<E>* const image = w.gates + (c.slot * p.H + head) * 2;
  const bool cut = image->cut;
  constexpr uint32_t bytes = 64 * D * 2;
  if (threadIdx.x == 0) {
    auto& m = *reinterpret_cast<Shared*>(memory);
    m.chunk = c;
    init(&m.S_full, 1);
    for (int side = 0; side < 2; ++side) init(m.side_full + side, 1), init(m.B_full + side, 1), init(m.full + side, 128), init(m.free + side, 256);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int side = 0; side < 2; ++side) {
      arrive_expecting(m.side_full + side, bytes);
      bring_tokens<D>(m.A(side), side ? maps.d_o : maps.q, p, c, first_head, m.side_full + side);
      arrive_expecting(m.B_full + side, 3 * bytes);
      bring_tokens<D>(m.B[side], side ? maps.v : maps.k, p, c, head, m.B_full + side);
      for (int b = 0; b < 2; ++b) bring_state<D>(m.H[side][b], states, ((c.slot * p.H + head) * 2 + side) * D, m.B_full + side, b);
    }
    arrive_expecting(&m.S_full, sizeof(m.S));
    for (int b = 0; b < 2; ++b) bulk_load(m.S[b], image[b].S, sizeof(m.S[b]), &m.S_full);
  }
  if (threadIdx.x < 2 * kSlots && !cut) reinterpret_cast<Shared*>(memory)->in[threadIdx.x] = image[threadIdx.x / kSlots].in[threadIdx.x % kSlots];
  __syncthreads();
  if (cut) {
    wait(&reinterpret_cast<Shared*>(memory)->S_full, 0);
    return exact_queries<E, D, 2>(p, memory + kept(0), boundary, w, heads);
  }
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (own >= 2) return banks_second<E, D>(p, w, image[own - 2], memory + kept(0), own - 2, first_head, heads);
  {
    auto& m = *reinterpret_cast<Shared*>(memory);
    wait(&m.S_full, 0), wait(m.B_full + own, 0);
  }
  uint32_t turn = 0;
#pragma unroll 1
  for (int h = 0; h < heads; ++h, turn ^= 1) {
    auto& m = *reinterpret_cast<Shared*>(memory + kept(0));
    const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), side = kept(own);
    float o[2][8][4];  // of the banks
    wait(m.side_full + side, turn);
    {
      float x[8][4], d[2];
      hand_over(x);
      hand_over(o[0]);
      hand_over(o[1]);
      products_begin();
      product<E, D / 16, 0, 0>(x, kmajor(m.A(side)), kmajor(m.B[side]), false);
      products_commit();
#pragma unroll
      for (int b = 0; b < 2; ++b) product<E, D / 16, 0, 1>(o[b], kmajor(m.A(side)), mnmajor(m.H[side][b]), false);
      products_commit();
      products_wait<1>();
      hand_over(x);
      diagonal_of(d, x, warp);
      if ((lane_id() & 3) == 0) m.diagonal[turn][side][warp * 16 + frag_row()] = d[0], m.diagonal[turn][side][warp * 16 + frag_row() + 8] = d[1];
      keep<true, 1>(x, warp);
      const auto X = split<E>(x);
      products_wait<0>();
      hand_over(o[0]);
      hand_over(o[1]);
      sync(1 + side, 128);  // A is done with
      if (tid == 0 && h + 1 < heads) {
        arrive_expecting(m.side_full + side, bytes);
        bring_tokens<D>(m.A(side), side ? maps.d_o : maps.q, p, m.chunk, first_head + h + 1, m.side_full + side);
      }
#pragma unroll
      for (int b = 0; b < 2; ++b) scale_columns(o[b], m.in + b * kSlots);
      hand_over(o[0]);
      hand_over(o[1]);
      products_begin();
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        product<E, 1>(o[b], X.hi, mnmajor(m.S[b][0]));
        product<E, 1>(o[b], X.lo, mnmajor(m.S[b][0]));
        product<E, 1>(o[b], X.hi, mnmajor(m.S[b][1]));
        products_commit();
      }
    }
    wait(m.free + side, turn ^ 1);
    auto leave = [&](int b) {
#pragma unroll
      for (int t = 0; t < 8; ++t) *m.accumulators(side, b, t, tid) = make_float4(o[b][t][0], o[b][t][1], o[b][t][2], o[b][t][3]);
    };
    products_wait<1>();
    hand_over(o[0]);
    leave(0);
    products_wait<0>();
    hand_over(o[1]);
    leave(1);
    arrive(m.full + side);
  }
#endif
}

}  // namespace

int hopper_query_heads(const Params& p) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  return slots * p.H >= 8 * hopper_multiprocessors() ? p.HQ / p.H : 1;
}

void hopper_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  const int r = p.HQ / p.H, heads = hopper_query_heads(p);
  select_banks(p, [&]<class E, int D, int BANKS>() {
    launch_early("hopper_queries", BANKS == 1 ? queries_kernel<E, D> : banks_kernel<E, D>, slots * p.H * (r / heads), 256 * BANKS,
                 queries_shared<E, D, BANKS>(), p.stream, p, static_cast<const E*>(boundary), Backward<E>(w), heads, input_maps(p), boundary_map(p, boundary));
  });
}

}  // namespace gsa::cuda
