// Chunked forward and backward for Hopper (sm_90a): the recurrences of hopper_scan.cu for few sequences and heads. There a chunk waits for the one before it and its
// products with it; here what does not depend on the state is made first, and what is left of a step is a number times each element of the state.
//
//                        forward                                           backward, from the last chunk to the first
//     products_kernel    P = exp(G_end - ref) S^T X                        P = exp(ref) sum over the query heads of Y^T X              every chunk by itself
//     pass_kernel        H to the boundary states                          E = exp(G_end - ref) dH, edge = exp(G_end) <H, dH>          every element by itself
//                        H <- exp(G_end) H + P                             dH <- exp(ref) E + P
//
// All in fp32; P lies in memory between the two, 256 D bytes for a chunk, key/value head, bank and side. X, Y, S as there; of a chunk of several windows exp(G) is put into Y.
//
// products_kernel: a block has one chunk, key/value head, bank and side, the query heads of the group one after the other, the tiles of the next one on their way.
// pass_kernel: a thread has two slots and two dimensions, a block 512 elements: forward 64 slots and 8 dimensions, backward 8 slots and 64 dimensions, so that states
// and E are written, P and states read in whole sectors. Each thread brings what it needs itself, kGroups groups of kGroup chunks ahead; nobody waits for others
// but for the sums of the edges, once a group.
//
// Where gates forget, P need not be written and read: scan_kernel goes through several parts of a sequence beside each other, each from as many chunks before it as anything
// is left of, and says for which heads that would be too many (ScanParts). Only those are done here.
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 128, kStages = 2, kGroup = 4, kGroups = 4;

// Of a query head, in products_kernel.
template <class E, int D>
struct ProductTiles {
  E Y[2][kTile], X[64 * D];  // Y: or S
};
template <class E, int D>
constexpr int64_t products_shared(int heads) {
  return heads * static_cast<int64_t>(sizeof(ProductTiles<E, D>)) + kStages * 8;
}

// P of a chunk, head, bank and side: [D / 2][64 slots][2]. Where the elements (slot, d) and (slot, d + 1) are, d even.
[[maybe_unused]] __device__ inline int product_at(int slot, int d) { return d * 64 + slot * 2; }

// far: nullptr, or of each head and bank of a sequence whether anything is to be done. units: one a block, or several where there may be nothing to do.
template <class E, int D, bool reverse>
__global__ __launch_bounds__(kThreads, reverse&& D == 128 ? 3 : 4) void products_kernel(const __grid_constant__ BackwardParams p,
                                                                                        const __grid_constant__ Backward<E> w, float* products, const int* far,
                                                                                        int units) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto* const stages = reinterpret_cast<ProductTiles<E, D>*>(memory);
  const int r = reverse ? p.HQ / p.H : 1, count = min(r, kStages), banks = banks_of(p);
  auto* const full = reinterpret_cast<uint64_t*>(stages + count);
  if (far) {
    bool some = false;
    for (int i = threadIdx.x; i < p.N * p.H * banks; i += kThreads) some |= far[i] != 0;
    if (!__syncthreads_or(some)) return;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) init(full + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  struct Unit {
    int number, id;  // units: there is none
    Chunk c;
  };
  auto find = [&](int number) {
    Unit u{number};
    for (; u.number < units; u.number += gridDim.x) {
      u.id = reverse ? u.number : units - 1 - u.number;  // what the pass reads first is made last: it may still be in the L2
      if (find_chunk(p, u.id / 2 / banks / p.H, kChunk, u.c) && (!far || far[u.c.seq.n * p.H * banks + u.id / 2 % (p.H * banks)])) break;
    }
    return u;
  };
  int before = 0;  // query heads of the units before this one
  auto load = [&](const Unit& u, int h) {
    if (u.number < units && h < r) {
      const int stage = (before + h) % count, side = u.id % 2, bank = u.id / 2 % banks, head = u.id / 2 / banks % p.H, x_head = head * r + h;
      auto& tiles = stages[stage];
      if (threadIdx.x == 0) {
        const uint32_t bytes = (!reverse || side || exact_dH(p) ? 2 : 1) * kTile * 2;
        arrive_expecting(full + stage, bytes);
        bulk_load(tiles.Y, reverse ? w.saved[(u.c.slot * p.HQ + x_head) * banks + bank].Y[side][0] : w.gates[u.id / 2].S[0], bytes, full + stage);
      }
      load_tokens<D, kThreads>(tiles.X, rows_of(reverse ? side ? p.d_o : p.q : side ? p.v : p.k, u.c, x_head), u.c.length, threadIdx.x);
    }
    cp_async_commit();
  };
  Unit unit = find(blockIdx.x);
  load(unit, 0), load(unit, 1);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), row = warp * 16 + frag_row();
