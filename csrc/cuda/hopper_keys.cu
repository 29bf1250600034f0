// Chunked backward for Hopper (sm_90a), last part: the gradients of k, v, s and g. One block for each chunk and key/value head, first its keys, then its values;
// S, R are those of hopper_gates.cu, Y (Yk, Yv) and e of hopper_queries.cu, E and the edges of hopper_scan.cu. A chunk of several windows is left to
// hopper_windows.cu.
//
//                            keys                               values
//     A, B                   q, k                               d_o, v
//     W^T = triu(S Y^T)      dk = W^T q + S E                   dv = W^T d_o + S E
//     inner                  strict triu(k q^T) Y               strict triu(v d_o^T) Y
//     outer                  k E^T                              v E^T
//
// dk, dv and inner are sums over the query heads of the group. And then, the sum of both sides:
//     ds_j = (inner + outer + diagonal of (B A^T) Y) / R
//     dg_t = sum_{u >= t} (e_u - S_u inner_u) + sum_{j < t} S_j outer_j + edge           (products with triangles of ones)
// Neither e nor inner has the diagonal, and what comes from after the chunk is summed from the front: nothing large is left to cancel (chunk_backward.cu).
//
// Two warpgroups for a bank, each with 32 slots (ds, dg) and its share of the dimensions (dk, dv); what is [64 x 64] tokens is made by all. With one bank two blocks on
// a multiprocessor. What has to be more exact than 16 bits is an operand in two parts: X in inner, S, Y, W and E of the values, the terms of dg.
//
//     shared memory      holds, for one side at a time
//     A, B, E0           tokens; E, of the values in two parts
//     Y                  in two parts, for each head anew; then the terms of dg
//     S                  in two parts
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class E, int D, int BANKS>
struct KeysShared {
  alignas(1024) E A[64 * D], Y[BANKS][2][kTile];
  E B[64 * D], E0[BANKS][2][64 * D], S[BANKS][2][kTile];
  uint64_t full;
};
static_assert(sizeof(KeysShared<bf16, 128, 1>) <= 113 * 1024 && sizeof(KeysShared<bf16, 128, 2>) <= 227 * 1024);

