// Chunked forward for Hopper (sm_90a), in parts: what is left of a chunk once the state before it is there. One block for each chunk and key/value head; the
// query heads of a group one after the other.
//
//     X  = tril(q k^T)                                o1 = R (exp(ref) (q Hk) + X S)               p = softmax(scale o1)
//     P  = p R
//     A2 = tril(P S^T)                                o  = A2 v + (P exp(ref)) Hv
//
// S, R, ref are those of hopper_gates.cu, the states those of hopper_scan.cu. Operands in two parts: X, S, P, A2, except P exp(ref). A chunk of several
// windows: o1, A2 and P exp(G) token by token (core/exact.cuh), in a branch of its own.
//
// One bank: output_kernel. Two warpgroups, each with 32 slots (o1, p, P) and half of the dimensions (o); what is [64 x 64] tokens is made by both. Two blocks
// on a multiprocessor: while one waits the other works.
//
// Two banks: pairs_kernel. Four warpgroups, a pair for each of two query heads beside each other, which wait for each other nowhere; one of a pair for each
// bank, with X, and o1, P, A2 and o of its bank's slots: o is a sum over the banks, for which the two give each other half of the dimensions. P and A2 stay in
// registers. A query head without another beside it is done by both pairs, half of the dimensions each. A block for each multiprocessor has one chunk and
// key/value head (a unit, core/units.cuh) after the other: the pair that is the last to be done with k and Hk sends for the next unit's, while it goes on with
// its heads, and with S, v and Hv likewise. Chunks of several windows go through it like any other, and are made once more when all are through.
//
//     shared memory      written by            read until                                                      in a chunk of several windows
//     q                  copies                o1 is there: then the next head's is on its way                 later X, then A2; p exp(G)
//     k, Hk              copies                the end                                                         the same, for each head anew
//     v; Hv              copies                the end
//     S (two parts), in  bulk copy             the end                                                         exp(g)
//     P (two parts)      all                   o                                                               s
//     sums               all                   P: log2 of the sum of 2^(o1 scale log2 e) over a warpgroup's slots, of every row
//
// Two banks: q of the second pair is `next`; in the place of P, for each warp, P exp(ref), then what the two of a pair give each other of o, as accumulators
// lie, read before the next head's sums are.
#include "core/exact.cuh"
#include "core/select.cuh"
#include "core/units.cuh"
#include "core/wide.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

struct UnitsOfPairs {
  Unit unit[2][2];        // of a pair, this one and the next
  int done[2], some_cut;  // how many pairs needed no more of a unit's k and Hk; S, v and Hv. Of the block's units
};
template <class E, int D, int BANKS>
struct OutputShared {
  static constexpr int tokens = 64 * D, first = std::max((2 + BANKS) * tokens, 2 * BANKS * 2 * kTile);
  alignas(1024) E qkH[first], Hv[BANKS][tokens], v[tokens], S[BANKS][2][kTile], P[BANKS][2 * BANKS][kTile];
  alignas(BANKS == 1 ? 16 : 1024) E next[BANKS == 1 ? 8 : tokens];
  float in[BANKS * kSlots], sums[2 * BANKS][64];
  alignas(16) int cut[4];      // with S: whether there are several windows
  std::conditional_t<BANKS == 1, char, UnitsOfPairs> units;
  uint64_t S_full, q_full[2], k_full, v_full;  // q of each pair; k and Hk; v and Hv
  __device__ E* q(int pair = 0) { return pair ? next : qkH; }
  __device__ float* given(int pair, int bank) { return reinterpret_cast<float*>(P[pair]) + bank * kTile; }
  __device__ E* k() { return qkH + tokens; }
  __device__ E* Hk(int bank) { return qkH + (2 + bank) * tokens; }
  // Of a chunk of several windows: exp(g), s; in the place of q, k, Hk: X, then A2; o1, then p, then p exp(G).
  __device__ float* exact_a(int bank) { return reinterpret_cast<float*>(S[bank]); }
  __device__ float* exact_s(int bank) { return reinterpret_cast<float*>(P[bank]); }
  __device__ float* exact_X(int bank) { return reinterpret_cast<float*>(qkH) + bank * kTile; }
  __device__ float* exact_O(int bank) { return reinterpret_cast<float*>(qkH) + (BANKS + bank) * kTile; }
};
static_assert(sizeof(OutputShared<bf16, 128, 1>) <= 113 * 1024 && sizeof(OutputShared<bf16, 128, 2>) <= 227 * 1024);

