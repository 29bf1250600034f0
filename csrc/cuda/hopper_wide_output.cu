// Chunked forward for Hopper (sm_90a), heads of 256 and 512 dimensions: o, once the keys' states before each chunk are there. Two kernels. The first has a block for each
// chunk and query head, and streams over slices of 64 dimensions:
//
//     X  = tril(sum over the slices of q k^T)         o1 = R (exp(ref) (sum over the slices of q Hk) + X S)         p = softmax(scale o1)
//     P  = p R                                        A2 = tril(P S^T)
//
// and leaves A2 and P exp(ref). The second makes the values' states and what is read of them in the same sweep, so that they need not go through memory: a block for
// each sequence, key/value head and 64 or 128 dimensions, one chunk after the other, a state [64 slots x 64 dimensions] in the registers of a warpgroup:
//
//     o  = A2 v + (P exp(ref)) Hv, of each query head of the group                    Hv <- exp(G_end - ref) (exp(ref) Hv + S^T v)
//
// S, R, ref are those of hopper_gates.cu, Hk that of hopper_scan.cu, whose values' states these are, bit for bit. A chunk of several windows: o1, A2 and P exp(G) token by
// token (core/exact.cuh). In the first kernel two warpgroups, each with half of the columns of X and A2 and of the slots; two blocks on a multiprocessor. Operands in
// two parts: X, S, P, A2, except P exp(ref).
//
//     shared memory of the first        written by            read until
//     tiles              copies                three stages of q, k, Hk; then of a chunk of several windows gates, X, then A2, o1, then p exp(G)
//     S (two parts), in  bulk copy             A2
//     X, then P          both halves           o1; A2, then P exp(ref)
#include "core/wide.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E>
struct WideOutputShared {
  alignas(1024) E tiles[Stream::stages][3][kTile];
  E S[2][kTile], X[2][kTile];
  float in[kSlots], sums[2][64];
  Stream stream;
  uint64_t S_full;
};
static_assert(sizeof(WideOutputShared<bf16>) <= 113 * 1024);
struct Exact {  // in `tiles`
  float a[kTile], s[kTile], X[kTile], O[kTile];
};
static_assert(sizeof(Exact) <= sizeof(WideOutputShared<bf16>::tiles));

// Of a chunk and query head: A2 in two parts, P exp(ref).
template <class E>
struct Scores {
  E A[3][kTile];
};

template <class E, int D>
__global__ __launch_bounds__(kWideThreads, 2) void wide_scores_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ InputMaps maps,
                                                                      const __grid_constant__ CUtensorMap states, const GateImage<E>* images,
                                                                      Scores<E>* scores) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideOutputShared<E>*>(memory);
  auto& exact = *reinterpret_cast<Exact*>(m.tiles);
  constexpr int slices = D / 64;
  const int q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  Chunk c;
  if (!find_chunk(p, slot_by_time(p, blockIdx.x / p.HQ, true), kChunk, c)) return;
  const GateImage<E>& image = images[c.slot * p.H + head];
  const bool cut = image.cut;
  auto send = [&](int step) {
    if (threadIdx.x || step >= slices) return;
    m.stream.send(step, sizeof(m.tiles[0]), [&](int stage, uint64_t* full) {
      E(&to)[3][kTile] = m.tiles[stage];
      bring_tokens<64>(to[0], maps.q, p, c, q_head, full, step * 64);
      bring_tokens<64>(to[1], maps.k, p, c, head, full, step * 64);
      bring_state<64>(to[2], states, (c.slot * p.H + head) * 2 * D + step * 64, full);
    });
  };
  if (threadIdx.x == 0) {
    init(&m.S_full, 1);
    m.stream.init();
    send(0), send(1);
    if (!cut) {
      arrive_expecting(&m.S_full, sizeof(m.S) + sizeof(m.in));
      bulk_load(m.S, image.S, sizeof(m.S), &m.S_full);
      bulk_load(m.in, image.in, sizeof(m.in), &m.S_full);
    }
  }
  __syncthreads();
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  float x[4][4], o1[4][4], R[4][4];
  if (!cut) get(R, image.R + half * 2048, tid);