template <class E, int D, int BANKS>
__global__ __launch_bounds__(256 * BANKS, 3 - BANKS) void keys_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  constexpr int kThreads = 256 * BANKS, width = D / (2 * BANKS);  // dimensions of a warpgroup
  const int r = p.HQ / p.H;
  const int head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, kChunk, c)) return;
  const int own = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), bank = own / 2, half = own % 2;
  const int64_t at = (c.slot * p.H + head) * BANKS;
  const GateImage<E>* const image = w.gates + at;
  const bool cut = w.gates[kept(static_cast<int>(at))].cut;
  auto& m = *reinterpret_cast<KeysShared<E, D, BANKS>*>(memory);
  if (threadIdx.x == 0) {
    init(&m.full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // What a side and query head need, on their way: tokens, and the tiles in bulk.
  auto tokens = [&](int side, int h) {
    if (h == 0) load_tokens<D, kThreads>(m.B, rows_of(side ? p.v : p.k, c, head), c.length, threadIdx.x);
    load_tokens<D, kThreads>(m.A, rows_of(side ? p.d_o : p.q, c, head * r + h), c.length, threadIdx.x);
    cp_async_commit();
  };
  auto tiles = [&](int side, int h) {
    if (threadIdx.x) return;
    const uint32_t bytes = 64 * D * 2;
    arrive_expecting(&m.full, BANKS * (2 * kTile * 2 + (h ? 0 : (1 + side) * bytes) + (side + h ? 0 : sizeof(m.S[0]))));
    const Saved<E>* const saved = w.saved + (c.slot * p.HQ + head * r + h) * BANKS;
    for (int b = 0; b < BANKS; ++b) {
      if (side + h == 0) bulk_load(m.S[b], image[b].S, sizeof(m.S[b]), &m.full);
      bulk_load(m.Y[b], saved[b].Y[side], 2 * kTile * 2, &m.full);
      if (h == 0) bulk_load(m.E0[b][0], w.E0 + ((at + b) * 3 + side) * 64 * D, bytes, &m.full);
      if (h == 0 && side) bulk_load(m.E0[b][1], w.E0 + ((at + b) * 3 + 2) * 64 * D, bytes, &m.full);
    }
  };
  __syncthreads();
  tokens(0, 0);
  if (cut) return cp_async_wait_for<0>();
  tiles(0, 0);
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const bool coupled = p.s.ptr == nullptr;
  float inner[4][4], outer[4][4], diagonal[4][4];
  zero(inner), zero(outer), zero(diagonal);
  uint32_t parity = 0;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    float dx[width / 8][4];
#pragma unroll 1
    for (int h = 0; h < r; ++h, parity ^= 1) {
      if (side + h) {
        __syncthreads();  // everybody is done with the tiles
        tokens(side, h), tiles(side, h);
      }
      cp_async_wait_for<0>();
      wait(&m.full, parity);
      publish();
      __syncthreads();
      const E *A_own = columns<E>(m.A, own * width), *E_rows = m.E0[bank][0] + half * 32 * 64;
      {  // inner, outer
        float x[8][4], d[2];
        hand_over(x);
        hand_over(outer);
        products_begin();
        product<E, D / 16, 0, 0>(x, kmajor(m.B), kmajor(m.A), false);
        products_commit();
        if (h == 0) {
          product<E, D / 16, 0, 0>(outer, kmajor(m.B), kmajor(E_rows), true);
          if (side) product<E, D / 16, 0, 0>(outer, kmajor(m.B), kmajor(E_rows + 64 * D), true);
        }
        products_commit();
        products_wait<1>();
        hand_over(x);
        diagonal_of(d, x, warp);
        keep<false, 1>(x, warp);
        const auto X = split<E>(x);
        hand_over(inner);
        products_begin();
        product<E, 1>(inner, X.hi, mnmajor(m.Y[bank][0] + half * 32));
        product<E, 1>(inner, X.lo, mnmajor(m.Y[bank][0] + half * 32));
        product<E, 1>(inner, X.hi, mnmajor(m.Y[bank][1] + half * 32));
        products_commit();
        const uint32_t Y_row = place(m.Y[bank][0], row, frag_col()) ^ (half * 64);
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const float2 Y = both_at<E>((Y_row + g * 1024) ^ (t * 16));
            diagonal[t][2 * g] += d[g] * Y.x, diagonal[t][2 * g + 1] += d[g] * Y.y;
          }
        products_wait<0>();
        hand_over(inner);
        hand_over(outer);
      }
      {  // dk or dv
        float x[8][4];
        hand_over(x);
        products_begin();
#pragma unroll
        for (int b = 0; b < BANKS; ++b) {
          product<E, 4, 0, 0>(x, kmajor(m.S[b][0]), kmajor(m.Y[b][0]), b > 0);
          product<E, 4, 0, 0>(x, kmajor(m.S[b][1]), kmajor(m.Y[b][0]), true);
          product<E, 4, 0, 0>(x, kmajor(m.S[b][0]), kmajor(m.Y[b][1]), true);
        }
        products_commit();
        products_wait<0>();
        hand_over(x);
        keep<false, 0>(x, warp);
        const auto W = split<E>(x);
        if (h == 0) zero(dx);
        hand_over(dx);
        products_begin();
        if (h == 0)
#pragma unroll
          for (int b = 0; b < BANKS; ++b) {
            const E* E_own = columns<E>(m.E0[b][0], own * width);
            product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(E_own), true);
            product<E, 4, 0, 1>(dx, kmajor(m.S[b][1]), mnmajor(E_own), true);
            if (side) product<E, 4, 0, 1>(dx, kmajor(m.S[b][0]), mnmajor(E_own + 64 * D), true);
          }
        product<E, 1>(dx, W.hi, mnmajor(A_own));
        if (side) product<E, 1>(dx, W.lo, mnmajor(A_own));
        products_commit();
        products_wait<0>();
        hand_over(dx);
      }
    }
    store_window<E>(rows_of(side ? p.dv : p.dk, c, head), dx, warp, 0, c.length, own * width);
  }

  float T[4][4], s[4][4];  // terms of dg from the back; write strengths. From the front in the place of outer, ds in that of inner
  zero(T);
