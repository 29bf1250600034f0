// Chunked backward for Hopper (sm_90a), instead of hopper_keys.cu for a chunk and key/value head with several windows (strong gates, resets): its mathematics,
// windows from the last to the first, the cotangents dH of the state in registers. dH after the chunk is the E of hopper_scan.cu, Y and e are those of
// hopper_queries.cu. One block on each multiprocessor, which finds the chunks to do among those that are its share. Two warpgroups have the same form, one for the
// keys, one for the values:
//
//                            keys                               values
//     A, B, H                q, k, Hk                           d_o, v, Hv               H before the window
//     W^T = triu(S Y^T)      dk = W^T q + S E                   dv = W^T d_o + S E       E = exp(G_end - ref) dH
//     inner                  strict triu(k q^T) Y               strict triu(v d_o^T) Y
//     outer                  k E^T                              v E^T
//     dH <-                  exp(ref) (E + Y^T q)               exp(ref) (E + Y^T d_o)   cotangent before the window
//
// dk, dv, inner and Y^T A are sums over the query heads of the group, which come one after the other: once for dk, dv and dH, once more, backwards, for inner.
// ds and dg as in hopper_keys.cu. A third warpgroup brings the tiles and makes the windows (core/hopper.cuh). Banks one after the other, each with all windows; dk and
// dv, sums over both, wait in memory in between.
//
//     shared memory                    written by     read by       barriers (full / free)
//     window, B, H [side]              loader         each side     full / window_free, B_free, H_free [side]
//     A [side], Y [side]               loader         each side     head_full / head_free
//     E [side]: E, then terms of dg, then ds or dg for the other side: its side, behind its own barrier and that of both; E_free, where the loader makes a window's
//                                      state from the chunk's in it
//     several                          all            all           -
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kWords = 128;  // of 32 chunks and heads each: a block's share
[[maybe_unused]] constexpr int kBoth = 4;  // the barrier of both sides

template <class E, int D>
struct WindowsShared {
  static constexpr int rows = D == 64 ? 2 * kTile : 64 * D;  // of E0: room for a tile in two parts
  E A[2][64 * D], B[2][64 * D], H[2][64 * D], Y[2][2][kTile];
  E E0[2][rows], E1[64 * D];  // rounded; of the values, what rounding dropped
  Window<E> window;
  typename GateMaker<E, 16>::Scratch scratch;
  float edge[2][kSlots], decay[kSlots];
  uint32_t several[kWords];  // bit i of word j: this block's chunk and head 32 j + i
  uint64_t full, head_full, window_free, E_free, B_free[2], H_free[2], head_free;
};
static_assert(sizeof(WindowsShared<bf16, 128>) <= 227 * 1024);

// The chunks and heads of this block.
struct Several {
  const uint32_t* words;
  int word = -1;
  uint32_t bits = 0;
  [[maybe_unused]] __device__ bool next(const Params& p, Chunk& c, int& head) {
    while (!bits)
      if (++word == kWords) return false;
      else bits = words[word];
    const int i = word * 32 + __ffs(bits) - 1, id = blockIdx.x + gridDim.x * i;
    bits &= bits - 1;
    head = id % p.H;
    return find_chunk(p, id / p.H, kChunk, c);
  }
};

