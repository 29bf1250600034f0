// Chunked forward for Hopper (sm_90a), in parts: what is left of a chunk once the state before it is there. One block for each chunk and key/value head; the query
// heads of a group one after the other.
//
//     X  = tril(q k^T)                                o1 = R (exp(ref) (q Hk) + X S)               p = softmax(scale o1)
//     P  = p R
//     A2 = tril(P S^T)                                o  = A2 v + (P exp(ref)) Hv
//
// S, R, ref are those of hopper_gates.cu, the states those of hopper_scan.cu. Two warpgroups for a bank, each with 32 slots (o1, p, P) and its share of the dimensions
// (o); what is [64 x 64] tokens is made by all. Operands in two parts: X, S, P, A2, except P exp(ref). With one bank two blocks on a multiprocessor: while one waits
// the other works. A chunk of several windows: o1, A2 and P exp(G) token by token (core/exact.cuh), in a branch of its own.
//
//     shared memory      written by            read until                                                      in a chunk of several windows
//     q                  copies                o1 is there: then the next head's is on its way                 later X, then A2; p exp(G)
//     k, Hk              copies                the end                                                         the same, for each head anew
//     v; Hv              copies                the end
//     S (two parts), in  bulk copy             the end                                                         exp(g)
//     P (two parts)      all                   o                                                               s
//     sums               all                   P: log2 of the sum of 2^(o1 scale log2 e) over a warpgroup's slots, of every row
#include "core/exact.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D, int BANKS>
struct OutputShared {
  static constexpr int tokens = 64 * D, first = std::max((2 + BANKS) * tokens, 2 * BANKS * 2 * kTile);
  alignas(1024) E qkH[first], Hv[BANKS][tokens], v[tokens], S[BANKS][2][kTile], P[BANKS][2][kTile];
  float in[BANKS * kSlots], sums[2 * BANKS][64];
  uint64_t S_full, q_full, v_full;  // q, with the first one k and Hk; v and Hv
  __device__ E* q() { return qkH; }
  __device__ E* k() { return qkH + tokens; }
  __device__ E* Hk(int bank) { return qkH + (2 + bank) * tokens; }
  // Of a chunk of several windows: exp(g), s; in the place of q, k, Hk: X, then A2; o1, then p, then p exp(G).
  __device__ float* exact_a(int bank) { return reinterpret_cast<float*>(S[bank]); }
  __device__ float* exact_s(int bank) { return reinterpret_cast<float*>(P[bank]); }
  __device__ float* exact_X(int bank) { return reinterpret_cast<float*>(qkH) + bank * kTile; }
  __device__ float* exact_O(int bank) { return reinterpret_cast<float*>(qkH) + (BANKS + bank) * kTile; }
};
static_assert(sizeof(OutputShared<bf16, 128, 1>) <= 113 * 1024 && sizeof(OutputShared<bf16, 128, 2>) <= 227 * 1024);

// A chunk of several windows, whose tokens and states are on their way. Finds everything anew: what the usual way keeps in registers is its own.
template <class E, int D, int BANKS>
__device__ __forceinline__ void exact_output(const ForwardParams& p, char* memory, const E* boundary, int heads) {
#if GSA_HOPPER
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);
  const int r = p.HQ / p.H, turns = r / heads, block = kept(blockIdx.x), slot = block / turns / p.H, head = block / turns % p.H;
  const int first_head = head * r + block % turns * heads;
  Chunk c;
  if (!find_chunk(p, slot, kChunk, c)) return;
  {
    auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory);
    const int bank = threadIdx.x / kExactThreads;
    exact_gates<E>(p, slot, head, bank, m.exact_a(bank), m.exact_s(bank));
  }
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head) {
    auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory + kept(0));
    const int thread = kept(threadIdx.x), own = __shfl_sync(0xffffffffu, thread / 128, 0), bank = own / 2, half = own % 2;
    const int warp = __shfl_sync(0xffffffffu, thread % 128 / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
    float *const a = m.exact_a(bank), *const s = m.exact_s(bank), *const X = m.exact_X(bank), *const O = m.exact_O(bank);
    if (q_head > first_head) {
      const E* const states = boundary + (c.slot * p.H + head) * 2 * int64_t(D) * p.M;
      __syncthreads();  // X and O are done with
      load_tokens<D, kThreads>(m.q(), rows_of(p.q, c, q_head), c.length, threadIdx.x);
      load_tokens<D, kThreads>(m.k(), rows_of(p.k, c, head), c.length, threadIdx.x);
      for (int b = 0; b < BANKS; ++b) load_state<D, kThreads>(m.Hk(b), states, p.M, threadIdx.x, b);
      cp_async_commit();
    }
    if (q_head == first_head) wait(&m.q_full, 0), wait(&m.v_full, 0);
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

template <class E, int D, int BANKS>
__global__ __launch_bounds__(256 * BANKS, 3 - BANKS) void output_kernel(const __grid_constant__ ForwardParams p, const E* boundary, const GateImage<E>* images,
                                                                        int heads, const __grid_constant__ InputMaps maps,
                                                                        const __grid_constant__ CUtensorMap states) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);  // dimensions of a warpgroup
  auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory);
  const int r = p.HQ / p.H, turns = r / heads;
  const int head = blockIdx.x / turns % p.H, first_head = head * r + blockIdx.x % turns * heads;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / turns / p.H, kChunk, c)) {
    for (int i = 0; i < heads; ++i) zero_padding(p, c.seq.n, first_head + i, (blockIdx.x / turns / p.H - c.seq.slot) * kChunk, kChunk);
    return;
  }
  const GateImage<E>* const image = images + (c.slot * p.H + head) * BANKS;
  const bool cut = image->cut;
  // Everything is on its way before anything is waited for.
  if (threadIdx.x == 0) {
    init(&m.S_full, 1), init(&m.q_full, 1), init(&m.v_full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    constexpr uint32_t bytes = 64 * D * 2;
    const int64_t rows = (c.slot * p.H + head) * 2 * D;
    arrive_expecting(&m.q_full, (2 + BANKS) * bytes);
    bring_tokens<D>(m.q(), maps.q, p, c, first_head, &m.q_full);
    bring_tokens<D>(m.k(), maps.k, p, c, head, &m.q_full);
    for (int b = 0; b < BANKS; ++b) bring_state<D>(m.Hk(b), states, rows, &m.q_full, b);
    if (!cut) {
      arrive_expecting(&m.S_full, sizeof(m.S) + sizeof(m.in));
      for (int b = 0; b < BANKS; ++b) {
        bulk_load(m.S[b], image[b].S, sizeof(m.S[b]), &m.S_full);
        bulk_load(m.in + b * kSlots, image[b].in, kSlots * 4, &m.S_full);
      }
    }
    arrive_expecting(&m.v_full, (1 + BANKS) * bytes);
    bring_tokens<D>(m.v, maps.v, p, c, head, &m.v_full);
    for (int b = 0; b < BANKS; ++b) bring_state<D>(m.Hv[b], states, rows + D, &m.v_full, b);
  }
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), bank = own / 2, half = own % 2, tid = threadIdx.x % 128;
  __syncthreads();
  if (cut) return exact_output<E, D, BANKS>(p, memory + kept(0), boundary, heads);
  float R[4][4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 x = reinterpret_cast<const float4*>(image[bank].R)[half * 512 + t * 128 + tid];
    R[t][0] = x.x, R[t][1] = x.y, R[t][2] = x.z, R[t][3] = x.w;
  }
  wait(&m.S_full, 0);

  uint32_t turn = 0;
