// Chunked backward for Hopper (sm_90a), where each query head has keys and values of its own: one block for each sequence and head, or with few of them for a segment of
// one, whose end hopper_ends.cu has found the cotangents of; its chunks from the last to the first, the cotangents of its states in registers; nothing but inputs, gates
// (hopper_gates.cu), boundary states and gradients in memory. (Sequences with a chunk of several windows are left to hopper_fused.cu, or in segments to the parts, in
// further launches.) Per chunk, with keys on the left and values on the right:
//
//     A, B, H                q, k, Hk                                                d_o, v, Hv               H before the chunk
//     scores (hopper.cuh)    o1 = R (exp(ref) (q Hk) + tril(q k^T) S)                dp from d_o, v, Hv       without their diagonals
//     Y                      scale R p (dp - <p, dp>)                                R p                      p = softmax(scale o1)
//     e                      o1 do1 + p dp, o1 and dp without the diagonal
//                            dq = tril(Y S^T) k + (Y exp(ref)) Hk^T
//     W^T = triu(S Y^T)      dk = W^T q + S E                                        dv = W^T d_o + S E       E = exp(G_end - ref) dH
//     inner                  strict triu(k q^T) Y                                    strict triu(v d_o^T) Y
//     outer                  k E^T                                                   v E^T
//     dH <-                  exp(ref) (E + Y^T q)                                    exp(ref) (E + Y^T d_o)   cotangent before the chunk
//
// and then, inner and outer the sums of both sides:
//     ds_j = (inner + outer + diagonal of (B A^T) Y) / R
//     dg_t = sum_{u >= t} (e_u - S_u inner_u) + sum_{j < t} S_j outer_j + exp(G_end) <H, dH>     (sums, in fp32)
// Neither e nor inner has the diagonal, and what comes from after the chunk is summed from the front: nothing large is left to cancel (chunk_backward.cu).
//
// Four warpgroups, each with what it needs not wait for while the others are at work:
//     queries 0, 1           scores, one the keys' and one the values'; halves of the slots exchanged, Y, e;    then 0 has dq, 1 inner;    then ds and dg, half each
//     keys, values           tokens, states; E, outer, <H, dH>;                                                         then dk or dv, and dH
// What has to be more exact than 16 bits is an operand in two parts (16 + 16 bits): X in the scores and in inner, S, Y, W and E of the values.
//
//     shared memory               written by          read by              barriers (full / free)
//     A, B, H [side]              keys; values        all                  tokens_full, H_full / tokens_free and the warpgroup's own; H: keys_ready, then e (kOfQueries)
//                                                                          and half of inner (inner_full / Hk_free), which outer_free frees
//     gates (S, R, factors)       bulk copy           all                  gates_full / kOfQueries, done
//     E [side]                    its side            its side             the warpgroup's own
//     Y                           queries             all                  Y_full / done; before it what the queries exchange, after it the terms of dg
//     outer, edge [turn]          keys and values     queries              keys_ready / outer_free
#include "core/backward.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D>
struct WalkShared {
  E A[2][64 * D], B[2][64 * D], H[2][64 * D];
  E E0[2][64 * D], E1[64 * D];  // rounded; of the values, what rounding dropped
  E Y[2][2][kTile];  // [keys, values][part]
  GateImage<E> gates;
  float outer[kTile];
  float spare[D == 64 ? kTile + kTile / 2 : 4];
  float edge[2][2][kSlots], diagonal[2][64];  // [turn][side] exp(G_end) <H, dH>; of q k^T, of d_o v^T
  uint64_t gates_full, tokens_full, H_full, tokens_free, Y_full, keys_ready, outer_free, done, Hk_free, inner_full;
  int found;
  Sequence sequence;
  const float* begins[2];  // [side] where dH comes from, or nullptr: zeros
  bool first;  // segment: what is left of it is the initial states' cotangent
  __device__ Chunk chunk(const Params& p, int i) const { return chunk_of(p, sequence, i, kChunk); }
  __device__ float* given() { return reinterpret_cast<float*>(Y[0]); }
  __device__ RowSums<2>& sums() { return *reinterpret_cast<RowSums<2>*>(Y[1]); }
  // Where the states are done with, at 128 dimensions.
  __device__ float* e() { return D == 64 ? spare : reinterpret_cast<float*>(H[1]); }
  __device__ float* inner() { return D == 64 ? spare + kTile : reinterpret_cast<float*>(H[0]); }
};
using LargestWalk = WalkShared<bf16, 128>;
static_assert(sizeof(LargestWalk) <= 227 * 1024 && offsetof(LargestWalk, gates) % 1024 == 0);