// The sides' code is one for both (two copies would not fit the instruction cache); `values` says which side this warpgroup is.
template <class E, int D, int BANKS>
__device__ __forceinline__ void side(const BackwardParams& p, WindowsShared<E, D>& shared, const Backward<E>& left, const int values) {
  constexpr int NT = D / 8;
  const int own = 2 + values;  // barrier of this warpgroup
  const int r = p.HQ / p.H;
  const bool coupled = p.s.ptr == nullptr;

  uint32_t parity = 0, head_parity = 0;
  Several several{shared.several};
  Chunk c;
  int head;
#pragma unroll 1
  for (int bank = BANKS; bank < BANKS || several.next(p, c, head); ++bank) {
    bank %= BANKS;  // a chunk and head, then its other bank
    float dH[NT][4];
    {
      const E* E_after = left.E0 + (((c.slot * p.H + head) * BANKS + bank) * 3 + values) * 64 * D;
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const E* from = hopper::at(const_cast<E*>(E_after) + t / 8 * kTile, threadIdx.x % 128 / 32 * 16 + frag_row() + 8 * h, t % 8 * 8 + frag_col());
          float2 x = unpack<E>(*reinterpret_cast<const uint32_t*>(from));
          if (values) {
            const float2 dropped = unpack<E>(*reinterpret_cast<const uint32_t*>(from + 64 * D));
            x.x += dropped.x, x.y += dropped.y;
          }
          dH[t][2 * h] = x.x, dH[t][2 * h + 1] = x.y;
        }
    }
#pragma unroll 1
    for (bool first = false; !first; parity ^= 1) {
      // Addresses are made where they are used: there are no registers to keep them in.
      auto& m = *reinterpret_cast<WindowsShared<E, D>*>(reinterpret_cast<char*>(&shared) + kept(0));
      const int tid = kept(threadIdx.x) % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0), lane = kept(threadIdx.x) % 32;
      const int row = warp * 16 + lane / 4, col = lane % 4 * 2;
      const E *A = m.A[values], *B = m.B[values], *Y0 = m.Y[values][0], *Y1 = m.Y[values][1];
      E *H = m.H[values], *E0 = m.E0[values];
      const Window<E>& w = m.window;
      wait(&m.full, parity);
      first = w.begin == 0;
      const int begin = w.begin, end = w.end;
      if (begin > 0) {  // the state before this window
#pragma unroll 1
        for (int d = warp * 16; d < D; d += 64) Advance<E>{m.E0[0], m.decay}.apply(H, B, d);
        sync(kBoth, 256);
      }
      scale_rows(dH, w.out[row], w.out[row + 8]);  // E
      {
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
            store_operand<E>(m.E1 + g * kTile, X.lo, warp);
          } else {
            store_operand<E>(E0 + g * kTile, operand<E>(x), warp);
          }
        }
        publish();
        {  // exp(G_end) <H, dH> of every slot
          float sum[2];
          state_products(sum, H, dH, warp);
          sum[0] *= w.in[row], sum[1] *= w.in[row + 8];
          if ((lane_id() & 3) == 0) m.edge[values][row] = sum[0], m.edge[values][row + 8] = sum[1];
          arrive(&m.H_free[values]);
        }
      }

      {  // dk or dv, and dH
        float dx[NT][4];
#pragma unroll 1
        for (int h = 0; h < r; ++h) {
          wait(&m.head_full, head_parity);
          head_parity ^= 1;
          {  // of Y what is outside of the window is nothing
            const int j = tid / 2;
            if (j < begin || (j >= end && end < c.length))
#pragma unroll
              for (int x = 0; x < 8; ++x) reinterpret_cast<uint4*>(m.Y[values][x >> 2])[tid * 4 + (x & 3)] = make_uint4(0, 0, 0, 0);
            publish();
          }
          sync(own, 128);
          {
            float x[8][4];
            hand_over(dH);
            hand_over(x);
            products_begin();
            product<E, 4, 0, 0>(x, kmajor(w.S[0]), kmajor(Y0), false);
            product<E, 4, 0, 0>(x, kmajor(w.S[1]), kmajor(Y0), true);
            product<E, 4, 0, 0>(x, kmajor(w.S[0]), kmajor(Y1), true);
            products_commit();
            product<E, 4, 1, 1>(dH, mnmajor(Y0), mnmajor(A), true);
            product<E, 4, 1, 1>(dH, mnmajor(Y1), mnmajor(A), true);
            products_commit();
            products_wait<1>();
            hand_over(x);
            keep<false, 0>(x, warp);
            const auto W = split<E>(x);
            hand_over(dx);
            products_begin();
            if (h == 0) {
              product<E, 4, 0, 1>(dx, kmajor(w.S[0]), mnmajor(E0), false);
              product<E, 4, 0, 1>(dx, kmajor(w.S[1]), mnmajor(E0), true);
              if (values) product<E, 4, 0, 1>(dx, kmajor(w.S[0]), mnmajor(m.E1), true);
            }
            product<E, 1>(dx, W.hi, mnmajor(A));
            if (values) product<E, 1>(dx, W.lo, mnmajor(A));
            products_commit();
            products_wait<0>();
            hand_over(dx);
            hand_over(dH);
          }
          if (h + 1 < r) arrive(&m.head_free);
        }
        scale_rows(dH, w.in[row], w.in[row + 8]);
        float* const others = left.dx + (blockIdx.x * 2 + values) * int64_t(64 * D) + tid * 4;  // of the other bank
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (BANKS > 1 && row + 8 * h >= begin && row + 8 * h < end)
#pragma unroll
            for (int t = 0; t < NT; ++t) {
              float2& other = *reinterpret_cast<float2*>(others + t * 512 + 2 * h);
              if (bank == 0) other = make_float2(dx[t][2 * h], dx[t][2 * h + 1]);
              else dx[t][2 * h] += other.x, dx[t][2 * h + 1] += other.y;
            }
        if (bank == BANKS - 1) store_window<E>(rows_of(values ? p.dv : p.dk, c, head), dx, warp, begin, end);
      }
      float inner[8][4], diagonal[8][4], d[2];
      zero(inner);
      zero(diagonal);
