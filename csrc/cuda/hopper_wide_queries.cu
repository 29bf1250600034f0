// Chunked backward for Hopper (sm_90a), heads of 256 and 512 dimensions, first part: all of [64 x 64] tokens and slots that the states before a chunk suffice for;
// what is as wide as a head is left to hopper_wide_keys.cu. One block for each chunk and query head, two passes over slices of 64 dimensions, the keys' (a, b, H =
// q, k, Hk) and the values' (d_o, v, Hv):
//
//     X     = strict tril(sum over the slices of a b^T), its diagonal apart           o1, dp = R (exp(ref) (sum over the slices of a H) + X S)
//     p     = softmax(scale o1)                       Yk = scale R p (dp - <p, dp>)   Yv = R p
//     A1    = tril(Yk S^T)                            A2 = tril(Yv S^T)               inner = X1^T Yk + X2^T Yv
//     T     = o1 do1 + p dp - S inner, o1 and dp without their diagonals              U = (inner + diagonal of X1 Yk + diagonal of X2 Yv) / R
//
// and Yk, Yv for hopper_scan.cu; A1, A2, Yk exp(ref), T, U for hopper_wide_keys.cu (WideSaved). S, R, ref are those of hopper_gates.cu. A chunk of several windows:
// what has S or R in it token by token (core/exact.cuh), Y relative to the chunk's beginning, and exp(G_end - G_j) in the place of R, for hopper_wide_keys.cu. Two
// warpgroups, each with half of the columns of X and A, and of the slots. Operands in two parts: X, S, Y. Two blocks on a multiprocessor.
//
//     shared memory      written by            read until
//     tiles              copies                three stages of a, b, H; then 0 .. 3: Yk, Yv, 4, 5: X of the values, 6, 7: A2, 8: A1, each in two parts but A1;
//                                              of a chunk of several windows gates, X of the values, a tile of rows
//     X                  both halves           of the keys in two parts: inner; then Yk exp(ref). Several windows: in fp32
//     S (two parts)      bulk copy             T. Several windows: another tile of rows
#include "core/backward.cuh"
#include "core/wide.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E>
struct WideQueriesShared {
  alignas(1024) E tiles[Stream::stages * 3][kTile];
  E X[2][kTile], S[2][kTile];
  float in[kSlots], diagonal[2][64];
  RowSums<2> sums;
  Stream stream;
  uint64_t S_full;
};
static_assert(sizeof(WideQueriesShared<bf16>) <= 113 * 1024);
struct Exact {  // in `tiles`
  float a[kTile], s[kTile], X[kTile], O[kTile];
};
static_assert(sizeof(Exact) <= sizeof(WideQueriesShared<bf16>::tiles));

// m.O, other: yk, yv, without R. Saves Y and A; inner is left in m.X, exp(G_end - G_j) in X, which holds that of the keys.
template <class E>
__device__ __noinline__ void exact_queries(Exact& m, float* X, const float* other, WideSaved<E>& save) {
  const int i = RowSlots::row();
  {
    float inner[16], f[16];
#pragma unroll
    for (int n = 0; n < 16; ++n) inner[n] = 0.f;
    exact_inner(f, m.a, [&](int u) {
      float x[16];
      const float k = X[R_at(u, i)], v = m.X[R_at(u, i)];
      RowSlots::load<false>(x, m.O, u);
#pragma unroll
      for (int n = 0; n < 16; ++n) inner[n] += f[n] * (k * x[n]);
      RowSlots::load<false>(x, other, u);
#pragma unroll
      for (int n = 0; n < 16; ++n) inner[n] += f[n] * (v * x[n]);
    });
    __syncthreads();
    RowSlots::store<false>(m.X, i, inner);
    RowSlots::store<false>(X, i, f);
  }
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    float y[16];
    RowSlots::load<false>(y, side ? other : m.O, i);
    exact_contract(y, m.a, m.s, [&](int j, float x) {
      const E hi = from_float<E>(x);
      if (threadIdx.x % 4) return;
      *at(save.A[side ? 0 : 2], i, j) = hi;
      if (side) *at(save.A[1], i, j) = from_float<E>(x - to_float(hi));
    });
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      uint2 hi, lo;
      Arith<E>::split_pair(y[4 * u], y[4 * u + 1], hi.x, lo.x);
      Arith<E>::split_pair(y[4 * u + 2], y[4 * u + 3], hi.y, lo.y);
      *reinterpret_cast<uint2*>(at(save.Y[side][0], i, RowSlots::column(u))) = hi;
      *reinterpret_cast<uint2*>(at(save.Y[side][1], i, RowSlots::column(u))) = lo;
      if (!side) *reinterpret_cast<uint2*>(at(save.A[3], i, RowSlots::column(u))) = hi;
    }
  }
  __syncthreads();
}