// Addresses are made where they are used: there are no registers to keep them in.
template <class T>
__device__ inline T& anew(T& x) {
  return *reinterpret_cast<T*>(reinterpret_cast<char*>(&x) + kept(0));
}

[[maybe_unused]] constexpr int kOfQueries = 1, kOfKeys = 2;  // barriers of 256

// Queries 0 and 1.
template <class E, int D>
__device__ __forceinline__ void walk_queries(const BackwardParams& p, WalkShared<E, D>& shared, const E* boundary, const GateImage<E>* images, int chunks,
                                             int first_slot, int head, const int half) {
  constexpr uint32_t gate_bytes = offsetof(GateImage<E>, cut);
  auto load_gates = [&](int i) {
    if (i < 0 || threadIdx.x) return;
    auto& m = anew(shared);
    arrive_expecting(&m.gates_full, gate_bytes);
    bulk_load(&m.gates, images + int64_t(first_slot + i) * p.H + head, gate_bytes, &m.gates_full);
  };
  auto prefetch = [&](int i) {  // as far as the L2
    if (i < 0 || threadIdx.x) return;
    const int64_t at = int64_t(first_slot + i) * p.H + head;
    bulk_prefetch(images + at, gate_bytes);
    bulk_prefetch(boundary + at * 2 * D * p.M, 4 * D * p.M);
  };
  load_gates(chunks - 1);
  uint32_t turn = 0;  // of the chunk, the parity of its barriers
#pragma unroll 1
  for (int i = chunks - 1; i >= 0; --i) {
    auto& m = anew(shared);
    const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
    const float scale = static_cast<float>(p.scale);
    float o[4][4], dp[4][4], R[4][4];  // o1, then e; dp, then Yk
    prefetch(i - 1);
    {
      wait(&m.gates_full, turn);
      wait(&m.tokens_full, turn);
      float x[8][4], other[2];
      scores<E, D, false>(x, other, m.A[half], m.B[half], m.H[half], m.gates.S[0], m.gates.in, warp, m.diagonal[half], [&] { wait(&m.H_full, turn); });
      sync(kOfQueries, 256);  // the terms of dg are done with, and so is all of the chunk before
      give_half(m.given() + half * 64 * 32, x, half, tid);
      get_R(R, m.gates.R, row, half * 32);
      sync(kOfQueries, 256);
      take_half(o, dp, x, m.given() + !half * 64 * 32, half, tid);
    }
    {
      float y[4][4], s[4][4], d[2], b[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) d[h] = m.diagonal[0][row + 8 * h], b[h] = m.diagonal[1][row + 8 * h];
      strengths(s, m.gates.S[0], R, half, row);
      times(o, R), times(dp, R);
      cotangents(o, dp, y, s, R, d, b, m.sums(), half, half * 32, p.M, scale, row, [] { sync(kOfQueries, 256); });
      sync(kOfQueries, 256);  // what lies in Y is done with
      store_half(m.Y[0][0], dp, half, warp);
      store_half(m.Y[1][0], y, half, warp);
    }
    publish();
    arrive(&m.Y_full);
    wait(&m.keys_ready, turn);  // Hv is done with
    {
      float4* const to = reinterpret_cast<float4*>(m.e()) + half * 512 + tid;
#pragma unroll
      for (int t = 0; t < 4; ++t) to[t * 128] = make_float4(o[t][0], o[t][1], o[t][2], o[t][3]);
    }
    wait(&m.Y_full, turn);
    float inner[4][4];
    if (half == 0) {  // dq
      auto& m = anew(shared);
      const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
      float x[8][4];
      hand_over(x);
      products_begin();
      product<E, 4, 0, 0>(x, kmajor(m.Y[0][0]), kmajor(m.gates.S[0]), false);
      product<E, 4, 0, 0>(x, kmajor(m.Y[0][1]), kmajor(m.gates.S[0]), true);
      product<E, 4, 0, 0>(x, kmajor(m.Y[0][0]), kmajor(m.gates.S[1]), true);
      products_commit();
      const auto Yref = operand_times(m.Y[0][0], m.gates.in, warp);
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
        product<E, 1>(dq, dA1, mnmajor(m.B[0] + g * kTile));
        product<E, 0>(dq, Yref, kmajor(m.H[0] + g * kTile));
        products_commit();
        products_wait<0>();
        hand_over(dq);
        const Chunk c = m.chunk(p, i);
        store_window<E>(rows_of(p.dq, c, head), dq, warp, 0, c.length, g * 64);
      }
      arrive(&m.tokens_free);
      arrive(&m.Hk_free);
      wait(&m.inner_full, turn);
      const float4* const from = reinterpret_cast<const float4*>(m.inner()) + tid;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const float4 y = from[t * 128];
        inner[t][0] = y.x, inner[t][1] = y.y, inner[t][2] = y.z, inner[t][3] = y.w;
      }
    } else {
      auto& m = anew(shared);
      const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
      float all[8][4];
      zero(all);
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        float x[8][4];
        hand_over(x);
        products_begin();
        product<E, D / 16, 0, 0>(x, kmajor(m.B[side]), kmajor(m.A[side]), false);
        products_commit();
        products_wait<0>();
        hand_over(x);
        keep<false, 1>(x, warp);
        const auto X = split<E>(x);
        hand_over(all);
        products_begin();
        product<E, 1>(all, X.hi, mnmajor(m.Y[side][0]));
        product<E, 1>(all, X.lo, mnmajor(m.Y[side][0]));
        product<E, 1>(all, X.hi, mnmajor(m.Y[side][1]));
        products_commit();
        products_wait<0>();
        hand_over(all);
      }
      arrive(&m.tokens_free);
      wait(&m.Hk_free, turn);
      float4* const to = reinterpret_cast<float4*>(m.inner()) + tid;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        to[t * 128] = make_float4(all[t][0], all[t][1], all[t][2], all[t][3]);