// A chunk of several windows; with one bank its tokens and states are on their way. Finds everything anew: what the usual way keeps in registers is its own.
template <class E, int D, int BANKS>
__device__ __forceinline__ void exact_output(const ForwardParams& p, char* memory, const E* boundary, int heads, int number) {
#if GSA_HOPPER
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);
  Unit unit;
  if (!find_unit(p, kept(number), heads, unit)) return;
  const Chunk& c = unit.chunk;
  const int head = unit.head, first_head = unit.first_head;
  {
    auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory);
    const int bank = threadIdx.x / kExactThreads;
    exact_gates<E>(p, c.slot, head, bank, m.exact_a(bank), m.exact_s(bank));
  }
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head) {
    auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory + kept(0));
    const int thread = kept(threadIdx.x), own = __shfl_sync(0xffffffffu, thread / 128, 0), bank = own / 2, half = own % 2;
    const int warp = __shfl_sync(0xffffffffu, thread % 128 / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
    float *const a = m.exact_a(bank), *const s = m.exact_s(bank), *const X = m.exact_X(bank), *const O = m.exact_O(bank);
    if (BANKS > 1 || q_head > first_head) {
      const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
      __syncthreads();  // X and O are done with
      load_tokens<D, kThreads>(m.q(), rows_of(p.q, c, q_head), c.length, threadIdx.x);
      load_tokens<D, kThreads>(m.k(), rows_of(p.k, c, head), c.length, threadIdx.x);
      if (q_head == first_head) {
        load_tokens<D, kThreads>(m.v, rows_of(p.v, c, head), c.length, threadIdx.x);
        for (int b = 0; b < BANKS; ++b) load_state<D, kThreads>(m.Hv[b], states + int64_t(D) * p.M, p.M, threadIdx.x, b);
      }
      for (int b = 0; b < BANKS; ++b) load_state<D, kThreads>(m.Hk(b), states, p.M, threadIdx.x, b);
      cp_async_commit();
    }
    if (BANKS == 1 && q_head == first_head) wait(m.q_full, 0), wait(&m.k_full, 0), wait(&m.v_full, 0);
    cp_async_wait_for<0>();
    publish();
    __syncthreads();
    {
      float x[4][4], o1[4][4];
      hand_over(x);
      hand_over(o1);
      products_begin();
      product<E, D / 16, 0, 0>(x, kmajor(m.q()), kmajor(m.k() + half * 32 * 64), false);
      product<E, D / 16, 0, 1>(o1, kmajor(m.q()), mnmajor(m.Hk(bank) + half * 32), false);
      products_commit();
      products_wait<0>();
      hand_over(x);
      hand_over(o1);
      __syncthreads();  // q, k and Hk are done with
      store_R(X, x, row, col);
      store_R(O, o1, row, col);
      __syncthreads();
      exact_apply_with_diagonal(a, s, O, X);
      __syncthreads();
      load_R(o1, O, row, col);
      softmax_of_shares(o1, static_cast<float>(p.scale) * 1.4426950408889634f, p.M, m.sums, own, row);  // everybody has read O
      store_R(O, o1, row, col);
      __syncthreads();
      exact_contract(a, s, O, X);
    }
    __syncthreads();
    float o[width / 8][4];
    zero(o);
    float x[8][4];
    load_R(x, m.exact_X(0), row, frag_col());
    if constexpr (BANKS > 1) {
      float y[8][4];
      load_R(y, m.exact_X(1), row, frag_col());
      add(x, y);
    }
    const auto A2 = split<E>(x);
    load_R(x, m.exact_O(0), row, frag_col());
    auto P_in = operand<E>(x);
    hand_over(o);
    products_begin();
    product<E, 1>(o, A2.hi, mnmajor(columns<E>(m.v, own * width)));
    product<E, 1>(o, A2.lo, mnmajor(columns<E>(m.v, own * width)));
    product<E, 0>(o, P_in, kmajor(m.Hv[0] + own * width * 64));
    products_commit();
    products_wait<0>();
    hand_over(o);
    if constexpr (BANKS > 1) {
      load_R(x, m.exact_O(1), row, frag_col());
      P_in = operand<E>(x);
      hand_over(o);
      products_begin();
      product<E, 0>(o, P_in, kmajor(m.Hv[1] + own * width * 64));
      products_commit();
      products_wait<0>();
      hand_over(o);
    }
    store_window<E>(rows_of(p.o, c, q_head), o, warp, 0, c.length, own * width);
  }