#pragma unroll 1
      for (int h = r - 1; h >= 0; --h) {
        if (h < r - 1) {
          wait(&m.head_full, head_parity);
          head_parity ^= 1;
          const int j = tid / 2;
          if (j < begin || (j >= end && end < c.length))
#pragma unroll
            for (int x = 0; x < 8; ++x) reinterpret_cast<uint4*>(m.Y[values][x >> 2])[tid * 4 + (x & 3)] = make_uint4(0, 0, 0, 0);
          publish();
          sync(own, 128);
        }
        float x[8][4];
        hand_over(x);
        products_begin();
        product<E, D / 16, 0, 0>(x, kmajor(B), kmajor(A), false);
        products_commit();
        products_wait<0>();
        hand_over(x);
        diagonal_of(d, x, warp);
        keep<false, 1>(x, warp);
        const auto X = split<E>(x);
        hand_over(inner);
        products_begin();
        product<E, 1>(inner, X.hi, mnmajor(Y0));
        product<E, 1>(inner, X.lo, mnmajor(Y0));
        product<E, 1>(inner, X.hi, mnmajor(Y1));
        products_commit();
        const uint32_t Y_row = place(Y0, row, col);
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const float2 Y = both_at<E>((Y_row + g * 1024) ^ (t * 16));
            diagonal[t][2 * g] += d[g] * Y.x, diagonal[t][2 * g + 1] += d[g] * Y.y;
          }
        products_wait<0>();
        hand_over(inner);
        arrive(&m.head_free);
      }
      float outer[8][4];
      hand_over(outer);
      products_begin();
      product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(E0), false);
      if (values) product<E, D / 16, 0, 0>(outer, kmajor(B), kmajor(m.E1), true);
      products_commit();
      // ds in the place of diagonal, terms of dg from the back in that of inner, from the front in that of outer
      float (&ds)[8][4] = diagonal, (&T)[8][4] = inner;
      const float* R = w.R + row * ldr + col;
      const uint32_t S_row = place(w.S[0], row, col);
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16));
          ds[t][2 * h] += inner[t][2 * h], ds[t][2 * h + 1] += inner[t][2 * h + 1];
          T[t][2 * h] *= -S.x, T[t][2 * h + 1] *= -S.y;
        }
      if (!values)  // e, the sum over the heads
#pragma unroll 1
        for (int h = 0; h < r; ++h) {
          const float4* e = reinterpret_cast<const float4*>(left.saved[(c.slot * p.HQ + head * r + h) * BANKS + bank].e) + tid;
#pragma unroll
          for (int t = 0; t < 8; ++t) {
            const float4 y = e[t * 128];
            T[t][0] += y.x, T[t][1] += y.y, T[t][2] += y.z, T[t][3] += y.w;
          }
        }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (row + 8 * h < begin || row + 8 * h >= end)