#pragma unroll
        for (int e = 0; e < 4; ++e) inner[t][e] = all[t + 4][e];
      }
      arrive(&m.inner_full);
    }

    // ds in the place of inner; terms of dg from the back, from the front
    float T[4][4], F[4][4];
    bool resets[2] = {};  // of the first token, its slots store_gate_gradients gives this thread
    {
      const bool coupled = p.s.ptr == nullptr;
      auto& m = anew(shared);
      const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
      if (tid < 16) {
        const float2 start = *reinterpret_cast<const float2*>(m.gates.start + half * 32 + 2 * tid);
        resets[0] = start.x == 0.f, resets[1] = start.y == 0.f;
      }
      const float d[2] = {m.diagonal[0][row], m.diagonal[0][row + 8]}, b[2] = {m.diagonal[1][row], m.diagonal[1][row + 8]};
      get(T, m.e() + half * 2048, tid), get(F, m.outer + half * 2048, tid);
      float S[4][4], R[4][4], Y[4][4], diagonal[4][4];
      get_both(Y, m.Y[0][0], half * 32, warp);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) diagonal[t][k] = d[k / 2] * Y[t][k];
      get_both(Y, m.Y[1][0], half * 32, warp);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) diagonal[t][k] = fmaf(b[k / 2], Y[t][k], diagonal[t][k]);
      get_both(S, m.gates.S[0], half * 32, warp);
      get_R(R, m.gates.R, row, half * 32);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          T[t][k] -= S[t][k] * inner[t][k];
          inner[t][k] = (inner[t][k] + F[t][k] + diagonal[t][k]) * fast_reciprocal(R[t][k]);  // after the sequence: not stored
          F[t][k] *= S[t][k];
          if (coupled) inner[t][k] *= 1.f - S[t][k] * R[t][k];  // s = 1 - exp(g)
        }
    }
    wait(&m.done, turn);  // the keys and values are, with Y
    sync(kOfQueries, 256);
    arrive(&m.outer_free);
    load_gates(i - 1);
    {
      auto& m = anew(shared);
      const int warp = __shfl_sync(0xffffffffu, kept(threadIdx.x) % 128 / 32, 0);
      store_gate_gradients(
          p, [&] { return m.chunk(p, i); }, head, 0, half, T, F, inner, m.Y[half][0], 4 + half, warp,
          [&](int slot) {
            const float2 k = *reinterpret_cast<const float2*>(&m.edge[turn][0][slot]), v = *reinterpret_cast<const float2*>(&m.edge[turn][1][slot]);
            return make_float2(k.x + v.x, k.y + v.y);
          },
          [&](int token, int, float2& dg) {
            if (token % 8) return;
            if (resets[0]) dg.x = 0.f;
            if (resets[1]) dg.y = 0.f;
          });
    }
    turn ^= 1;
  }
}