#pragma unroll 1
  for (int h = 0; h < r; ++h) {
    const float4* e = reinterpret_cast<const float4*>(w.saved[(c.slot * p.HQ + head * r + h) * BANKS + bank].e) + half * 512 + tid;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 y = e[t * 128];
      T[t][0] += y.x, T[t][1] += y.y, T[t][2] += y.z, T[t][3] += y.w;
    }
  }
  {
    const uint32_t S_row = place(m.S[bank][0], row, frag_col()) ^ (half * 64);
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
          outer[t][k] *= S_;
          s[t][k] = S_ * R_;
        }
      }
  }
  __syncthreads();  // everybody is done with the tiles
  E *T_tile = (half ? m.E0[0][0] : m.Y[0][0]) + bank * 2 * kTile, *F_tile = T_tile + kTile;  // of this warpgroup's columns, two parts side by side
  {
    auto X = split<E>(T);
    store_operand<E>(T_tile, X.hi, warp), store_operand<E>(T_tile, X.lo, warp, 32);
    X = split<E>(outer);
    store_operand<E>(F_tile, X.hi, warp), store_operand<E>(F_tile, X.lo, warp, 32);
  }
  publish();
  sync(2 + own, 128);
  float dg[4][4];
  zero(dg);
  hand_over(dg);
  products_begin();
  {
    const auto ones = triangle_of_ones<E, true>(warp);
    product<E, 1>(dg, ones, mnmajor(T_tile));
    product<E, 1>(dg, ones, mnmajor(T_tile + 32));
  }
  {
    const auto ones = triangle_of_ones<E, false>(warp);
    product<E, 1>(dg, ones, mnmajor(F_tile));
    product<E, 1>(dg, ones, mnmajor(F_tile + 32));
  }
  products_commit();
  const float* edges = w.edge + (at + bank) * 2 * D + col;
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float edge = 0.f;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) edge += edges[i * 64 + t * 8 + e];
      diagonal[t][e] = edge;
    }
  products_wait<0>();
  hand_over(dg);
  const Rows ds_rows = rows_of(p.ds, c, head), dg_rows = rows_of(p.dg, c, head);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int j = row + 8 * h;
    if (j < c.length)
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[e] = dg[t][2 * h + e] + diagonal[t][e];
          if (j == 0 && image[bank].start[col + t * 8 + e] == 0.f) x[e] = 0.f;  // a reset forgets whatever the gate would have changed
          if (coupled) x[e] -= (1.f - s[t][2 * h + e]) * inner[t][2 * h + e];  // s = 1 - exp(g)
        }
        if (own * 32 + t * 8 < p.M) {
          const int slot = bank * kSlots + col + t * 8;
          store_pair<E>(p.dg, dg_rows.at(j) + slot, x[0], x[1]);
          if (!coupled) store_pair<E>(p.ds, ds_rows.at(j) + slot, inner[t][2 * h], inner[t][2 * h + 1]);
        }
      }
  }
#endif
}

}  // namespace

void hopper_keys(const BackwardParams& p, const BackwardWorkspace& w) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  select_banks(p, [&]<class E, int D, int BANKS>() {
    launch("hopper_keys", keys_kernel<E, D, BANKS>, slots * p.H, 256 * BANKS, sizeof(KeysShared<E, D, BANKS>), p.stream, p, Backward<E>(w));
  });
}

}  // namespace gsa::cuda