#pragma unroll
          for (int t = 0; t < 8; ++t) T[t][2 * h] = T[t][2 * h + 1] = 0.f;
      products_wait<0>();
      hand_over(outer);
      arrive(&m.B_free[values]);
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), f = *reinterpret_cast<const float2*>(R + h * 8 * ldr + t * 8);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int k = 2 * h + e;
            ds[t][k] = __fdividef(ds[t][k] + outer[t][k], e ? f.y : f.x);  // outside the window: not stored
            outer[t][k] *= e ? S.y : S.x;
          }
        }
      float dg[8][4];
      zero(dg);
      sync(own, 128);  // E is done with
      E* T1 = E0 + kTile;
#pragma unroll 1
      for (int front = 0; front < 2; ++front) {
        const auto X = split<E>(T);
        store_operand<E>(E0, X.hi, warp);
        store_operand<E>(T1, X.lo, warp);
        publish();
        sync(own, 128);
        auto ones = triangle_of_ones<E, true>(warp);
        if (front) ones = triangle_of_ones<E, false>(warp);
        hand_over(dg);
        products_begin();
        product<E, 1>(dg, ones, mnmajor(E0));
        product<E, 1>(dg, ones, mnmajor(T1));
        products_commit();
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) T[t][e] = outer[t][e];
        products_wait<0>();
        hand_over(dg);
        sync(own, 128);
      }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float2 edge = *reinterpret_cast<const float2*>(m.edge[values] + t * 8 + col);
        dg[t][0] += edge.x, dg[t][1] += edge.y, dg[t][2] += edge.x, dg[t][3] += edge.y;
      }
      if (row == begin || row + 8 == begin)  // a reset forgets whatever the gate would have changed
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (row + 8 * (e >> 1) == begin && w.start[t * 8 + col + (e & 1)] == 0.f) dg[t][e] = 0.f;
      if (coupled) {  // s = 1 - exp(g)
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float2 S = both_at<E>((S_row + h * 1024) ^ (t * 16)), f = *reinterpret_cast<const float2*>(R + h * 8 * ldr + t * 8);
            dg[t][2 * h] -= (1.f - S.x * f.x) * ds[t][2 * h], dg[t][2 * h + 1] -= (1.f - S.y * f.y) * ds[t][2 * h + 1];
          }
      }
      arrive(&m.window_free);
      // The keys' side writes dg, the values' ds: each gives the other its part.
#pragma unroll
      for (int t = 0; t < 8; ++t)
        if (values)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = ds[t][e];
            ds[t][e] = dg[t][e], dg[t][e] = x;
          }
      put(reinterpret_cast<float*>(E0), ds, tid);
      sync(kBoth, 256);
      if (!values || !coupled) {
        const View& out = values ? p.ds : p.dg;
        const float* theirs = reinterpret_cast<const float*>(m.E0[!values]);
        const Rows rows = rows_of(out, c, head);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int j = row + 8 * h;
          const int64_t at = rows.at(j) + bank * kSlots + col;
          if (j >= begin && j < end)
#pragma unroll
            for (int t = 0; t < 8; ++t) {
              const float2 x = *reinterpret_cast<const float2*>(theirs + (t * 128 + tid) * 4 + 2 * h);
              if (bank * kSlots + t * 8 < p.M) store_pair<E>(out, at + t * 8, dg[t][2 * h] + x.x, dg[t][2 * h + 1] + x.y);
            }
        }
      }
      sync(kBoth, 256);  // both have read it
      arrive(&m.E_free);
    }
  }
}