#endif
}

// On their way, by one thread: k and Hk; S, v and Hv. (S is of no use where the chunk has several windows.)
template <class E, int D, int BANKS>
__device__ __forceinline__ void send_keys(OutputShared<E, D, BANKS>& m, const ForwardParams& p, const Chunk& c, int head, const InputMaps& maps,
                                          const CUtensorMap& states) {
  arrive_expecting(&m.k_full, (1 + BANKS) * 64 * D * 2);
  bring_tokens<D, true>(m.k(), maps.k, p, c, head, &m.k_full);
  for (int b = 0; b < BANKS; ++b) bring_state<D>(m.Hk(b), states, (c.slot * p.H + head) * 2 * D, &m.k_full, b);
}
template <class E, int D, int BANKS>
__device__ __forceinline__ void send_values(OutputShared<E, D, BANKS>& m, const ForwardParams& p, const Chunk& c, int head, const GateImage<E>* images,
                                            const InputMaps& maps, const CUtensorMap& states) {
  const int64_t at = c.slot * p.H + head;
  arrive_expecting(&m.S_full, sizeof(m.S) + sizeof(m.in) + sizeof(m.cut));
  for (int b = 0; b < BANKS; ++b) {
    bulk_load(m.S[b], images[at * BANKS + b].S, sizeof(m.S[b]), &m.S_full);
    bulk_load(m.in + b * kSlots, images[at * BANKS + b].in, kSlots * 4, &m.S_full);
  }
  bulk_load(m.cut, &images[at * BANKS].cut, sizeof(m.cut), &m.S_full);
  arrive_expecting(&m.v_full, (1 + BANKS) * 64 * D * 2);
  bring_tokens<D, true>(m.v, maps.v, p, c, head, &m.v_full);
  for (int b = 0; b < BANKS; ++b) bring_state<D>(m.Hv[b], states, (at * 2 + 1) * D, &m.v_full, b);
}
template <class E, int D, int BANKS>
__device__ __forceinline__ void send_queries(OutputShared<E, D, BANKS>& m, const ForwardParams& p, const Chunk& c, int head, int pair, const InputMaps& maps) {
  arrive_expecting(m.q_full + pair, 64 * D * 2);
  bring_tokens<D, true>(m.q(pair), maps.q, p, c, head, m.q_full + pair);
}
template <class E, int D, int BANKS>
__device__ __forceinline__ void init_barriers(OutputShared<E, D, BANKS>& m) {
  init(&m.S_full, 1), init(&m.k_full, 1), init(&m.v_full, 1), init(m.q_full, 1), init(m.q_full + 1, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

template <class E, int D>
__global__ __launch_bounds__(256, 2) void output_kernel(const __grid_constant__ ForwardParams p, const E* boundary, const GateImage<E>* images, int heads,
                                                        const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  constexpr int width = D / 2;  // dimensions of a warpgroup
  using Shared = OutputShared<E, D, 1>;
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c)) {
    for (int i = 0; i < heads; ++i) zero_padding(p, c.seq.n, first_head + i, (blockIdx.x / turns / p.H - c.seq.slot) * kChunk, kChunk);
    return;
  }
  const GateImage<E>* const image = images + (c.slot * p.H + head);
  const bool cut = image->cut;
  if (threadIdx.x == 0) {  // before anything is waited for
    auto& m = *reinterpret_cast<Shared*>(memory);
    init_barriers(m);
    send_queries(m, p, c, first_head, 0, maps);
    send_keys(m, p, c, head, maps, states);
    send_values(m, p, c, head, images, maps, states);
  }
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  __syncthreads();
  if (cut) wait(&reinterpret_cast<Shared*>(memory)->S_full, 0);
  if (cut) return exact_output<E, D, 1>(p, memory + kept(0), boundary, heads, blockIdx.x);
  float R[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 x = reinterpret_cast<const float4*>(image->R)[half * 512 + t * 128 + tid];
    R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
  }
  {
    auto& m = *reinterpret_cast<Shared*>(memory);
    wait(&m.S_full, 0), wait(&m.k_full, 0);
  }

  uint32_t turn = 0;
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head, turn ^= 1) {
    // Addresses are made where they are used: there are no registers to keep them in.
    auto& m = *reinterpret_cast<Shared*>(memory + kept(0));
    const int thread = kept(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread % 128 / 32, 0);
    wait(m.q_full, turn);
    __syncthreads();  // P and the sums are done with
    float o1[4][4], none[2];
    scores<E, D, true>(o1, none, m.q(), m.k(), m.Hk(0) + half * 32, m.S[0][0] + half * 32, m.in + half * 32, warp);
    times(o1, R);
    softmax_of_shares(o1, static_cast<float>(p.scale) * 1.4426950408889634f, p.M, m.sums, half, warp * 16 + frag_row());  // q is done with
    if (thread == 0 && q_head + 1 < first_head + heads) { send_queries(m, p, c, q_head + 1, 0, maps); }
    times(o1, R);
    {
      const auto P = split<E>(o1);
      store_operand<E>(m.P[0][0], P.hi, warp, half * 32);
      store_operand<E>(m.P[0][1], P.lo, warp, half * 32);
    }
    wait(&m.v_full, 0);
    publish();
    __syncthreads();
    float x[8][4];
    hand_over(x);
    products_begin();
    product<E, 4, 0, 0>(x, kmajor(m.P[0][0]), kmajor(m.S[0][0]), false);
    product<E, 4, 0, 0>(x, kmajor(m.P[0][1]), kmajor(m.S[0][0]), true);
    product<E, 4, 0, 0>(x, kmajor(m.P[0][0]), kmajor(m.S[0][1]), true);
    products_commit();
    const auto P_in = operand_times(m.P[0][0], m.in, warp);
    products_wait<0>();
    hand_over(x);
    keep<true, 0>(x, warp);
    const auto A2 = split<E>(x);
    float o[width / 8][4];
    zero(o);
    hand_over(o);
    products_begin();
    product<E, 1>(o, A2.hi, mnmajor(columns<E>(m.v, half * width)));
    product<E, 1>(o, A2.lo, mnmajor(columns<E>(m.v, half * width)));
    product<E, 0>(o, P_in, kmajor(m.Hv[0] + half * width * 64));
    products_commit();
    products_wait<0>();
    hand_over(o);
    store_window<E>(rows_of(p.o, c, q_head), o, warp, 0, c.length, half * width);
  }