// Keys, or values.
template <class E, int D>
__device__ __forceinline__ void walk_keys(const BackwardParams& p, WalkShared<E, D>& shared, const E* boundary, int chunks, int first_slot, int64_t n, int head,
                                          const int values) {
  constexpr int NT = D / 8;
  const int own = 6 + values;  // barrier of this warpgroup
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row();
  auto load_A = [&](int i) {
    if (i < 0) return;
    auto& m = anew(shared);
    const Chunk c = m.chunk(p, i);
    load_tokens<D, 128>(m.A[values], rows_of(values ? p.d_o : p.q, c, head), c.length, tid);
    cp_async_commit();
  };
  auto load_H = [&](int i) {
    if (i >= 0) load_state<D, 128>(anew(shared).H[values], boundary + ((int64_t(first_slot + i) * p.H + head) * 2 + values) * D * p.M, p.M, tid);
    cp_async_commit();
  };
  auto load_B = [&](int i) {
    if (i < 0) return;
    auto& m = anew(shared);
    const Chunk c = m.chunk(p, i);
    load_tokens<D, 128>(m.B[values], rows_of(values ? p.v : p.k, c, head), c.length, tid);
  };
  load_B(chunks - 1), load_A(chunks - 1), load_H(chunks - 1);
  float dH[NT][4];
  load_registers(dH, shared.begins[values], values, D, p.M, warp);
  uint32_t turn = 0;
#pragma unroll 1
  for (int i = chunks - 1; i >= 0; --i) {
    auto& m = anew(shared);
    E *const A = m.A[values], *const B = m.B[values], *const E0 = m.E0[values], *const E1 = m.E1;
    cp_async_wait_for<1>();  // all but H
    publish();
    arrive(&m.tokens_full);
    wait(&m.gates_full, turn);
    const auto& factors = m.gates;
    scale_rows(dH, factors.out[row], factors.out[row + 8]);  // E
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
    cp_async_wait_for<0>();
    publish();
    arrive(&m.H_full);
    wait(&m.H_full, turn);
    {
      float outer[8][4];
      hand_over(outer);
      products_begin();
      product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(E0), false);
      if (values) product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(E1), true);
      products_commit();
      products_wait<0>();
      hand_over(outer);
      if (!values) put(m.outer, outer, tid);
      sync(kOfKeys, 256);
      if (values) {
        float4* const to = reinterpret_cast<float4*>(m.outer) + tid;
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const float4 x = to[t * 128];
          to[t * 128] = make_float4(x.x + outer[t][0], x.y + outer[t][1], x.z + outer[t][2], x.w + outer[t][3]);
        }
      }
    }
    {  // exp(G_end) <H, dH> of every slot
      float sum[2];
      state_products(sum, m.H[values], dH, warp);
      if ((lane_id() & 3) == 0) m.edge[turn][values][row] = sum[0] * factors.in[row], m.edge[turn][values][row + 8] = sum[1] * factors.in[row + 8];
    }
    arrive(&m.keys_ready);
    wait(&m.Y_full, turn);
    {  // dk or dv
      const E *const S0 = m.gates.S[0], *const S1 = m.gates.S[1], *const Y0 = m.Y[values][0], *const Y1 = m.Y[values][1];
      float x[8][4];
      hand_over(x);
      hand_over(dH);
      products_begin();
      product<E, 4, 0, 0>(x, kmajor(S0), kmajor(Y0), false);
      product<E, 4, 0, 0>(x, kmajor(S1), kmajor(Y0), true);
      product<E, 4, 0, 0>(x, kmajor(S0), kmajor(Y1), true);
      products_commit();
      product<E, 4, 1, 1>(dH, mnmajor(Y0), mnmajor(A), true);
      product<E, 4, 1, 1>(dH, mnmajor(Y1), mnmajor(A), true);
      products_commit();
      products_wait<1>();
      hand_over(x);
      keep<false, 0>(x, warp);
      const auto W = split<E>(x);
      products_wait<0>();
      hand_over(dH);
#pragma unroll 1
      for (int d = 0; d < D; d += 32) {  // 64 at a time would take registers that are not there: ptxas then waits for every product by itself
        const bool last = d + 32 == D;
        if (last) {
          wait(&m.tokens_free, turn);
          load_B(i - 1);
        }
        float dx[4][4];
        const E *const E_own = columns<E>(E0, d), *const A_own = columns<E>(A, d);
        hand_over(dx);
        products_begin();
        product<E, 4, 0, 1>(dx, kmajor(S0), mnmajor(E_own), false);
        product<E, 4, 0, 1>(dx, kmajor(S1), mnmajor(E_own), true);
        product<E, 1>(dx, W.hi, mnmajor(A_own));
        if (values) {
          product<E, 4, 0, 1>(dx, kmajor(S0), mnmajor(columns<E>(E1, d)), true);
          product<E, 1>(dx, W.lo, mnmajor(A_own));
        }
        products_commit();
        products_wait<0>();
        hand_over(dx);
        if (last) {
          scale_rows(dH, factors.in[row], factors.in[row + 8]);
          publish();
          arrive(&m.done);
          sync(own, 128);  // this warpgroup is done with the tokens
          load_A(i - 1);
          wait(&m.outer_free, turn);  // e and inner, which lie in H, are done with, too
          load_H(i - 1);
        }
        const Chunk c = m.chunk(p, i);
        store_window<E>(rows_of(values ? p.dv : p.dk, c, head), dx, warp, 0, c.length, d);
      }
    }
    turn ^= 1;
  }
  if (float* out = static_cast<float*>(values ? p.dhv0 : p.dhk0); out && shared.first)
    store_registers(out + (n * p.H + head) * D * p.M, dH, values, D, p.M, warp);
}