#pragma unroll 1
  for (int step = 0; step < slices; ++step) {
    send(step + 2);
    const E* t = m.tiles[m.stream.arrived(step)][0];
    hand_over(x);
    hand_over(o1);
    products_begin();
    product<E, 4, 0, 0>(x, kmajor(t), kmajor(t + kTile + half * 32 * 64), step > 0);
    product<E, 4, 0, 1>(o1, kmajor(t), mnmajor(t + 2 * kTile + half * 32), step > 0);
    products_commit();
    products_wait<0>();
    hand_over(x);
    hand_over(o1);
    m.stream.done(step);
  }

  const float scale = static_cast<float>(p.scale) * 1.4426950408889634f;
  __syncthreads();  // the tiles are free
  E(&A)[3][kTile] = m.tiles[0];
  if (!cut) {
    keep_lower<0>(x, warp, half * 32);
    {
      const auto X = split<E>(x);
      store_operand<E>(m.X[0], X.hi, warp, half * 32);
      store_operand<E>(m.X[1], X.lo, warp, half * 32);
    }
    publish();
    __syncthreads();
    wait(&m.S_full, 0);
    scale_columns(o1, m.in + half * 32);
    hand_over(o1);
    products_begin();
    product<E, 4, 0, 1>(o1, kmajor(m.X[0]), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(o1, kmajor(m.X[1]), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(o1, kmajor(m.X[0]), mnmajor(m.S[1] + half * 32), true);
    products_commit();
    products_wait<0>();
    hand_over(o1);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o1[t][e] *= R[t][e] * scale;
    softmax_of_shares(o1, 1.f, p.M, m.sums, half, row);  // X is done with
    times(o1, R);
    {
      const auto P = split<E>(o1);
      store_operand<E>(m.X[0], P.hi, warp, half * 32);
      store_operand<E>(m.X[1], P.lo, warp, half * 32);
    }
    publish();
    __syncthreads();
    const E* const S_rows = m.S[0] + half * 32 * 64;
    hand_over(x);
    products_begin();
    product<E, 4, 0, 0>(x, kmajor(m.X[0]), kmajor(S_rows), false);
    product<E, 4, 0, 0>(x, kmajor(m.X[1]), kmajor(S_rows), true);
    product<E, 4, 0, 0>(x, kmajor(m.X[0]), kmajor(S_rows + kTile), true);
    products_commit();
    scale_columns(o1, m.in + half * 32);
    store_operand<E>(A[2], operand<E>(o1), warp, half * 32);
    products_wait<0>();
    hand_over(x);
    keep_lower<0>(x, warp, half * 32);
    const auto A2 = split<E>(x);
    store_operand<E>(A[0], A2.hi, warp, half * 32);
    store_operand<E>(A[1], A2.lo, warp, half * 32);
  } else {
    exact_gates<E>(p, c.slot, head, 0, exact.a, exact.s);
    store_R(exact.X, x, row, col);
    store_R(exact.O, o1, row, col);
    __syncthreads();
    exact_apply_with_diagonal(exact.a, exact.s, exact.O, exact.X);
    __syncthreads();
    load_R(o1, exact.O, row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o1[t][e] *= scale;
    softmax_of_shares(o1, 1.f, p.M, m.sums, half, row);  // both halves have read O
    store_R(exact.O, o1, row, col);
    __syncthreads();
    exact_contract(exact.a, exact.s, exact.O, exact.X);
    __syncthreads();
    load_R(o1, exact.O, row, col);
    load_R(x, exact.X, row, col);
    __syncthreads();
    const auto A2 = split<E>(x);
    store_operand<E>(A[0], A2.hi, warp, half * 32);
    store_operand<E>(A[1], A2.lo, warp, half * 32);
    store_operand<E>(A[2], operand<E>(o1), warp, half * 32);
  }
  publish();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store<sizeof(A)>(scores + c.slot * p.HQ + q_head, A);
    bulk_commit();
    bulk_wait();
  }
#endif
}

template <class E, int GROUPS, int STAGES>
struct WideValuesShared {
  alignas(1024) E S[STAGES][2][kTile];
  E A[STAGES][3][kTile], X[STAGES][GROUPS][kTile], H[2][GROUPS][kTile];
  uint64_t full[STAGES];
};
static_assert(sizeof(WideValuesShared<bf16, 2, 3>) <= 227 * 1024 && sizeof(WideValuesShared<bf16, 1, 4>) <= 227 * 1024);

// GROUPS: warpgroups, 64 dimensions each. boundary: where the states are kept, or nullptr.
template <class E, int D, int GROUPS, int STAGES>
__global__ __launch_bounds__(GROUPS * 128, 1) void wide_values_kernel(const __grid_constant__ ForwardParams p, E* boundary, const GateImage<E>* images,
                                                                      const Scores<E>* scores) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideValuesShared<E, GROUPS, STAGES>*>(memory);
  constexpr int parts = D / 64 / GROUPS;
  const int r = p.HQ / p.H, head = blockIdx.x / parts % p.H;
  const int64_t n = blockIdx.x / parts / p.H;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), first_d = (blockIdx.x % parts * GROUPS + group) * 64;
  const int64_t pool_row = state_row(p, n);
  if (pool_row < 0) {
    for (int q = blockIdx.x % parts; q < r; q += parts) zero_padding(p, n, head * r + q);
    return;
  }
  Chunk c;
  c.seq = sequence<false>(p, n, kChunk);
  const int chunks = static_cast<int>(c.seq.chunks), steps = chunks * r;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) init(m.full + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  float h[8][4];
  auto each_element = [&](bool broadcast, auto&& f) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int slot = row + (e >> 1) * 8, d = first_d + t * 8 + frag_col() + (e & 1);
        if (slot < p.M) f(h[t][e], ((broadcast ? 0 : pool_row) * p.H + head) * D * p.M + slot * D + d);
      }
  };
  zero(h);
  with_states(p.hv0, p.state_dtype, [&](const auto* in) { each_element(p.h0_broadcast, [&](float& x, int64_t i) { x = to_float(in[i]); }); });

  // A step: a chunk and query head. Of the first one S and v are for the state, too.
  auto load = [&](int s) {
    if (s < steps) {
      const int stage = s % STAGES;
      Chunk next = c;
      next.select(p, s / r, kChunk);
      if (threadIdx.x == 0) {
        arrive_expecting(m.full + stage, 5 * kTile * 2);
        bulk_load(m.S[stage], images[next.slot * p.H + head].S, 2 * kTile * 2, m.full + stage);
        bulk_load(m.A[stage], scores + next.slot * p.HQ + head * r + s % r, 3 * kTile * 2, m.full + stage);
      }
      Rows x = rows_of(p.v, next, head);
      x.base += first_d;
      load_tokens<64, 128>(m.X[stage][group], x, next.length, tid);
    }
    cp_async_commit();
  };
  for (int s = 0; s < STAGES - 1; ++s) load(s);
  int stage = 0;
  uint32_t parity = 0;
  struct Factors {
    float in[2], out[2];
  };
  auto factors_of = [&](int chunk) {
    const GateImage<E>& image = images[(c.seq.slot + chunk) * p.H + head];
    return Factors{{image.in[row], image.in[row + 8]}, {image.out[row], image.out[row + 8]}};
  };
  Factors next{};
  if (steps > 0) next = factors_of(0);