#endif
}

template <class E, int D>
__global__ __launch_bounds__(512, 1) void pairs_kernel(const __grid_constant__ ForwardParams p, const E* boundary, const GateImage<E>* images, int heads,
                                                       int units, const __grid_constant__ InputMaps maps, const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  constexpr int width = D / 2;  // dimensions that a warpgroup has of the sum over the banks
  using Shared = OutputShared<E, D, 2>;
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), pair = own / 2, bank = own % 2;
  // By one thread of each pair.
  auto find_next = [&](Shared& m, Unit& u, int number) {
#pragma unroll 1
    for (; number < units; number += gridDim.x) {
      if (find_unit(p, number, heads, u)) return true;
      if (p.state_indices) m.units.some_cut = 1;
    }
    u.number = -1;
    return false;
  };
  if (threadIdx.x == 0) {
    auto& m = *reinterpret_cast<Shared*>(memory);
    init_barriers(m);
    m.units.done[0] = m.units.done[1] = m.units.some_cut = 0;
  }
  __syncthreads();
  if (threadIdx.x % 256 == 0) {
    auto& m = *reinterpret_cast<Shared*>(memory);
    Unit& unit = m.units.unit[pair][0];
    if (find_next(m, unit, blockIdx.x)) {
      send_queries(m, p, unit.chunk, unit.first_head + min(pair, heads - 1), pair, maps);
      if (pair == 0) send_keys(m, p, unit.chunk, unit.head, maps, states);
      else send_values(m, p, unit.chunk, unit.head, images, maps, states);
    }
  }
  __syncthreads();

  uint32_t round = 0, turn = 0;
  int first = 0;