#pragma unroll 1
  while (unit.number < units) {
    const int id = unit.id;
    const GateImage<E>& image = w.gates[id / 2];
    const bool two = !reverse || id % 2 || exact_dH(p), cut = reverse && image.cut;  // two: parts of Y
    const float* const f = reverse ? image.in : image.out;
    const float top = cut ? 1.f : f[row], bottom = cut ? 1.f : f[row + 8];
    float P[D / 8][4];
#pragma unroll 1
    for (int h = 0; h < r; ++h) {
      const int step = before + h;
      auto& tiles = stages[step % count];
      cp_async_wait_for<1>();
      wait(full + step % count, step / count & 1);
      publish();
      __syncthreads();
      if (cut) from_the_beginning(tiles.Y, two, w.factors[id / 2].R, unit.c.length);
      hand_over(P);
      products_begin();
      product<E, 4, 1, 1>(P, mnmajor(tiles.Y[0]), mnmajor(tiles.X), h > 0);
      if (two) product<E, 4, 1, 1>(P, mnmajor(tiles.Y[1]), mnmajor(tiles.X), true);
      products_commit();
      products_wait<0>();
      hand_over(P);
      __syncthreads();  // everybody is done with the tiles
      if (h + 1 < r) load(unit, h + count);
    }
    before += r;
    unit = find(unit.number + gridDim.x);
    load(unit, 0), load(unit, 1);
    scale_rows(P, top, bottom);
    float* const to = products + int64_t(id) * (64 * D) + product_at(row, frag_col());
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      *reinterpret_cast<float2*>(to + product_at(0, t * 8)) = make_float2(P[t][0], P[t][1]);
      *reinterpret_cast<float2*>(to + product_at(8, t * 8)) = make_float2(P[t][2], P[t][3]);
    }
  }
#endif
}

// What each thread brings of a chunk, and the parts of the edges that the warps of a block have.
template <bool reverse>
struct PassShared {
  static constexpr int chunks = kGroup * kGroups;
  float4 P[chunks][kThreads];
  float2 in[chunks][kThreads], out[chunks][kThreads];
  uint32_t H[reverse ? chunks : 1][2][kThreads];
  float edge[2][4][32];  // [of every other group][warp][chunk, one of two slots, which two]
};

// Asynchronous; zero where not valid.
template <int bytes>
__device__ inline void bring(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(to)), "l"(from), "n"(bytes), "r"(valid ? bytes : 0) : "memory");
}
template <class E>
__device__ inline void store_two(E* to, int other, uint32_t x, uint32_t y) {
  *reinterpret_cast<uint32_t*>(to) = x, *reinterpret_cast<uint32_t*>(to + other) = y;
}