#pragma unroll 1
  for (int step = 0, chunk = 0; chunk < chunks; ++chunk) {
    const Factors f = next;
    if (chunk + 1 < chunks) next = factors_of(chunk + 1);
    E* const out = m.H[chunk % 2][group];
    store_transposed<E>(out, h, warp);
    scale_rows(h, f.in[0], f.in[1]);
    c.select(p, chunk, kChunk);
#pragma unroll 1
    for (int q = 0; q < r; ++q, ++step) {
      cp_async_wait_for<STAGES - 2>();
      wait(m.full + stage, parity);
      publish();
      __syncthreads();  // `out` is whole, and everybody is done with the stage before this one
      load(step + STAGES - 1);
      const E *A = m.A[stage][0], *X = m.X[stage][group];
      float o[8][4];
      hand_over(o);
      hand_over(h);
      products_begin();
      product<E, 4, 0, 0>(o, kmajor(A + 2 * kTile), kmajor(out), false);
      product<E, 4, 0, 1>(o, kmajor(A), mnmajor(X), true);
      product<E, 4, 0, 1>(o, kmajor(A + kTile), mnmajor(X), true);
      products_commit();
      if (q == 0) {
        product<E, 4, 1, 1>(h, mnmajor(m.S[stage][0]), mnmajor(X), true);
        product<E, 4, 1, 1>(h, mnmajor(m.S[stage][1]), mnmajor(X), true);
      }
      products_commit();
      if (q == 0 && boundary) store_state<64>(boundary + ((c.slot * p.H + head) * 2 + 1) * int64_t(D) * p.M + first_d * p.M, out, p.M, tid);
      products_wait<1>();
      hand_over(o);
      store_window<E>(rows_of(p.o, c, head * r + q), o, warp, 0, c.length, first_d);
      products_wait<0>();
      hand_over(h);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    scale_rows(h, f.out[0], f.out[1]);
  }
  with_states(p.hvT, p.state_dtype, [&](auto* out) { each_element(false, [&](float& x, int64_t i) { store_rounded(out[i], x); }); });
#endif
}

}  // namespace

int64_t hopper_wide_scores_bytes(const Params& p) {
  return boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.HQ * static_cast<int64_t>(sizeof(Scores<half>));
}

void hopper_wide_output(const ForwardParams& p, const void* boundary, const void* images, void* room) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_wide(p, [&]<class E, int D>() {
    const auto* gates = static_cast<const GateImage<E>*>(images);
    auto* const scores = static_cast<Scores<E>*>(room);
    launch_early("hopper_wide_scores", wide_scores_kernel<E, D>, slots * p.HQ, kWideThreads, sizeof(WideOutputShared<E>), p.stream, p,
                 input_maps(static_cast<const Params&>(p)), boundary_map(p, boundary), gates, scores);
    const int64_t blocks = p.N * p.H * (D / 128);
    auto run = [&]<int GROUPS, int STAGES>() {
      launch_early("hopper_wide_values", wide_values_kernel<E, D, GROUPS, STAGES>, blocks * 2 / GROUPS, GROUPS * 128,
                   sizeof(WideValuesShared<E, GROUPS, STAGES>), p.stream, p, static_cast<E*>(p.boundary), gates, scores);
    };
    blocks * 10 >= hopper_multiprocessors() * 7 ? run.template operator()<2, 3>() : run.template operator()<1, 4>();
  });
}

}  // namespace gsa::cuda
