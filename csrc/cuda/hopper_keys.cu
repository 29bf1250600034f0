// Chunked backward for Hopper (sm_90a), last part: the gradients of k, v, s and g. One block for each chunk and key/value head, first its keys, then its values;
// S, R are those of hopper_gates.cu, Y (Yk, Yv) and e of hopper_queries.cu, E and the edges of hopper_scan.cu.
//
//                            keys                               values
//     A, B                   q, k                               d_o, v
//     W^T = triu(S Y^T)      dk = W^T q + S E                   dv = W^T d_o + S E
//     inner                  strict triu(k q^T) Y               strict triu(v d_o^T) Y
//     outer                  k E^T                              v E^T
//
// dk, dv and inner are sums over the query heads of the group. And then, the sum of both sides:
//     ds_j = (inner + outer + diagonal of (B A^T) Y) / R
//     dg_t = sum_{u >= t} (e_u - S_u inner_u) + sum_{j < t} S_j outer_j + edge           (sums, in fp32)
// Neither e nor inner has the diagonal, and what comes from after the chunk is summed from the front: nothing large is left to cancel (chunk_backward.cu).
//
// Two warpgroups for a bank. The first has inner and the diagonal, the second outer, and dk and dv: all dimensions, with two banks half of them. In the end they
// give each other half of the slots, for ds and dg. With one bank two blocks on a multiprocessor. What has to be more exact than 16 bits is an operand in two parts: X
// in inner, S, W, Y and E of the values.
//
// A chunk of several windows, in a branch of its own: S is relative to the chunk's end, E the cotangent after it, Y relative to nothing. W and inner are made token by
// token (core/exact.cuh), outer is multiplied by exp(G_end - G), R is 1. First dk, dv and outer, then inner and the diagonal: fewer registers at a time, more loads.
//
//     shared memory      holds
//     stage              for a side and query head: A, Y in two parts; there are two, by turns, so that one is on its way while the other is worked on
//     B                  for a side; with two banks for both
//     E0                 for a side: E, of the values in two parts. With one bank in the place of the second stage, which comes when it is done with. With Y: in the end
//                        the terms of dg
//     S                  in two parts
//     outer              with one bank, where there are no registers for it; as accumulators lie
//     stages, at last    inner and the diagonal of the half that is given away; with two banks, outer
#include "core/backward.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D, int BANKS>
struct KeysShared {
  struct Stage {
    alignas(1024) E A[64 * D], Y[BANKS][2][kTile];
  };
  Stage stage[2];
  E B[BANKS][64 * D], S[BANKS][2][kTile];
  float outer[BANKS == 1 ? 64 * 64 : 4];
  alignas(BANKS == 1 ? 16 : 1024) E apart[BANKS == 1 ? 8 : BANKS * 2 * 64 * D];
  uint64_t full[2], free[2], B_full, E_full, finished;  // full, free: of a stage
  __device__ E* E0(int bank, int part) { return BANKS == 1 ? reinterpret_cast<E*>(stage + 1) + part * 64 * D : apart + (bank * 2 + part) * 64 * D; }
  // Of a bank, in the end.
  __device__ float* given(int bank) { return reinterpret_cast<float*>(stage) + bank * 2 * 64 * 32; }
  __device__ float* outer_of(int bank) { return BANKS == 1 ? outer : given(BANKS) + bank * 64 * 64; }
  static_assert((BANKS == 1 ? 48 : 96) * 1024 <= 2 * sizeof(Stage) + (BANKS == 1 ? 0 : sizeof(E) * BANKS * 64 * D));
};
static_assert(sizeof(KeysShared<bf16, 128, 1>) <= 113 * 1024 && sizeof(KeysShared<bf16, 128, 2>) <= 227 * 1024);