template <class E, int D, int BANKS>
__global__ __launch_bounds__(384, 1) void windows_kernel(const __grid_constant__ BackwardParams p, const E* boundary, const __grid_constant__ Backward<E> w,
                                                         int chunks) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WindowsShared<E, D>*>(memory);
  uint32_t any = 0;
  for (int word = threadIdx.x / 32; word < kWords; word += 12) {
    const int64_t id = blockIdx.x + int64_t(gridDim.x) * (word * 32 + threadIdx.x % 32);
    const uint32_t bits = __ballot_sync(0xffffffffu, id < chunks && w.gates[id * BANKS].cut);
    if (threadIdx.x % 32 == 0) m.several[word] = bits;
    any |= bits;
  }
  if (!__syncthreads_or(any)) return;
  const int r = p.HQ / p.H;
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    init(&m.full, 128), init(&m.head_full, 129), init(&m.window_free, 256), init(&m.head_free, 256), init(&m.E_free, 256);
    for (int i = 0; i < 2; ++i) init(m.B_free + i, 128), init(m.H_free + i, 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (role == 0) {
    give_registers<104>();
    GateMaker<E, 16> gates(m.scratch, tid, 1);
    uint32_t parity = 1, head_parity = 1;  // of what is free
    Several several{m.several};
    Chunk c;
    int head;
    uint64_t starts = 0;
    for (int bank = BANKS; bank < BANKS || several.next(p, c, head); ++bank) {
      bank %= BANKS;
      if (bank == 0) {
        gates.together();  // scratch is free
        for (int other = 0; other < BANKS; ++other) {
          gates.bank = other;
          gates.load(p, c, head);
          gates.spans(other > 0);
        }
        gates.together();
        starts = gates.starts(c.length, m.scratch.span, m.scratch.span);
      }
      gates.bank = bank;
      for (int end = c.length; end > 0;) {
        gates.load(p, c, head);
        const int begin = 63 - __clzll(starts & (end == 64 ? ~0ull : (1ull << end) - 1));
        float before[2], total[2];
        gates.sums(begin, end, before, total);
        if (begin > 0) {
          wait(&m.window_free, parity), wait(&m.E_free, parity);
          Advance<E>{m.E0[0], m.decay}.write(gates, begin);
        }
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
          wait(m.H_free + side, parity);
          load_state<D, 128>(m.H[side], boundary + ((c.slot * p.H + head) * 2 + side) * int64_t(D) * p.M, p.M, tid, bank);
        }
        gates.make(begin, end, before, total);
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
          wait(m.B_free + side, parity);
          load_tokens<D, 128>(m.B[side], rows_of(side ? p.v : p.k, c, head), c.length, tid);
        }
        const int steps = 2 * r - 1;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int64_t q_head = head * r + (step < r ? step : 2 * r - 2 - step);
          wait(&m.head_free, head_parity);
          head_parity ^= 1;
          if (tid == 0) {
            arrive_expecting(&m.head_full, 4 * kTile * 2);
            bulk_load(m.Y, w.saved[(c.slot * p.HQ + q_head) * BANKS + bank].Y, 4 * kTile * 2, &m.head_full);
          }
#pragma unroll 1
          for (int side = 0; side < 2; ++side) load_tokens<D, 128>(m.A[side], rows_of(side ? p.d_o : p.q, c, q_head), c.length, tid);
          cp_async_commit();
          if (step == 0) {
            wait(&m.window_free, parity), wait(&m.E_free, parity);
            if (tid == 0) m.window.begin = begin, m.window.end = end;
            gates.store(m.window, total);
          }
          cp_async_wait_for<0>();
          publish();
          if (step == 0) arrive(&m.full);
          arrive(&m.head_full);  // the bulk copy was one more arrival
        }
        parity ^= 1;
        end = begin;
      }
    }
    return;
  }
  take_registers<200>();
  side<E, D, BANKS>(p, m, w, role - 1);
#endif
}

}  // namespace

int64_t hopper_windows_blocks(const Params& p) {
  const int64_t chunks = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H;
  return std::max(std::min<int64_t>(chunks, hopper_multiprocessors()), ceil_div(chunks, 32 * kWords));
}

void hopper_windows(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const int64_t chunks = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H;
  select_banks(p, [&]<class E, int D, int BANKS>() {
    launch("hopper_windows", windows_kernel<E, D, BANKS>, hopper_windows_blocks(p), 384, sizeof(WindowsShared<E, D>), p.stream, p,
           static_cast<const E*>(boundary), Backward<E>(w), static_cast<int>(chunks));
  });
}

}  // namespace gsa::cuda