template <class E, int D, bool reverse>
__global__ __launch_bounds__(kThreads) void pass_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ ScanEnds ends, E* boundary,
                                                        const __grid_constant__ Backward<E> w, const float* products, const __grid_constant__ ScanParts done) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<PassShared<reverse>*>(memory);
  constexpr int parts = D / 8;
  const int part = blockIdx.x % parts, side = blockIdx.x / parts % 2;
  const int banks = banks_of(p), heads = p.H * banks, id = blockIdx.x / (2 * parts) % heads, head = id / banks, bank = id % banks;
  const Sequence seq = sequence<false>(p, blockIdx.x / (2 * parts) / heads, kChunk);
  const int64_t pool_row = state_row(p, seq.n);
  if (pool_row < 0) return;
  const int chunks = static_cast<int>(seq.chunks), tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  // Slots slot, slot + 1 and dimensions d, d + 1.
  const int slice = part % (D / 64), slots_from = part / (D / 64) * 8;
  const int slot = reverse ? slots_from + lane % 4 * 2 : warp % 2 * 32 + lane % 16 * 2;
  const int d = reverse ? slice * 64 + warp * 16 + lane / 4 * 2 : part * 8 + warp / 2 * 4 + lane / 16 * 2;
  const int state_slot = bank * kSlots + slot;
  const bool stored = state_slot < p.M;  // and the next one
  float h[2][2] = {};  // [slot][dimension]
  auto each_element = [&](int64_t of, auto&& f) {
    if (stored)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int e = 0; e < 2; ++e) f(h[s][e], (of * p.H + head) * D * p.M + (side ? (state_slot + s) * D + d + e : (d + e) * p.M + state_slot + s));
  };
  auto leave = [&] {
    with_states(ends.last[side], reverse ? DType::f32 : p.state_dtype,
                [&](auto* out) { each_element(pool_row, [&](float& x, int64_t i) { store_rounded(out[i], x); }); });
  };
  if (done.count > 1 && !done.far[seq.n * heads + id]) {
    if (!ends.last[side]) return;
    each_element(p.N * side + seq.n, [&](float& x, int64_t i) { x = done.last[i]; });
    return leave();
  }
  with_states(ends.first[side], reverse ? DType::f32 : p.state_dtype,
              [&](const auto* in) { each_element(ends.broadcast ? 0 : pool_row, [&](float& x, int64_t i) { x = to_float(in[i]); }); });

  // Counted in chunks, heads and banks: the first one that is passed, and from one to the next.
  const int64_t first_slot = seq.slot + (reverse ? chunks - 1 : 0), first = first_slot * heads + id, step = reverse ? -heads : heads;
  E* const state = boundary + ((first_slot * p.H + head) * 2 + side) * int64_t(D) * p.M + d * p.M + state_slot;
  const int64_t state_step = (reverse ? -p.H : p.H) * int64_t(2 * D) * p.M;
  const float* P_from = products + (first * 2 + side) * (64 * D) + product_at(slot, d);
  const GateImage<E>* image = w.gates + first;
  const E* H_from = state;
  auto load = [&](int group) {
    const int stage = group % kGroups * kGroup;
#pragma unroll
    for (int j = 0; j < kGroup; ++j, P_from += step * (2 * 64 * D), image += step, H_from += state_step)
      if (group * kGroup + j < chunks) {
        cp_async16(&m.P[stage + j][tid], P_from, true);
        bring<8>(&m.in[stage + j][tid], image->in + slot, true);
        bring<8>(&m.out[stage + j][tid], image->out + slot, true);
        if constexpr (reverse) bring<4>(&m.H[stage + j][0][tid], H_from, stored), bring<4>(&m.H[stage + j][1][tid], H_from + p.M, stored);
      }
    cp_async_commit();
  };
  // Where it stores a chunk's two and, `other` elements on, the other two: of slots slot and slot + 1, or of dimensions d and d + 1.
  E* const tile = w.E0 + (first * 3 + side) * (64 * D) + slice * kTile;
  E* to = reverse ? at(tile, slot, d % 64) : state;
  const int64_t to_step = reverse ? step * (3 * 64 * D) : state_step;
  const int other = reverse ? static_cast<int>(at(tile, slot + 1, d % 64) - to) : p.M;
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) load(group);
#pragma unroll 1
  for (int group = 0; group * kGroup < chunks; ++group) {
    const int stage = group % kGroups * kGroup;
    float edge[2 * kGroup];  // of each chunk and slot
    cp_async_wait_for<kGroups - 1>();
#pragma unroll
    for (int j = 0; j < kGroup; ++j, to += to_step) {
      const bool there = group * kGroup + j < chunks;
      const float4 P = m.P[stage + j][tid];
      const float2 in = m.in[stage + j][tid], out = m.out[stage + j][tid];
      float e[2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) e[0][k] = h[0][k] * out.x, e[1][k] = h[1][k] * out.y;
      if constexpr (reverse) {
        const float2 H0 = unpack<E>(m.H[stage + j][0][tid]), H1 = unpack<E>(m.H[stage + j][1][tid]);
        edge[2 * j] = in.x * (H0.x * e[0][0] + H1.x * e[0][1]), edge[2 * j + 1] = in.y * (H0.y * e[1][0] + H1.y * e[1][1]);
        uint32_t hi[2], lo[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) Arith<E>::split_pair(e[s][0], e[s][1], hi[s], lo[s]);
        if (there) store_two(to, other, hi[0], hi[1]);
        if (there && side) store_two(to + 64 * D, other, lo[0], lo[1]);
      } else if (there && stored) {
        store_two(to, other, pack<E>(h[0][0], h[1][0]), pack<E>(h[0][1], h[1][1]));
      }
      if (there) {
        h[0][0] = fmaf(in.x, e[0][0], P.x), h[0][1] = fmaf(in.x, e[0][1], P.y);
        h[1][0] = fmaf(in.y, e[1][0], P.z), h[1][1] = fmaf(in.y, e[1][1], P.w);
      }
    }
    load(group + kGroups);
    if constexpr (reverse) {
      // The sums over a warp's dimensions, lane / 4: half of what a lane has it gives away, for a part of the other half; what is left is edge[lane / 4].
#pragma unroll
      for (int n = kGroup; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const bool upper = lane & n * 4;
          const float keep = upper ? edge[i + n] : edge[i], give = upper ? edge[i] : edge[i + n];
          edge[i] = keep + __shfl_xor_sync(0xffffffffu, give, n * 4);
        }
      m.edge[group % 2][warp][lane] = edge[0];
      __syncthreads();
      if (warp == 0 && group * kGroup + lane / 8 < chunks) {
        const int64_t at = first + (group * kGroup + lane / 8) * step;
        float sum = 0.f;
#pragma unroll
        for (int x = 0; x < 4; ++x) sum += m.edge[group % 2][x][lane / 2 % 4 + lane % 2 * 4 + lane / 8 * 8];
        w.edge[(at * 2 + side) * D + slice * 64 + slots_from + lane % 8] = sum;
      }
    }
  }
  leave();