// e of a group, half of a bank's slots: the sum over what blocks of hopper_queries.cu have left.
template <int BANKS, class E>
__device__ __forceinline__ void sum_of_e(float (&T)[4][4], const BackwardParams& p, const Backward<E>& w, const Chunk& c, int head, int own, int tid,
                                         int heads) {
  const int r = p.HQ / p.H, bank = own % BANKS, half = own / BANKS;
  zero(T);
#pragma unroll 1
  for (int h = 0; h < r; h += heads) {
    const float4* e = reinterpret_cast<const float4*>(w.saved[(c.slot * p.HQ + head * r + h) * BANKS + bank].e) + half * 512 + tid;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 y = e[t * 128];
      T[t][0] += y.x, T[t][1] += y.y, T[t][2] += y.z, T[t][3] += y.w;
    }
  }
}

// The end: ds and dg of half of the slots of a bank. T: sum_of_e, which becomes the terms of dg from the back; `terms`: room for two tiles of each warpgroup.
// exact: inner is true, outer the cotangents after the chunk times exp(G_end - G), S is s, a plain fp32 tile as exp_g is.
template <bool exact, int D, int BANKS, class E>
__device__ __forceinline__ void gate_gradients(const BackwardParams& p, const Backward<E>& w, const Chunk& c, int head, float (&inner)[4][4],
                                               float (&outer)[4][4], float (&diagonal)[4][4], const E* S, const float* exp_g, E* terms, int own, int tid,
                                               float (&T)[4][4]) {
  const int bank = own % BANKS, half = own / BANKS, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const int64_t at = (c.slot * p.H + head) * BANKS;
  const GateImage<E>* const image = w.gates + at;
  const bool coupled = p.s.ptr == nullptr;
  // What is needed last is sent for first, of the two slots that store_gate_gradients gives this thread.
  const int pair = half * 32 + (lane_id() & 15) * 2;
  const float* const edges = w.edge + (at + bank) * 2 * D + pair;
  float2 edge = make_float2(0.f, 0.f), start = edge;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const float2 x = *reinterpret_cast<const float2*>(edges + i * 64);
    edge.x += x.x, edge.y += x.y;
  }
  if (!exact) start = *reinterpret_cast<const float2*>(image[bank].start + pair);
  float s[4][4];  // if exact write strengths, then exp(g). Terms of dg from the front in the place of outer, ds in that of inner
  if constexpr (exact) {
    load_plain(s, reinterpret_cast<const float*>(S), row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        T[t][k] -= s[t][k] * inner[t][k];
        inner[t][k] += outer[t][k] + diagonal[t][k];
        outer[t][k] *= s[t][k];
      }
    load_plain(s, exp_g, row, col);
    if (coupled)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) inner[t][k] *= s[t][k];
  } else {
    const uint32_t S_row = place(S, row, frag_col()) ^ (half * 64);
    float4 Rs[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) Rs[t] = reinterpret_cast<const float4*>(image[bank].R)[half * 512 + t * 128 + tid];
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), R = h ? make_float2(Rs[t].z, Rs[t].w) : make_float2(Rs[t].x, Rs[t].y);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = 2 * h + e;
          const float S_ = e ? S.y : S.x, R_ = e ? R.y : R.x;
          T[t][k] -= S_ * inner[t][k];
          inner[t][k] = __fdividef(inner[t][k] + outer[t][k] + diagonal[t][k], R_);  // after the sequence: not stored
          if (coupled) inner[t][k] *= 1.f - S_ * R_;
          outer[t][k] *= S_;
        }
      }
  }
  __syncthreads();  // everybody has what it was given
  store_gate_gradients(
      p, [&] { return c; }, head, bank, half, T, outer, inner, terms, 2 + own, warp, [&](int) { return edge; },
      [&](int token, int slot, float2& dg) {
        if (!exact && token) return;
        const float2 a = exact ? *reinterpret_cast<const float2*>(exp_g + token * kSlots + slot) : start;
        if (a.x == 0.f) dg.x = 0.f;
        if (a.y == 0.f) dg.y = 0.f;
      });
}

// A chunk of several windows (core/exact.cuh): X, or W, and Y; S and E in their place.
template <class E, int D, int BANKS>
struct ExactKeys {
  union {
    struct {
      float X[BANKS][kTile], Y[BANKS][kTile];
    };
    struct {
      E S[BANKS][2][kTile], E0[BANKS][2][64 * D];
    };
  };
  float a[BANKS][kTile], s[BANKS][kTile];
  E A[64 * D], B[64 * D];
};