template <class E, int D>
__global__ __launch_bounds__(kWideThreads, 2) void wide_queries_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ InputMaps maps,
                                                                       const __grid_constant__ CUtensorMap states, const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideQueriesShared<E>*>(memory);
  auto& exact = *reinterpret_cast<Exact*>(m.tiles);
  constexpr int slices = D / 64;
  const int q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  Chunk c;
  if (!find_chunk(p, slot_by_time(p, blockIdx.x / p.HQ, true), kChunk, c)) return;
  GateImage<E>& image = w.gates[c.slot * p.H + head];
  const bool cut = image.cut;
  auto send = [&](int step) {
    if (threadIdx.x || step >= 2 * slices) return;
    m.stream.send(step, 3 * sizeof(m.tiles[0]), [&](int stage, uint64_t* full) {
      const int side = step >= slices, d = (step - side * slices) * 64;
      E(*const to)[kTile] = m.tiles + stage * 3;
      bring_tokens<64>(to[0], side ? maps.d_o : maps.q, p, c, q_head, full, d);
      bring_tokens<64>(to[1], side ? maps.v : maps.k, p, c, head, full, d);
      bring_state<64>(to[2], states, ((c.slot * p.H + head) * 2 + side) * D + d, full);
    });
  };
  if (threadIdx.x == 0) {
    init(&m.S_full, 1);
    m.stream.init();
    send(0), send(1);
    if (!cut) {
      arrive_expecting(&m.S_full, sizeof(m.S));
      bulk_load(m.S, image.S, sizeof(m.S), &m.S_full);
    }
  }
  if (threadIdx.x < kSlots && !cut) m.in[threadIdx.x] = image.in[threadIdx.x];
  __syncthreads();
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  float o[4][4], dp[4][4];
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    float x[4][4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[t][e] = dp[t][e];  // of the keys, the second time
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      const int step = side * slices + slice;
      send(step + 2);
      const E* t = m.tiles[m.stream.arrived(step) * 3];
      hand_over(x);
      hand_over(dp);
      products_begin();
      product<E, 4, 0, 0>(x, kmajor(t), kmajor(t + kTile + half * 32 * 64), slice > 0);
      product<E, 4, 0, 1>(dp, kmajor(t), mnmajor(t + 2 * kTile + half * 32), slice > 0);
      products_commit();
      products_wait<0>();
      hand_over(x);
      hand_over(dp);
      m.stream.done(step);
    }
    if (side) __syncthreads();  // the tiles are free
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (row + (e >> 1) * 8 == col + t * 8 + (e & 1)) m.diagonal[side][row + (e >> 1) * 8] = x[t][e];
    if (cut) {
      store_R(side ? exact.X : reinterpret_cast<float*>(m.X), x, row, col);
      continue;
    }
    E* const X_tile = side ? m.tiles[4] : m.X[0];
    keep_lower<1>(x, warp, half * 32);
    {
      const auto X = split<E>(x);
      store_operand<E>(X_tile, X.hi, warp, half * 32);
      store_operand<E>(X_tile + kTile, X.lo, warp, half * 32);
    }
    publish();
    __syncthreads();
    wait(&m.S_full, 0);
    scale_columns(dp, m.in + half * 32);
    hand_over(dp);
    products_begin();
    product<E, 4, 0, 1>(dp, kmajor(X_tile), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(dp, kmajor(X_tile + kTile), mnmajor(m.S[0] + half * 32), true);
    product<E, 4, 0, 1>(dp, kmajor(X_tile), mnmajor(m.S[1] + half * 32), true);
    products_commit();
    products_wait<0>();
    hand_over(dp);
  }

  float R[4][4], s[4][4];
  float* const other = reinterpret_cast<float*>(m.S);
  if (!cut) {
    get(R, image.R + half * 2048, tid);
    strengths(s, m.S[0], R, half, row);
    times(o, R), times(dp, R);
  } else {
    exact_gates<E>(p, c.slot, head, 0, exact.a, exact.s);
    store_R(exact.O, o, row, col);
    store_R(other, dp, row, col);
    __syncthreads();
    exact_apply(exact.a, exact.s, exact.O, reinterpret_cast<const float*>(m.X), other, exact.X, nullptr);
    __syncthreads();
    load_R(o, exact.O, row, col);
    load_R(dp, other, row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 x = *reinterpret_cast<const float2*>(exact.s + (row + 8 * h) * 64 + col + t * 8);
        s[t][2 * h] = x.x, s[t][2 * h + 1] = x.y;
        R[t][2 * h] = R[t][2 * h + 1] = row + 8 * h < c.length ? 1.f : 0.f;
      }
  }

  // softmax, and <p, dp>, over both halves; then T in the place of o, Yk in that of dp, Yv in that of y
  const float scale = static_cast<float>(p.scale);
  const float d[2] = {m.diagonal[0][row], m.diagonal[0][row + 8]}, b[2] = {m.diagonal[1][row], m.diagonal[1][row + 8]};
  {
    float y[4][4];
    cotangents(o, dp, y, s, R, d, b, m.sums, half, half * 32, p.M, scale, row, [] { __syncthreads(); });
    if (cut) {
      store_R(exact.O, dp, row, col);
      store_R(other, y, row, col);
    } else {
      store_half(m.tiles[0], dp, half, warp);
      store_half(m.tiles[2], y, half, warp);
    }
  }
  publish();
  __syncthreads();

  WideSaved<E>& save = reinterpret_cast<WideSaved<E>*>(w.saved)[c.slot * p.HQ + q_head];
  float inner[4][4];
  float4* const T = reinterpret_cast<float4*>(save.T) + half * 512 + tid;
  float4* const U = reinterpret_cast<float4*>(save.U) + half * 512 + tid;
  if (cut) {
    // U: the rows' own Y, before exact_queries
    float own[4][4], x[4][4];
    load_R(own, exact.O, row, col);
    load_R(x, other, row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) own[t][e] = d[e >> 1] * own[t][e] + b[e >> 1] * x[t][e];
    exact_queries<E>(exact, reinterpret_cast<float*>(m.X), other, save);
    load_R(inner, exact.X, row, col);
    load_R(x, reinterpret_cast<const float*>(m.X), row, col);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[t][e] -= s[t][e] * inner[t][e], inner[t][e] += own[t][e];
      T[t * 128] = make_float4(o[t][0], o[t][1], o[t][2], o[t][3]);
      U[t * 128] = make_float4(inner[t][0], inner[t][1], inner[t][2], inner[t][3]);
      if (q_head % (p.HQ / p.H) == 0) reinterpret_cast<float4*>(image.R)[half * 512 + t * 128 + tid] = make_float4(x[t][0], x[t][1], x[t][2], x[t][3]);
    }
    return;
  }
  if (threadIdx.x == 0) {
    for (int side = 0; side < 2; ++side) bulk_store<sizeof(save.Y[side])>(save.Y[side], m.tiles[2 * side]);
    bulk_commit();
  }
  const E* const Yk = m.tiles[0];
  const E* const Yv = m.tiles[2];
  float x1[4][4], x2[4][4];
  hand_over(inner);
  hand_over(x1);
  hand_over(x2);
  products_begin();
  product<E, 4, 1, 1>(inner, mnmajor(m.X[0]), mnmajor(Yk + half * 32), false);
  product<E, 4, 1, 1>(inner, mnmajor(m.X[1]), mnmajor(Yk + half * 32), true);
  product<E, 4, 1, 1>(inner, mnmajor(m.X[0]), mnmajor(Yk + kTile + half * 32), true);
  product<E, 4, 1, 1>(inner, mnmajor(m.tiles[4]), mnmajor(Yv + half * 32), true);
  product<E, 4, 1, 1>(inner, mnmajor(m.tiles[5]), mnmajor(Yv + half * 32), true);
  product<E, 4, 1, 1>(inner, mnmajor(m.tiles[4]), mnmajor(Yv + kTile + half * 32), true);
  products_commit();
  const E* const S_rows = m.S[0] + half * 32 * 64;
  product<E, 4, 0, 0>(x1, kmajor(Yk), kmajor(S_rows), false);
  product<E, 4, 0, 0>(x1, kmajor(Yk + kTile), kmajor(S_rows), true);
  product<E, 4, 0, 0>(x1, kmajor(Yk), kmajor(S_rows + kTile), true);
  product<E, 4, 0, 0>(x2, kmajor(Yv), kmajor(S_rows), false);
  product<E, 4, 0, 0>(x2, kmajor(Yv + kTile), kmajor(S_rows), true);
  product<E, 4, 0, 0>(x2, kmajor(Yv), kmajor(S_rows + kTile), true);
  products_commit();
  products_wait<1>();
  hand_over(inner);
  uint32_t Y_in[4][2];
  const uint32_t Y_row = place(Yk, row, frag_col()) ^ (half * 64), S_row = place(m.S[0], row, frag_col()) ^ (half * 64);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float2 in = *reinterpret_cast<const float2*>(m.in + col + t * 8);
    float u[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t at = (Y_row + h * 1024) ^ (t * 16);
      const float2 k = both_at<E>(at), v = both_at<E>(at + 2 * kTile * 2), S = both_at<E>((S_row + h * 1024) ^ (t * 16));
      Y_in[t][h] = pack<E>(k.x * in.x, k.y * in.y);
      o[t][2 * h] -= S.x * inner[t][2 * h], o[t][2 * h + 1] -= S.y * inner[t][2 * h + 1];
      u[2 * h] = __fdividef(inner[t][2 * h] + d[h] * k.x + b[h] * v.x, R[t][2 * h]);  // after the sequence: not used
      u[2 * h + 1] = __fdividef(inner[t][2 * h + 1] + d[h] * k.y + b[h] * v.y, R[t][2 * h + 1]);
    }
    T[t * 128] = make_float4(o[t][0], o[t][1], o[t][2], o[t][3]);
    U[t * 128] = make_float4(u[0], u[1], u[2], u[3]);
  }
  products_wait<0>();
  hand_over(x1);
  hand_over(x2);
  keep_lower<0>(x1, warp, half * 32);
  keep_lower<0>(x2, warp, half * 32);
  store_operand<E>(m.tiles[8], operand<E>(x1), warp, half * 32);
  {
    const auto A2 = split<E>(x2);
    store_operand<E>(m.tiles[6], A2.hi, warp, half * 32);
    store_operand<E>(m.tiles[7], A2.lo, warp, half * 32);
  }
  __syncthreads();  // X of the keys is done with
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) *reinterpret_cast<uint32_t*>(at(m.X[0], row + 8 * h, col + t * 8)) = Y_in[t][h];
  publish();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) bulk_store<kTile * 2>(save.A[i], m.tiles[6] + i * kTile);
    bulk_store<kTile * 2>(save.A[3], m.X[0]);
    bulk_commit();
    bulk_wait();
  }
#endif
}

}  // namespace

void hopper_wide_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_wide(p, [&]<class E, int D>() {
    launch_early("hopper_wide_queries", wide_queries_kernel<E, D>, slots * p.HQ, kWideThreads, sizeof(WideQueriesShared<E>), p.stream, p, input_maps(p),
                 boundary_map(p, boundary), Backward<E>(w));
  });
}

}  // namespace gsa::cuda