#pragma unroll 1
  for (;; turn ^= 1) {  // query heads, two at a time, and units of them
    // Addresses are made where they are used: there are no registers to keep them in.
    auto& m = *reinterpret_cast<Shared*>(memory + kept(0));
    const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
    const Unit& unit = m.units.unit[pair][round];
    if (unit.number < 0) break;
    const bool together = first + 1 == heads, last = first + 2 >= heads;
    wait(m.q_full + pair, turn);
    if (first == 0) wait(&m.k_full, round);
    float o1[8][4];
    {
      float x[8][4];
      hand_over(x);
      hand_over(o1);
      products_begin();
      product<E, D / 16, 0, 0>(x, kmajor(m.q(pair)), kmajor(m.k()), false);
      products_commit();
      product<E, D / 16, 0, 1>(o1, kmajor(m.q(pair)), mnmajor(m.Hk(bank)), false);
      products_commit();
      products_wait<1>();
      hand_over(x);
      keep<true, 0>(x, warp);
      const auto X = split<E>(x);
      products_wait<0>();
      hand_over(o1);
      if (first == 0) {
        wait(&m.S_full, round);
        if (threadIdx.x == 0 && m.cut[0]) m.units.some_cut = 1;  // o will be made again
      }
      scale_columns(o1, m.in + bank * kSlots);
      hand_over(o1);
      products_begin();
      product<E, 1>(o1, X.hi, mnmajor(m.S[bank][0]));
      product<E, 1>(o1, X.lo, mnmajor(m.S[bank][0]));
      product<E, 1>(o1, X.hi, mnmajor(m.S[bank][1]));
      products_commit();
    }
    float* const given = m.given(pair, bank) + warp * 1024;  // this warp's
    {
      const float4* const R_own = reinterpret_cast<const float4*>(images[(unit.chunk.slot * p.H + unit.head) * 2 + bank].R) + tid;
      float R[8][4];
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float4 x = R_own[t * 128];
        R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
      }
      products_wait<0>();
      hand_over(o1);
      times(o1, R);
      softmax_of_shares(o1, static_cast<float>(p.scale) * 1.4426950408889634f, p.M - bank * kSlots, *reinterpret_cast<float (*)[2][64]>(m.sums[2 * pair]), bank,
                        warp * 16 + frag_row(), [&] { sync(1 + pair, 256); });  // q is done with, and what was given
      if (threadIdx.x % 256 == 0) {
        if (!last) {
          send_queries(m, p, unit.chunk, unit.first_head + min(first + 2 + pair, heads - 1), pair, maps);
        } else {
          Unit& next = m.units.unit[pair][round ^ 1];
          const bool more = find_next(m, next, unit.number + gridDim.x);
          if (more) send_queries(m, p, next.chunk, next.first_head + min(pair, heads - 1), pair, maps);
          if (count(m.units.done) % 2 && more) send_keys(m, p, next.chunk, next.head, maps, states);
        }
      }
      times(o1, R);
    }
    float x[8][4];
    {
      const auto P = split<E>(o1);
      scale_columns(o1, m.in + bank * kSlots);
      store_operand<E>(reinterpret_cast<E*>(given), operand<E>(o1), 0);
      zero(x);
      hand_over(x);
      products_begin();
      product<E, 0>(x, P.hi, kmajor(m.S[bank][0]));
      product<E, 0>(x, P.lo, kmajor(m.S[bank][0]));
      product<E, 0>(x, P.hi, kmajor(m.S[bank][1]));
      products_commit();
      products_wait<0>();
      hand_over(x);
    }
    keep<true, 0>(x, kept(warp));
    const auto A2 = split<E>(x);
    if (first == 0) wait(&m.v_full, round);
    typename Arith<E>::template Op<64> P_in;
    __syncwarp();
    load_operand<E>(P_in, reinterpret_cast<const E*>(given), 0);
    const bool gives = !together || bank == 1, keeps = !together || bank == 0;
    float o[width / 8][4];