// Finds everything anew: what the usual way keeps in registers is its own.
template <class E, int D, int BANKS>
__device__ __forceinline__ void exact_keys(const BackwardParams& p, const Backward<E>& w, int heads, char* memory) {
#if GSA_HOPPER
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);  // dimensions of dk and dv that a warpgroup has
  auto& m = *reinterpret_cast<ExactKeys<E, D, BANKS>*>(memory);
  using Usual = KeysShared<E, D, BANKS>;
  auto& usual = *reinterpret_cast<Usual*>(memory);
  uint64_t* const full = &usual.E_full;
  static_assert(sizeof(m) <= offsetof(Usual, full));
  const int r = p.HQ / p.H, block = kept(blockIdx.x), head = block % p.H;
  Chunk c;
  if (!find_chunk(p, block / p.H, kChunk, c)) return;
  const int thread = kept(threadIdx.x), own = __shfl_sync(0xffffffffu, thread / 128, 0), bank = own % BANKS, half = own / BANKS, tid = thread % 128;
  const int warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const int rows_bank = thread / kExactThreads, i = RowSlots::row();  // whose row, and which, this thread has where it is token by token
  const int64_t at_bank = (c.slot * p.H + head) * BANKS;
  float *const X = m.X[rows_bank], *const Y = m.Y[rows_bank], *const a = m.a[rows_bank], *const s = m.s[rows_bank];
  wait(usual.full, 0), wait(&usual.B_full, 0), wait(full, 0);  // what the usual way sent for
  __syncthreads();
  exact_gates<E>(p, c.slot, head, rows_bank, a, s);
  auto load_A = [&](int side, int h) {
    load_tokens<D, kThreads>(m.A, rows_of(side ? p.d_o : p.q, c, head * r + h), c.length, thread);
    cp_async_commit();
  };
  auto load_B = [&](int side) {
    load_tokens<D, kThreads>(m.B, rows_of(side ? p.v : p.k, c, head), c.length, thread);
    cp_async_commit();
  };
  auto load_y = [&](float (&y)[16], int side, int h) {
    const E* const saved = w.saved[(c.slot * p.HQ + head * r + h) * BANKS + rows_bank].Y[side][0];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const E* const from = at(const_cast<E*>(saved), i, RowSlots::column(u));
      const uint2 hi = *reinterpret_cast<const uint2*>(from), lo = side ? *reinterpret_cast<const uint2*>(from + kTile) : uint2{};
      const float2 x0 = unpack<E>(hi.x), x1 = unpack<E>(hi.y), y0 = unpack<E>(lo.x), y1 = unpack<E>(lo.y);
      y[4 * u] = x0.x + y0.x, y[4 * u + 1] = x0.y + y0.y, y[4 * u + 2] = x1.x + y1.x, y[4 * u + 3] = x1.y + y1.y;
    }
  };

  // dk, dv, outer
  float outer[4][4];
  zero(outer);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    publish();
    __syncthreads();  // W and the tokens are done with
    load_B(side);
    if (thread == 0) {
      arrive_expecting(full, BANKS * (sizeof(m.S[0]) + (1 + side) * sizeof(m.E0[0][0])));
      for (int b = 0; b < BANKS; ++b) {
        bulk_load(m.S[b], w.gates[at_bank + b].S, sizeof(m.S[b]), full);
        for (int part = 0; part <= side; ++part) bulk_load(m.E0[b][part], w.E0 + ((at_bank + b) * 3 + (part ? 2 : side)) * 64 * D, sizeof(m.E0[b][part]), full);
      }
    }
    cp_async_wait_for<0>();
    wait(full, side ^ 1);
    publish();
    __syncthreads();
    float dx[width / 8][4];
    zero(dx);
    hand_over(dx);
    hand_over(outer);
    products_begin();
    product<E, D / 16, 0, 0>(outer, kmajor(m.B), kmajor(m.E0[bank][0] + half * 32 * 64), true);
    if (side) product<E, D / 16, 0, 0>(outer, kmajor(m.B), kmajor(m.E0[bank][1] + half * 32 * 64), true);