#pragma unroll 1
  for (int q_head = first_head; q_head < first_head + heads; ++q_head, turn ^= 1) {
    // Addresses are made where they are used: there are no registers to keep them in.
    auto& m = *reinterpret_cast<OutputShared<E, D, BANKS>*>(memory + kept(0));
    const int thread = kept(threadIdx.x), warp = __shfl_sync(0xffffffffu, thread % 128 / 32, 0);
    wait(&m.q_full, turn);
    __syncthreads();  // P and the sums are done with
    float o1[4][4], none[2];
    scores<E, D, true>(o1, none, m.q(), m.k(), m.Hk(bank) + half * 32, m.S[bank][0] + half * 32, m.in + own * 32, warp);
    times(o1, R);
    softmax_of_shares(o1, static_cast<float>(p.scale) * 1.4426950408889634f, p.M, m.sums, own, warp * 16 + frag_row());  // q is done with
    if (thread == 0 && q_head + 1 < first_head + heads) {
      arrive_expecting(&m.q_full, 64 * D * 2);
      bring_tokens<D>(m.q(), maps.q, p, c, q_head + 1, &m.q_full);
    }
    times(o1, R);
    {
      const auto P = split<E>(o1);
      store_operand<E>(m.P[bank][0], P.hi, warp, half * 32);
      store_operand<E>(m.P[bank][1], P.lo, warp, half * 32);
    }
    wait(&m.v_full, 0);
    publish();
    __syncthreads();
    float x[8][4];
    hand_over(x);
    products_begin();
#pragma unroll
    for (int b = 0; b < BANKS; ++b) {
      product<E, 4, 0, 0>(x, kmajor(m.P[b][0]), kmajor(m.S[b][0]), b > 0);
      product<E, 4, 0, 0>(x, kmajor(m.P[b][1]), kmajor(m.S[b][0]), true);
      product<E, 4, 0, 0>(x, kmajor(m.P[b][0]), kmajor(m.S[b][1]), true);
    }
    products_commit();
    typename Arith<E>::template Op<64> P_in = operand_times(m.P[0][0], m.in, warp);
    products_wait<0>();
    hand_over(x);
    keep<true, 0>(x, warp);
    const auto A2 = split<E>(x);
    float o[width / 8][4];
    zero(o);
    hand_over(o);
    products_begin();
    product<E, 1>(o, A2.hi, mnmajor(columns<E>(m.v, own * width)));
    product<E, 1>(o, A2.lo, mnmajor(columns<E>(m.v, own * width)));
#pragma unroll
    for (int b = 0; b < BANKS; ++b) {
      if (b) P_in = operand_times(m.P[b][0], m.in + b * kSlots, warp);
      product<E, 0>(o, P_in, kmajor(m.Hv[b] + own * width * 64));
    }
    products_commit();
    products_wait<0>();
    hand_over(o);
    store_window<E>(rows_of(p.o, c, q_head), o, warp, 0, c.length, own * width);
  }
#endif
}

}  // namespace

void hopper_output(const ForwardParams& p, const void* boundary, const void* images) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  const int r = p.HQ / p.H;
  const int heads = slots * p.H >= 8 * hopper_multiprocessors() ? r : 1;  // of one block
  select_banks(p, [&]<class E, int D, int BANKS>() {
    launch_early("hopper_output", output_kernel<E, D, BANKS>, slots * p.H * (r / heads), 256 * BANKS, sizeof(OutputShared<E, D, BANKS>), p.stream, p,
                 static_cast<const E*>(boundary), static_cast<const GateImage<E>*>(images), heads, input_maps(static_cast<const Params&>(p)),
                 boundary_map(p, boundary));
  });
}

}  // namespace gsa::cuda