// `cut` is written: whether a sequence and head are left out. packed: sequences of several lengths, in a kernel of its own (hopper_fused.cu).
template <class E, int D, bool packed>
__global__ __launch_bounds__(512, 1) void walk_kernel(const __grid_constant__ BackwardParams p, const E* boundary, const GateImage<E>* images, int* cut,
                                                      const __grid_constant__ Segments segments, const float* ends) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WalkShared<E, D>*>(memory);
  const int head = blockIdx.x % p.H;
  const int item = blockIdx.x / p.H, segment = packed ? 0 : item % segments.count;
  const int64_t n = packed ? longest_first(p, item, m.found) : item / segments.count;
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&m.tokens_full, &m.H_full, &m.tokens_free, &m.Y_full, &m.keys_ready, &m.outer_free, &m.done}) init(barrier, 256);
    for (uint64_t* barrier : {&m.Hk_free, &m.inner_full}) init(barrier, 128);
    init(&m.gates_full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const Sequence whole = sequence<false>(p, n, kChunk), seq = packed ? whole : part(whole, segment, segments.length(), kChunk);
  if (threadIdx.x == 0) {
    for (int side = 0; side < 2; ++side) {
      const float* const after = static_cast<const float*>(side ? p.dhvT : p.dhkT);
      const float* const joined = ends + ((n * (segments.count - 1) + segment) * p.H + head) * start_floats(p) + side * D * p.M;
      m.begins[side] = !packed && segment + 1 < segments.count ? joined : after ? after + (n * p.H + head) * D * p.M : nullptr;
    }
    m.first = segment == 0;
    m.sequence = seq;
  }
  bool several = false;
  for (int i = threadIdx.x; i < static_cast<int>(whole.chunks); i += 512) several |= images[(whole.slot + i) * p.H + head].cut != 0;
  several = __syncthreads_or(several);
  if (threadIdx.x == 0 && segment == 0) cut[n * p.H + head] = several;
  if (several) return;
  const int chunks = static_cast<int>(seq.chunks), first_slot = static_cast<int>(seq.slot);
  if (role < 2) {
    give_registers<112>();
    walk_queries<E, D>(p, m, boundary, images, chunks, first_slot, head, role);
  } else {
    take_registers<144>();
    walk_keys<E, D>(p, m, boundary, chunks, first_slot, n, head, role - 2);
  }
#endif
}

}  // namespace

void hopper_walk(const BackwardParams& p, const void* boundary, const void* images, int* cut, const float* ends) {
  const Segments segments = hopper_segments(p);
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_walk", p.cu_seqlens ? walk_kernel<E, D, true> : walk_kernel<E, D, false>, p.N * segments.count * p.H, 512, sizeof(WalkShared<E, D>),
           p.stream, p, static_cast<const E*>(boundary), static_cast<const GateImage<E>*>(images), cut, segments, ends);
  });
}

}  // namespace gsa::cuda