#pragma unroll
    for (int b = 0; b < BANKS; ++b) {
      product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(columns<E>(m.E0[b][0], own * width)), true);
      product<E, 4, 0, 1>(dx, kmajor(m.S[b][1]), mnmajor(columns<E>(m.E0[b][0], own * width)), true);
      if (side) product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(columns<E>(m.E0[b][1], own * width)), true);
    }
    products_commit();
    products_wait<0>();
    hand_over(dx);
    hand_over(outer);
#pragma unroll 1
    for (int h = 0; h < r; ++h) {
      __syncthreads();  // S and E, or W and A, are done with
      load_A(side, h);
      {
        float y[16];
        load_y(y, side, h);
        exact_contract(y, a, s, [&](int j, float x) {
          if (threadIdx.x % 4 == 0) X[R_at(j, i)] = x;
        });
      }
      cp_async_wait_for<0>();
      publish();
      __syncthreads();
      float x[8][4];
      load_R(x, m.X[0], row, frag_col());
      if constexpr (BANKS > 1) {
        float other[8][4];
        load_R(other, m.X[1], row, frag_col());
        add(x, other);
      }
      const auto W = split<E>(x);
      hand_over(dx);
      products_begin();
      product<E, 1>(dx, W.hi, mnmajor(columns<E>(m.A, own * width)));
      product<E, 1>(dx, W.lo, mnmajor(columns<E>(m.A, own * width)));
      products_commit();
      products_wait<0>();
      hand_over(dx);
    }
    store_window<E>(rows_of(side ? p.dv : p.dk, c, head), dx, warp, 0, c.length, own * width);
  }

  // inner and the diagonal
  float inner_row[16], diagonal_row[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) inner_row[n] = diagonal_row[n] = 0.f;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
#pragma unroll 1
    for (int h = 0; h < r; ++h) {
      __syncthreads();  // X, Y and the tokens are done with
      if (h == 0) load_B(side);
      load_A(side, h);
      float y[16];
      load_y(y, side, h);
      RowSlots::store<false>(Y, i, y);
      cp_async_wait_for<0>();
      publish();
      __syncthreads();
      {
        float x[4][4];
        hand_over(x);
        products_begin();
        product<E, D / 16, 0, 0>(x, kmajor(m.B), kmajor(m.A + half * 32 * 64), false);
        products_commit();
        products_wait<0>();
        hand_over(x);
        store_R(m.X[bank], x, row, col);
      }
      __syncthreads();
      const float d = X[R_at(i, i)];
#pragma unroll
      for (int n = 0; n < 16; ++n) diagonal_row[n] += d * y[n];
      float decay[16];
      exact_inner(decay, a, [&](int u) {
        const float b = X[R_at(i, u)];
        float x[16];
        RowSlots::load<false>(x, Y, u);
#pragma unroll
        for (int n = 0; n < 16; ++n) inner_row[n] += b * (decay[n] * x[n]);
      });
    }
  }
  __syncthreads();
  RowSlots::store<false>(X, i, inner_row);
  RowSlots::store<false>(Y, i, diagonal_row);
  __syncthreads();
  float inner[4][4], diagonal[4][4], decay[4][4];
  load_R(inner, m.X[bank], row, col);
  load_R(diagonal, m.Y[bank], row, col);
  __syncthreads();
  {
    float x[16];
    exact_inner(x, a, [](int) {});
    RowSlots::store<false>(X, i, x);
  }
  __syncthreads();
  load_R(decay, m.X[bank], row, col);
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) outer[t][e] *= decay[t][e];
  float T[4][4];
  sum_of_e<BANKS>(T, p, w, c, head, own, tid, heads);
  gate_gradients<true, D, BANKS>(p, w, c, head, inner, outer, diagonal, reinterpret_cast<const E*>(m.s[bank]), m.a[bank],
                                 reinterpret_cast<E*>(m.X) + own * 2 * kTile, own, tid, T);
