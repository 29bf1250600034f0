// Chunked backward for Hopper (sm_90a), first part: all that the states before a chunk suffice for. One block for each chunk and key/value head; the query
// heads of a group one after the other.
//
//     X1 = tril(q k^T), X2 = tril(d_o v^T)            o1 = R (exp(ref) (q Hk) + X1 S)       dp = R (exp(ref) (d_o Hv) + X2 S)        p = softmax(scale o1)
//     Yk = scale R p (dp - <p, dp>)                   Yv = R p                              e = o1 do1 + p dp, o1 and dp without their diagonals
//     dq = tril(Yk S^T) k + (Yk exp(ref)) Hk^T
//
// S, R, ref are those of hopper_gates.cu. Yk, Yv and e go to hopper_scan.cu and hopper_keys.cu. Two warpgroups for a bank: first one has o1, the other dp, of all its
// slots; then they give each other half, and each has o1, dp, p, Y of 32 slots and its share of the dimensions of dq. What has to be more exact than 16 bits is an
// operand in two parts: X, S, Y. With one bank two blocks on a multiprocessor: while one waits the other works. The next query head's tokens come as soon as there is
// room: with two banks when this one's are no longer needed, with one when Y has been saved (d_o) and has become operands (q), while dq is made. e is summed over the heads
// of a block, in memory.
//
//     shared memory      holds
//     A                  q, d_o
//     Y, with one bank in the place of A:  what the warpgroups give each other, sums of rows; Yk, Yv
//     B, H, S            k, v; states before the chunk; S in two parts
//
// A chunk of several windows, in a branch of its own: o1, dp, tril(Yk S^T) and Yk exp(G) token by token (core/exact.cuh), Yk and Yv saved without R, and exp(G) in its
// place for hopper_scan.cu. Shared memory: ExactQueries.
#include "core/backward.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D, int BANKS>
struct QueriesShared {
  static constexpr bool ahead = BANKS > 1;  // A is apart
  static constexpr int rows = std::max(64 * D, BANKS * 2 * kTile);  // Yk or Yv in two parts; or q, d_o
  struct Sums {  // diagonals of q k^T and d_o v^T. In Y[1]
    RowSums<2 * BANKS> of;
    float diagonal[2][BANKS][64];
  };
  alignas(1024) E Y[2][rows];
  E B[2][64 * D], H[2][BANKS][64 * D], S[BANKS][2][kTile], tokens[ahead ? 2 * 64 * D : 8];
  float in[BANKS * kSlots];
  uint64_t S_full, side_full[2], Y_free;  // side: its A; of the first head B and H too
  __device__ E* A(int side) { return ahead ? tokens + side * 64 * D : Y[side]; }
  // [bank][warpgroup that gives]: half of the slots, as accumulators lie
  __device__ float* given(int bank, int half) { return reinterpret_cast<float*>(Y[0]) + (bank * 2 + half) * 64 * 32; }
  static_assert(BANKS * 2 * 64 * 32 * 4 <= rows * 2 && sizeof(Sums) <= rows * 2);
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
constexpr int64_t queries_shared() {
  return std::max(sizeof(QueriesShared<E, D, BANKS>), sizeof(ExactQueries<E, D, BANKS>));
}
static_assert(queries_shared<bf16, 64, 1>() <= 97 * 1024);  // two blocks leave the L1 60 KB
static_assert(queries_shared<bf16, 128, 1>() <= 113 * 1024 && queries_shared<bf16, 128, 2>() <= 227 * 1024);

// A chunk of several windows, whose tokens and states are on their way. Finds everything anew: what the usual way keeps in registers is its own.
template <class E, int D, int BANKS>
__device__ __forceinline__ void exact_queries(const BackwardParams& p, char* memory, const E* boundary, const Backward<E>& w, int heads) {
#if GSA_HOPPER
  constexpr int width = D / (2 * BANKS);
  auto& tokens = *reinterpret_cast<QueriesShared<E, D, BANKS>*>(memory);
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
      wait(tokens.side_full, 0), wait(tokens.side_full + 1, 0);
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
    float* const factors = q_head == head * r ? w.gates[(c.slot * p.H + head) * BANKS + rows_bank].R : nullptr;
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
      cotangents(o, dp, y, s, valid, d, b, m.sums(), share, share * 32, p.M, scale, row, [] { __syncthreads(); });
      store_R(m.O[bank], dp, row, col);
      save_e(w.saved[(c.slot * p.HQ + first_head) * BANKS + bank].e, o, q_head == first_head, half, tid);
      auto save_Y = [&](E(&Y)[2][kTile], const float (&x)[4][4]) {
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            E* const hi = at(Y[0], row + 8 * h, col + t * 8);
            Arith<E>::split_pair(x[t][2 * h], x[t][2 * h + 1], *reinterpret_cast<uint32_t*>(hi), *reinterpret_cast<uint32_t*>(hi + kTile));
          }
      };
      save_Y(save.Y[0], dp);
      save_Y(save.Y[1], y);
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

template <class E, int D, int BANKS>
__global__ __launch_bounds__(256 * BANKS, 3 - BANKS) void queries_kernel(const __grid_constant__ BackwardParams p, const E* boundary,
                                                                         const __grid_constant__ Backward<E> w, int heads,
                                                                         const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  using Shared = QueriesShared<E, D, BANKS>;
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);  // dimensions of a warpgroup
  auto& m = *reinterpret_cast<Shared*>(memory);
  auto& sums = *reinterpret_cast<typename Shared::Sums*>(m.Y[1]);
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c) || w.elsewhere(p, c.seq.n, head)) return;
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), bank = own % BANKS, half = own / BANKS;  // half: of the bank's slots, and side
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const float scale = static_cast<float>(p.scale);

  // Everything is on its way before anything is waited for.
  GateImage<E>* const image = w.gates + (c.slot * p.H + head) * BANKS;
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
      arrive_expecting(m.side_full + side, (2 + BANKS) * 64 * D * 2);
      send_A(first_head, side);
      bring_tokens<D>(m.B[side], side ? maps.v : maps.k, p, c, head, m.side_full + side);
      for (int b = 0; b < BANKS; ++b) bring_state<D>(m.H[side][b], states, ((c.slot * p.H + head) * 2 + side) * D, m.side_full + side, b);
    }
    arrive_expecting(&m.S_full, sizeof(m.S));
    for (int b = 0; b < BANKS; ++b) bulk_load(m.S[b], image[b].S, sizeof(m.S[b]), &m.S_full);
  }
  if (threadIdx.x < BANKS * kSlots && !cut) m.in[threadIdx.x] = image[threadIdx.x / kSlots].in[threadIdx.x % kSlots];
  __syncthreads();
  wait(&m.S_full, 0);
  if (cut) return exact_queries<E, D, BANKS>(p, memory + kept(0), boundary, w, heads);
  float R[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 x = reinterpret_cast<const float4*>(image[bank].R)[half * 512 + t * 128 + tid];
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
    if (Shared::ahead) __syncthreads();  // Y is done with
    float o[4][4], dp[4][4], d[2], b[2];
    {
      float x[8][4], other[2];
      scores<E, D, false>(x, other, m.A(half), m.B[half], m.H[half][bank], m.S[bank][0], m.in + bank * kSlots, warp);
      if (!Shared::ahead) __syncthreads();  // A is done with
      give_half(m.given(bank, half), x, half, tid);
      if ((lane_id() & 3) == 0) sums.diagonal[half][bank][row] = other[0], sums.diagonal[half][bank][row + 8] = other[1];
      __syncthreads();  // with two banks A is done with
      if (Shared::ahead && threadIdx.x == 0 && !last) send_next_A(q_head + 1, 0), send_next_A(q_head + 1, 1);
      take_half(o, dp, x, m.given(bank, !half), half, tid);
#pragma unroll
      for (int h = 0; h < 2; ++h) d[h] = sums.diagonal[0][bank][row + 8 * h], b[h] = sums.diagonal[1][bank][row + 8 * h];
    }

    float y[4][4];  // e in the place of o, Yk in that of dp, Yv in y
    {
      float s[4][4];
      strengths(s, m.S[bank][0], R, half, row);
      times(o, R), times(dp, R);
      cotangents(o, dp, y, s, R, d, b, sums.of, own, bank * kSlots + half * 32, p.M, scale, row, [] { __syncthreads(); });
    }
    __syncthreads();  // what lies in Y is done with
    store_half(m.Y[0] + bank * 2 * kTile, dp, half, warp);
    store_half(m.Y[1] + bank * 2 * kTile, y, half, warp);
    publish();
    __syncthreads();
    Saved<E>* const save = w.saved + (c.slot * p.HQ + q_head) * BANKS;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int x = 0; x < 4 * BANKS; ++x) {
        const int b = x / 4, side = x / 2 % 2, part = x % 2;
        bulk_store(save[b].Y[side][part], m.Y[side] + (b * 2 + part) * kTile, kTile * 2);
      }
      bulk_commit();
    }
    save_e(w.saved[(c.slot * p.HQ + first_head) * BANKS + bank].e, o, q_head == first_head, half, tid);
    {  // dq
      float x[8][4];
      hand_over(x);
      products_begin();
#pragma unroll
      for (int b = 0; b < BANKS; ++b) {
        const E* Y = m.Y[0] + b * 2 * kTile;
        product<E, 4, 0, 0>(x, kmajor(Y), kmajor(m.S[b][0]), b > 0);
        product<E, 4, 0, 0>(x, kmajor(Y + kTile), kmajor(m.S[b][0]), true);
        product<E, 4, 0, 0>(x, kmajor(Y), kmajor(m.S[b][1]), true);
      }
      products_commit();
      typename Arith<E>::template Op<64> Yref = operand_times(m.Y[0], m.in, warp);
      products_wait<0>();
      hand_over(x);
      if (!Shared::ahead) arrive(&m.Y_free);
      keep<true, 0>(x, warp);
      const auto dA1 = operand<E>(x);
      float dq[width / 8][4];
      zero(dq);
      hand_over(dq);
      products_begin();
      product<E, 1>(dq, dA1, mnmajor(columns<E>(m.B[0], own * width)));
#pragma unroll
      for (int b = 0; b < BANKS; ++b) {
        if (b) Yref = operand_times(m.Y[0] + b * 2 * kTile, m.in + b * kSlots, warp);
        product<E, 0>(dq, Yref, kmajor(m.H[0][b] + own * width * 64));
      }
      products_commit();
      if (threadIdx.x == 0) {
        bulk_wait();
        if (!Shared::ahead && !last) {
          send_next_A(q_head + 1, 1);
          wait(&m.Y_free, turn);
          send_next_A(q_head + 1, 0);
        }
      }
      products_wait<0>();
      hand_over(dq);
      store_window<E>(rows_of(p.dq, c, q_head), dq, warp, 0, c.length, own * width);
    }
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
    launch_early("hopper_queries", queries_kernel<E, D, BANKS>, slots * p.H * (r / heads), 256 * BANKS, queries_shared<E, D, BANKS>(), p.stream, p,
                 static_cast<const E*>(boundary), Backward<E>(w), heads, input_maps(p), boundary_map(p, boundary));
  });
}

}  // namespace gsa::cuda