#endif
}

// In the room for the products: they themselves, then ScanParts::last, then ScanParts::far.
struct Room {
  int64_t last, far, bytes;
  explicit Room(const Params& p) {
    const bool parts = hopper_scan_parts(p).count > 1;
    last = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H * banks_of(p) * 2 * 64 * p.K * static_cast<int64_t>(sizeof(float));
    far = last + (parts ? 2 * p.N * p.H * p.K * p.M * static_cast<int64_t>(sizeof(float)) : 0);
    bytes = far + (parts ? p.N * p.H * banks_of(p) * static_cast<int64_t>(sizeof(int)) : 0);
  }
};

template <bool reverse>
void scan_few(const BackwardParams& p, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w) {
  const int64_t units = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H * banks_of(p) * 2;
  const Room room(p);
  ScanParts parts = hopper_scan_parts(p);
  if (parts.count > 1) {
    char* const base = reinterpret_cast<char*>(w.products);
    parts.last = reinterpret_cast<float*>(base + room.last), parts.far = reinterpret_cast<int*>(base + room.far);
    hopper_scan(p, reverse, ends, boundary, w, 2, parts);
  }
  select_hopper(p, [&]<class E, int D>() {
    launch_early(reverse ? "hopper_cotangents: products" : "hopper_states: products", products_kernel<E, D, reverse>,
                 parts.far ? std::min(units, int64_t(64) * hopper_multiprocessors()) : units, kThreads,
                 products_shared<E, D>(reverse ? std::min(p.HQ / p.H, kStages) : 1), p.stream, p, Backward<E>(w), w.products,
                 static_cast<const int*>(parts.far), static_cast<int>(units));
    launch_early(reverse ? "hopper_cotangents" : "hopper_states", pass_kernel<E, D, reverse>, p.N * p.H * banks_of(p) * 2 * (D / 8), kThreads,
                 sizeof(PassShared<reverse>), p.stream, p, ends, static_cast<E*>(boundary), Backward<E>(w), static_cast<const float*>(w.products), parts);
  });
}

}  // namespace

// A step of scan_kernel takes as long with one block as with two on every multiprocessor; here time is traffic, that of P more than all else, and goes with the number
// of heads. They meet where scan_kernel has a block for every other multiprocessor. Short sequences are over before a second launch pays.
bool hopper_few(const Params& p) {
  if (hopper_wide(p)) return false;
  if (const Kernels wanted = wanted_kernels(); wanted == Kernels::few || wanted == Kernels::parts) return wanted == Kernels::few;
  const int64_t sequences = p.cu_seqlens ? p.N : 1;  // in a row of T tokens
  return 2 * hopper_scan_blocks(p) <= hopper_multiprocessors() && p.T >= 16 * kChunk * sequences;
}

int64_t hopper_products_bytes(const Params& p) { return Room(p).bytes; }

void hopper_scan_few(const BackwardParams& p, bool reverse, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w) {
  reverse ? scan_few<true>(p, ends, boundary, w) : scan_few<false>(p, ends, boundary, w);
}

}  // namespace gsa::cuda