#endif
}

template <class E, int D, int BANKS>
__global__ __launch_bounds__(256 * BANKS, 3 - BANKS) void keys_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Backward<E> w,
                                                                      int heads, const __grid_constant__ InputMaps maps) {
#if GSA_HOPPER
  after_the_last_kernel();
  if (w.all_elsewhere()) return;
  extern __shared__ __align__(1024) char memory[];
  constexpr int kThreads = 256 * BANKS, width = D / BANKS;  // dimensions of dk and dv that a warpgroup has
  const int r = p.HQ / p.H;
  const int head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, kChunk, c) || w.elsewhere(p, c.seq.n, head)) return;
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), bank = own % BANKS, half = own / BANKS;  // half: which of the two, too
  const int64_t at = (c.slot * p.H + head) * BANKS;
  const GateImage<E>* const image = w.gates + at;
  const bool cut = w.gates[kept(static_cast<int>(at))].cut;
  auto& m = *reinterpret_cast<KeysShared<E, D, BANKS>*>(memory);
  // A step is a side and query head; with one bank a side begins with the first stage, while E is in the place of the second. How often a stage was used before:
  auto stage_of = [&](int step) { return (BANKS == 1 && step >= r ? step - r : step) & 1; };
  auto uses = [&](int step) {
    const int side = step >= r, h = step - side * r;
    return BANKS == 1 ? side * (h & 1 ? r / 2 : (r + 1) / 2) + h / 2 : step / 2;
  };
  // What is on its way, sent for by one thread of the second warpgroups, which have less to do.
  auto send_stage = [&](int step) {
    const int side = step >= r, q_head = head * r + step - side * r;
    auto& to = m.stage[stage_of(step)];
    uint64_t* const full = m.full + stage_of(step);
    const uint32_t bytes = (1 + side) * kTile * 2;
    arrive_expecting(full, sizeof(to.A) + BANKS * bytes);
    bring_tokens<D>(to.A, side ? maps.d_o : maps.q, p, c, q_head, full);
    const Saved<E>* const saved = w.saved + (c.slot * p.HQ + q_head) * BANKS;
    for (int b = 0; b < BANKS; ++b) bulk_load(to.Y[b], saved[b].Y[side], bytes, full);
  };
  auto send_B = [&](int side) { bring_tokens<D>(m.B[side % BANKS], side ? maps.v : maps.k, p, c, head, &m.B_full); };
  auto send_E = [&](int side) {
    const uint32_t bytes = 64 * D * 2;
    arrive_expecting(&m.E_full, BANKS * (side ? 2 * bytes : bytes + sizeof(m.S[0])));
    for (int b = 0; b < BANKS; ++b) {
      if (side == 0) bulk_load(m.S[b], image[b].S, sizeof(m.S[b]), &m.E_full);
      bulk_load(m.E0(b, 0), w.E0 + ((at + b) * 3 + side) * 64 * D, bytes, &m.E_full);
      if (side) bulk_load(m.E0(b, 1), w.E0 + ((at + b) * 3 + 2) * 64 * D, bytes, &m.E_full);
    }
  };
  if (threadIdx.x == kThreads / 2) {
    for (int i = 0; i < 2; ++i) init(m.full + i, 1), init(m.free + i, kThreads);
    init(&m.B_full, 1), init(&m.E_full, 1), init(&m.finished, kThreads);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_expecting(&m.B_full, BANKS * sizeof(m.B[0]));
    for (int side = 0; side < BANKS; ++side) send_B(side);
    send_stage(0), send_E(0);
    if (BANKS > 1 && !cut) send_stage(1);
  }
  __syncthreads();
  if (cut) return exact_keys<E, D, BANKS>(p, w, heads, memory + kept(0));
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  // The two have code of their own: no barrier of all threads until they are through. Only where the thread is that sends is there code for it: its registers are not there
  // in the other half.
  const auto begin_step = [&](int step, auto sends) {
    if (sends() && threadIdx.x == kThreads / 2 && step) {
      wait(m.free + stage_of(step - 1), uses(step - 1) & 1);
      if constexpr (BANKS > 1) {
        if (step + 1 < 2 * r) send_stage(step + 1);
        if (step == 1) send_E(1);
      } else {  // what the step before this one, its side's h-th, was the last to use
        const int side = step > r, h = step - 1 - side * r;
        if (h + 2 < r) send_stage(step + 1);
        if (side == 0) {
          if (h == ((r - 1) & ~1)) send_stage(r);
          if (h == max(0, (r & 1) ? r - 2 : r - 1)) send_E(1);
          if (h == r - 1) arrive_expecting(&m.B_full, sizeof(m.B[0])), send_B(1);
        }
      }
    }
    if (step % r == 0) wait(&m.B_full, BANKS == 1 ? step / r : 0);
    wait(m.full + stage_of(step), uses(step) & 1);
  };
  float inner[4][4], outer[4][4], diagonal[4][4];
  if (half == 0) {
    float inner_all[8][4], diagonal_all[8][4];
    zero(inner_all), zero(diagonal_all);
#pragma unroll 1
    for (int step = 0; step < 2 * r; ++step) {
      begin_step(step, std::false_type{});
      auto& stage = m.stage[stage_of(step)];
      const E* const B = m.B[step / r % BANKS];
      float x[8][4], d[2];
      hand_over(x);
      products_begin();
      product<E, D / 16, 0, 0>(x, kmajor(B), kmajor(stage.A), false);
      products_commit();
      products_wait<0>();
      hand_over(x);
      diagonal_of(d, x, warp);
      keep<false, 1>(x, warp);
      const auto X = split<E>(x);
      hand_over(inner_all);
      products_begin();
      product<E, 1>(inner_all, X.hi, mnmajor(stage.Y[bank][0]));
      product<E, 1>(inner_all, X.lo, mnmajor(stage.Y[bank][0]));
      if (step >= r) product<E, 1>(inner_all, X.hi, mnmajor(stage.Y[bank][1]));
      products_commit();
      const uint32_t Y_row = place(stage.Y[bank][0], row, frag_col());
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const uint32_t here = (Y_row + g * 1024) ^ (t * 16);
          const float2 hi = pair_at<E>(here), lo = step >= r ? pair_at<E, kTile * 2>(here) : float2{}, Y = make_float2(hi.x + lo.x, hi.y + lo.y);
          diagonal_all[t][2 * g] += d[g] * Y.x, diagonal_all[t][2 * g + 1] += d[g] * Y.y;
        }
      products_wait<0>();
      hand_over(inner_all);
      publish();  // Y was read by ordinary loads, too
      arrive(m.free + stage_of(step));
    }
    arrive(&m.finished), wait(&m.finished, 0);  // either may be a step ahead of the other
    float4* const to = reinterpret_cast<float4*>(m.given(bank)) + tid;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float (&x)[4] = inner_all[t + 4], (&y)[4] = diagonal_all[t + 4];
      to[t * 128] = make_float4(x[0], x[1], x[2], x[3]), to[(t + 4) * 128] = make_float4(y[0], y[1], y[2], y[3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) inner[t][e] = inner_all[t][e], diagonal[t][e] = diagonal_all[t][e];
    }
  } else {
    float dx[width / 8][4], apart[BANKS == 1 ? 1 : 8][4];
    auto& outer_all = *reinterpret_cast<float (*)[8][4]>(BANKS == 1 ? dx : apart);
#pragma unroll 1
    for (int step = 0; step < 2 * r; ++step) {
      begin_step(step, std::true_type{});
      // Addresses are made where they are used: there are no registers to keep them in.
      auto& m = *reinterpret_cast<KeysShared<E, D, BANKS>*>(memory + kept(0));
      auto& stage = m.stage[stage_of(step)];
      const int side = step >= r, h = step - side * r;
      if (h == 0) {
        const E* const B = m.B[side % BANKS];
        wait(&m.E_full, side);
        if (BANKS == 1 && side) get(outer_all, m.outer, tid);
        hand_over(outer_all);
        products_begin();
        product<E, D / 16, 0, 0>(outer_all, kmajor(B), kmajor(m.E0(bank, 0)), side);
        if (side) product<E, D / 16, 0, 0>(outer_all, kmajor(B), kmajor(m.E0(bank, 1)), true);
        products_commit();
        products_wait<0>();
        hand_over(outer_all);
        if (BANKS == 1) put(m.outer, outer_all, tid);
        zero(dx);
        hand_over(dx);
        products_begin();
#pragma unroll
        for (int b = 0; b < BANKS; ++b) {
          const E *E_own = columns<E>(m.E0(b, 0), bank * width), *dropped = columns<E>(m.E0(b, 1), bank * width);
          product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(E_own), true);
          product<E, 4, 0, 1>(dx, kmajor(m.S[b][1]), mnmajor(E_own), true);
          if (side) product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(dropped), true);
        }
        products_commit();
        products_wait<0>();
        hand_over(dx);
        if (BANKS == 1 && r > 1) {
          sync(1, 128);  // E is done with
          if (threadIdx.x == kThreads / 2) send_stage(step + 1);
        }
      }
      float x[8][4];
      hand_over(x);
      products_begin();