#pragma unroll 1
    for (int i = !gives; i <= keeps; ++i) {
      const int part = together ? pair : i ? bank : !bank;  // of the dimensions
      zero(o);
      hand_over(o);
      products_begin();
      product<E, 0>(o, P_in, kmajor(m.Hv[bank] + part * width * 64));
      product<E, 1>(o, A2.hi, mnmajor(columns<E>(m.v, part * width)));
      product<E, 1>(o, A2.lo, mnmajor(columns<E>(m.v, part * width)));
      products_commit();
      products_wait<0>();
      hand_over(o);
      if (i == 0) {
        __syncwarp();
        put<width / 8, 32>(given, o, tid % 32);
      }
    }
    sync(1 + pair, 256);
    if (last && threadIdx.x % 256 == 0) {
      const Unit& next = m.units.unit[pair][round ^ 1];
      if (count(m.units.done + 1) % 2 && next.number >= 0) send_values(m, p, next.chunk, next.head, images, maps, states);
    }
    if (keeps) {
      float other[width / 8][4];
      get<width / 8, 32>(other, m.given(pair, !bank) + warp * 1024, tid % 32);
      add(o, other);
      store_window<E>(rows_of(p.o, unit.chunk, unit.first_head + first + (together ? 0 : pair)), o, warp, 0, unit.chunk.length,
                      (together ? pair : bank) * width);
    }
    if (first += 2; last) first = 0, round ^= 1;
  }
  __syncthreads();
  if (!reinterpret_cast<Shared*>(memory)->units.some_cut) return;
#pragma unroll 1
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    Unit unit;
    if (!find_unit(p, number, heads, unit)) {
      const Sequence& s = unit.chunk.seq;
      for (int i = 0; i < heads; ++i) zero_padding(p, s.n, unit.first_head + i, (number / (p.HQ / p.H / heads) / p.H - s.slot) * kChunk, kChunk);
    } else if (images[(unit.chunk.slot * p.H + unit.head) * 2].cut) {
      exact_output<E, D, 2>(p, memory + kept(0), boundary, heads, number);
    }
  }
#endif
}

}  // namespace

void hopper_output(const ForwardParams& p, const void* boundary, const void* images) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  const int r = p.HQ / p.H;
  const int heads = slots * p.H >= 8 * hopper_multiprocessors() ? r : 1;  // of one block
  const int64_t units = slots * p.H * (r / heads);
  select_banks(p, [&]<class E, int D, int BANKS>() {
    const auto* const gates = static_cast<const GateImage<E>*>(images);
    const InputMaps maps = input_maps(static_cast<const Params&>(p));
    if constexpr (BANKS == 1)
      launch_early("hopper_output", output_kernel<E, D>, units, 256, sizeof(OutputShared<E, D, 1>), p.stream, p, static_cast<const E*>(boundary), gates, heads,
                   maps, boundary_map(p, boundary));
    else
      launch_early("hopper_output", pairs_kernel<E, D>, std::min<int64_t>(units, hopper_multiprocessors()), 512, sizeof(OutputShared<E, D, 2>), p.stream, p,
                   static_cast<const E*>(boundary), gates, heads, static_cast<int>(units), maps, boundary_map(p, boundary));
  });
}

}  // namespace gsa::cuda