#pragma unroll
      for (int b = 0; b < BANKS; ++b) {
        product<E, 4, 0, 0>(x, kmajor(m.S[b][0]), kmajor(stage.Y[b][0]), b > 0);
        product<E, 4, 0, 0>(x, kmajor(m.S[b][1]), kmajor(stage.Y[b][0]), true);
        if (side) product<E, 4, 0, 0>(x, kmajor(m.S[b][0]), kmajor(stage.Y[b][1]), true);
      }
      products_commit();
      products_wait<0>();
      hand_over(x);
      keep<false, 0>(x, warp);
      const auto W = split<E>(x);
      hand_over(dx);
      products_begin();
      const E* A_own = columns<E>(stage.A, bank * width);
      product<E, 1>(dx, W.hi, mnmajor(A_own));
      product<E, 1>(dx, W.lo, mnmajor(A_own));
      products_commit();
      products_wait<0>();
      hand_over(dx);
      if (h == r - 1) store_window<E>(rows_of(side ? p.dv : p.dk, c, head), dx, warp, 0, c.length, bank * width);
      arrive(m.free + stage_of(step));
    }
    arrive(&m.finished), wait(&m.finished, 0);  // either may be a step ahead of the other
    if (BANKS > 1) put(m.outer_of(bank), outer_all, tid);
  }
  float T[4][4];
  sum_of_e<BANKS>(T, p, w, c, head, own, tid, heads);
  __syncthreads();
  if (half) {
    const float4* const from = reinterpret_cast<const float4*>(m.given(bank)) + tid;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 x = from[t * 128], y = from[(t + 4) * 128];
      inner[t][0] = x.x, inner[t][1] = x.y, inner[t][2] = x.z, inner[t][3] = x.w;
      diagonal[t][0] = y.x, diagonal[t][1] = y.y, diagonal[t][2] = y.z, diagonal[t][3] = y.w;
    }
  }
  get(outer, m.outer_of(bank) + half * 4 * 512, tid);

  E* const terms = reinterpret_cast<E*>(m.stage) + (own + (BANKS == 1)) * 2 * kTile;  // with one bank behind what was given
  gate_gradients<false, D, BANKS>(p, w, c, head, inner, outer, diagonal, m.S[bank][0], static_cast<const float*>(nullptr), terms, own, tid, T);
#endif
}

}  // namespace

void hopper_keys(const BackwardParams& p, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_banks(p, [&]<class E, int D, int BANKS>() {
    launch_early("hopper_keys", keys_kernel<E, D, BANKS>, slots * p.H, 256 * BANKS, sizeof(KeysShared<E, D, BANKS>), p.stream, p, Backward<E>(w),
                 hopper_query_heads(p), input_maps(p));
  });
}

}  // namespace gsa::cuda
