// Chunked forward and backward for Hopper (sm_90a): the states before each chunk, and the cotangents of the states after each chunk. One block for each sequence,
// key/value head, bank, side (keys, values) and 64 of its dimensions; one chunk after the other, the state H or dH [64 slots x 64 dimensions] in registers.
//
//     forward                                                    backward, from the last chunk to the first
//     H to the boundary states                                   E = exp(G_end - ref) dH to hopper_keys.cu, rounded; of the values also what rounding dropped
//                                                                edge = exp(G_end) <H, dH> of every slot, these dimensions' part, for dg
//     H <- exp(G_end - ref) (exp(ref) H + S^T X)                 dH <- exp(ref) (E + sum over the query heads of Y^T X)
//     X: k, v                                                    X: q, d_o
//
// S and the two factors come from hopper_gates.cu, Y from hopper_queries.cu: of a chunk of several windows relative to nothing, so that here it is made relative to
// the chunk's beginning (that of hopper_wide_queries.cu is). Tiles come three steps (a chunk and query head) ahead, or six, where there is one block on a multiprocessor, brought by
// a warp of its own; the products of a group's heads follow each other without a pause, and what goes to memory is made of a copy while they run. Few sequences and
// heads would leave most of the GPU idle: they go in several parts beside each other (ScanParts, hopper.h), each of which begins as many chunks before its own as the gates
// leave anything of; where they forget too little, hopper_few.cu, and where the forward pass walks in segments hopper_starts.cu.
#include <algorithm>

#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 128;  // of the warpgroup; one more warp brings

// How many chunks before the one `at`, or from it on, the gates leave anything of there, in any slot of a bank: all, or as many as it takes until every slot's come to
// less than 2^-kForgotten; one more than `limit` if that is more, or looks like it: after a quarter of them not even an eighth of the way. By a warp.
// images: of the bank, one in `step`.
template <bool reverse, class E>
__device__ int remembered_images(const GateImage<E>* images, int step, int at, int chunks, int limit, int slots) {
  constexpr int kAtOnce = 8;
  const int all = reverse ? chunks - at : at, slot = 2 * lane_id();
  constexpr float nothing = 1.f / (1ull << kForgotten / 2) / (1ull << kForgotten / 2), an_eighth = 1.f / (1 << kForgotten / 8);
  float left[2] = {slot < slots ? 1.f : 0.f, slot < slots ? 1.f : 0.f};
#pragma unroll 1
  for (int i = 0; i < all && i <= limit; i += kAtOnce) {
    float2 in[kAtOnce], out[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int x = min(i + k, all - 1);
      const GateImage<E>& image = images[int64_t(reverse ? at + x : at - 1 - x) * step];
      in[k] = *reinterpret_cast<const float2*>(image.in + slot), out[k] = *reinterpret_cast<const float2*>(image.out + slot);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k < all) left[0] *= in[k].x * out[k].x, left[1] *= in[k].y * out[k].y;
      if (__all_sync(0xffffffffu, left[0] < nothing && left[1] < nothing)) return min(i + k + 1, all);
    }
    if (4 * (i + kAtOnce) >= limit && !__all_sync(0xffffffffu, left[0] < an_eighth && left[1] < an_eighth)) break;
  }
  return min(all, limit + 1);
}

template <class E, int STAGES>
struct ScanShared {
  E Y[STAGES][2][kTile], X[STAGES][kTile], H[STAGES][kTile], out[2][kTile];  // Y: or S
  uint64_t full[STAGES], free[STAGES];
  Sequence sequence;
  int early[kScanPartsAtMost];  // how many chunks before its own a part begins
};
static_assert(sizeof(ScanShared<bf16, 3>) <= 113 * 1024 && sizeof(ScanShared<bf16, 6>) <= 227 * 1024);

template <class E, int D, bool reverse, int STAGES>
__global__ __launch_bounds__(kThreads + 32,
                             STAGES == 3 ? 2 : 1) void scan_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ ScanEnds ends, E* boundary,
                                                                   const __grid_constant__ Backward<E> w, int sides, const __grid_constant__ InputMaps maps,
                                                                   const __grid_constant__ CUtensorMap states, const __grid_constant__ ScanParts parts) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<ScanShared<E, STAGES>*>(memory);
  constexpr int slices = D / 64;
  using Left = std::conditional_t<(D > 128), WideSaved<E>, Saved<E>>;
  const int banks = banks_of(p), heads = p.H * banks;  // of key/value heads and their banks
  const int r = reverse ? p.HQ / p.H : 1, slice = blockIdx.x % slices, side = blockIdx.x / slices % sides, id = blockIdx.x / (sides * slices) % heads;
  const int head = id / banks, bank = id % banks, part = blockIdx.x / (sides * slices) / heads % parts.count;
  const int64_t n = blockIdx.x / (sides * slices) / heads / parts.count;
  const int64_t pool_row = state_row(p, n);
  const bool says = parts.far && part + slice + side == 0 && threadIdx.x == 0;  // the one thread of a head that notes whether it is left to others
  if (pool_row < 0 || w.elsewhere(p, n, head)) {
    if (says) parts.far[n * heads + id] = false;
    return;
  }
  const Sequence tokens = sequence<false>(p, n, kChunk);
  const int chunks = static_cast<int>(tokens.chunks), first_slot = static_cast<int>(tokens.slot);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), row = warp * 16 + frag_row();
  const bool two = !reverse || D > 128 || side || exact_dH(p);  // parts of Y
  if (threadIdx.x == 0) {
    m.sequence = tokens;
    for (int i = 0; i < STAGES; ++i) init(m.full + i, 1), init(m.free + i, kThreads);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (parts.count > 1)
    for (int b = 1 + warp; b < parts.count; b += 5) {
      const int early =
          remembered_images<reverse>(w.gates + int64_t(first_slot) * heads + id, heads, b * parts.chunks, chunks, parts.chunks / 2, p.M - bank * kSlots);
      if (lane_id() == 0) m.early[b] = early;
    }
  __syncthreads();
  // The chunks that are this block's own, and those that it goes through.
  int own_begin = 0, own_end = chunks, begin = 0, end = chunks;
  if (parts.count > 1) {
    bool far = false;
    for (int b = 1; b < parts.count; ++b) far |= m.early[b] > parts.chunks / 2;
    if (says) parts.far[n * heads + id] = far;
    if (far && (parts.far || part)) return;
    if (!far) {
      own_begin = part * parts.chunks, own_end = min(chunks, own_begin + parts.chunks);
      begin = own_begin - (reverse || part == 0 ? 0 : m.early[part]), end = own_end + (!reverse || part + 1 == parts.count ? 0 : m.early[part + 1]);
    }
  }

  const int steps = (end - begin) * r;
  auto index_of = [&](int s) { return reverse ? end - 1 - s / r : begin + s; };
  auto rows_of_state = [&](int64_t slot) { return ((slot * p.H + head) * 2 + side) * D + slice * 64; };
  const TokenMap& x_map = reverse ? side ? maps.d_o : maps.q : side ? maps.v : maps.k;
  if (threadIdx.x >= kThreads) {
    if (threadIdx.x != kThreads) return;
    for (int s = 0; s < steps; ++s) {
      const int stage = s % STAGES, x_head = reverse ? head * r + s % r : head;
      const bool state = reverse && s % r == 0;
      if (s >= STAGES) wait(m.free + stage, (s / STAGES - 1) & 1);
      const Chunk c = chunk_of(p, m.sequence, index_of(s), kChunk);
      uint64_t* const full = m.full + stage;
      arrive_expecting(full, (2 + state + two) * kTile * 2);
      bring_tokens<64, true>(m.X[stage], x_map, p, c, x_head, full, slice * 64);
      bulk_load(m.Y[stage],
                reverse ? reinterpret_cast<const Left*>(w.saved)[(c.slot * p.HQ + x_head) * banks + bank].Y[side][0] : w.gates[c.slot * heads + id].S[0],
                (1 + two) * kTile * 2, full);
      if (state) bring_state<64>(m.H[s / r % STAGES], states, rows_of_state(c.slot), full, bank);
    }
    return;
  }
  float h[8][4];
  auto each_element = [&](int64_t of, auto&& f) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int slot = bank * kSlots + row + (e >> 1) * 8, d = slice * 64 + t * 8 + frag_col() + (e & 1);
        const int64_t first = (of * p.H + head) * D * p.M;
        if (slot < p.M) f(h[t][e], first + (side ? slot * D + d : d * p.M + slot));
      }
  };
  zero(h);
  if (reverse ? end == chunks : begin == 0)
    with_states(ends.first[side], reverse ? DType::f32 : p.state_dtype,
                [&](const auto* in) { each_element(ends.broadcast ? 0 : pool_row, [&](float& x, int64_t i) { x = to_float(in[i]); }); });

  int stage = 0;
  uint32_t parity = 0;
  // What the chunk at a step is multiplied with; of the next one on its way before it is needed.
  struct Factors {
    float in[2], out[2];
    int cut;
  };
  auto factors_of = [&](int step) {
    const GateImage<E>& image = w.gates[int64_t(first_slot + index_of(step)) * heads + id];
    return Factors{{image.in[row], image.in[row + 8]}, {image.out[row], image.out[row + 8]}, image.cut};
  };
  Factors next{};
  if (steps > 0) next = factors_of(0);
  auto go = [&]<int pieces>() {  // of Y, or S
#pragma unroll 1
    for (int step = 0; step < steps;) {
      const int index = index_of(step);
      const bool own = index >= own_begin && index < own_end;
      const int64_t slot = first_slot + index, at = slot * heads + id;
      const Factors f = next;
      const int first = step;
      if (step + r < steps) next = factors_of(step + r);
      E* const out = m.out[reverse ? 0 : step % 2];
      if (reverse) scale_rows(h, f.out[0], f.out[1]);
      float x[8][4];  // E, or H as it was: products have their hands on h
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[t][e] = copy(h[t][e]);
      if (!reverse || f.cut) scale_rows(h, f.in[0], f.in[1]);
      hand_over(h);
      auto multiply = [&] {
        wait(m.full + stage, parity);
        if (reverse && D <= 128 && f.cut) from_the_beginning(m.Y[stage], pieces == 2, w.factors[at].R, m.sequence.length() - index_of(first) * int64_t(kChunk));
        products_begin();
        product<E, 4, 1, 1>(h, mnmajor(m.Y[stage][0]), mnmajor(m.X[stage]), true);
        if constexpr (pieces == 2) product<E, 4, 1, 1>(h, mnmajor(m.Y[stage][1]), mnmajor(m.X[stage]), true);
        products_commit();
      };
      auto next_stage = [&] {
        if (++stage == STAGES) stage = 0, parity ^= 1;
      };
      multiply();
      if (reverse) {
        if (threadIdx.x == 0) bulk_wait();
        sync(1, kThreads);
        const auto X = split<E>(x);
        store_operand<E>(out, X.hi, warp);
        if (side) store_operand<E>(out + kTile, X.lo, warp);
      } else {
        store_transposed<E>(out, x, warp);
      }
      publish();
      sync(1, kThreads);  // `out` is whole
      if (!reverse) {
        store_state<64>(boundary + rows_of_state(slot) * p.M, out, own ? p.M : 0, threadIdx.x, bank);
      } else {
        if (threadIdx.x == 0 && own) {
          bulk_store<kTile * 2>(w.E0 + (at * 3 + side) * 64 * D + slice * kTile, out);
          if (side) bulk_store<kTile * 2>(w.E0 + (at * 3 + 2) * 64 * D + slice * kTile, out + kTile);
          bulk_commit();
        }
        float sum[2];
        state_products(sum, m.H[step / r % STAGES], x, warp);
        sum[0] *= f.in[0], sum[1] *= f.in[1];
        float* edge = w.edge + (at * 2 + side) * D + slice * 64;  // D / 64 parts of 64 slots
        if ((lane_id() & 3) == 0 && own) edge[row] = sum[0], edge[row + 8] = sum[1];
      }
      int before = stage;  // the stage of the step before this one
      next_stage();
#pragma unroll 1
      while (++step < first + r) {
        multiply();
        products_wait<1>();
        arrive(m.free + before);
        before = stage;
        next_stage();
      }
      products_wait<0>();
      hand_over(h);
      arrive(m.free + before);
      if (!reverse) scale_rows(h, f.out[0], f.out[1]);
      else if (!f.cut) scale_rows(h, f.in[0], f.in[1]);
    }
  };
  if (two) go.template operator()<2>();
  else go.template operator()<1>();
  if (reverse ? own_begin == 0 : own_end == chunks) {
    if (parts.last) {
      if (ends.last[side]) each_element(p.N * side + n, [&](float& x, int64_t i) { parts.last[i] = x; });
    } else {
      with_states(ends.last[side], reverse ? DType::f32 : p.state_dtype,
                  [&](auto* out) { each_element(pool_row, [&](float& x, int64_t i) { store_rounded(out[i], x); }); });
    }
  }
  if (reverse && threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

template <bool reverse>
void scan(const BackwardParams& p, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w, int sides, const ScanParts& parts) {
  const InputMaps maps = reverse ? input_maps(p) : input_maps(static_cast<const Params&>(p));
  const CUtensorMap states = reverse ? boundary_map(p, boundary) : CUtensorMap{};
  auto for_size = [&]<class E, int D>() {
    const int64_t blocks = p.N * p.H * banks_of(p) * sides * (D / 64) * parts.count;
    auto run = [&]<int STAGES>() {
      launch_early(reverse ? "hopper_cotangents" : "hopper_states", scan_kernel<E, D, reverse, STAGES>, blocks, kThreads + 32, sizeof(ScanShared<E, STAGES>),
                   p.stream, p, ends, static_cast<E*>(boundary), Backward<E>(w), sides, maps, states, parts);
    };
    blocks > hopper_multiprocessors() ? run.template operator()<3>() : run.template operator()<6>();
  };
  if (hopper_wide(p)) return select_wide(p, for_size);
  select_hopper(p, for_size);
}

BackwardParams with_inputs(const Params& p) {
  BackwardParams b{};
  static_cast<Params&>(b) = p;
  return b;
}

}  // namespace

int64_t hopper_scan_blocks(const Params& p) { return p.N * p.H * banks_of(p) * 2 * (p.K / 64); }

// Two blocks to a multiprocessor, and parts that it pays to begin early for.
ScanParts hopper_scan_parts(const Params& p) {
  const int64_t chunks = ceil_div(p.T, kChunk), blocks = hopper_scan_blocks(p);
  int64_t count = std::min({int64_t(2) * hopper_multiprocessors() / max(blocks, int64_t(1)), chunks / 32, int64_t(kScanPartsAtMost)});
  if (wanted_kernels() == Kernels::few) count = std::min(chunks / 2, int64_t(3));  // to be seen at work in short sequences, too
  if (p.cu_seqlens || count < 2 || 2 * blocks > hopper_multiprocessors()) return {};
  const int64_t each = ceil_div(chunks, count);
  return {static_cast<int>(ceil_div(chunks, each)), static_cast<int>(each)};
}

void hopper_scan(const BackwardParams& p, bool reverse, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w, int sides, const ScanParts& parts) {
  reverse ? scan<true>(p, ends, boundary, w, sides, parts) : scan<false>(p, ends, boundary, w, sides, parts);
}

void hopper_states(const ForwardParams& p, const void* images, void* boundary, float* products, bool keys_only) {
  const ScanEnds ends{{p.hk0, p.hv0}, {p.hkT, p.hvT}, p.h0_broadcast};
  const BackwardWorkspace w{const_cast<void*>(images), nullptr, nullptr, nullptr, products};
  if (products) hopper_scan_few(with_inputs(p), false, ends, boundary, w);
  else hopper_scan(with_inputs(p), false, ends, boundary, w, keys_only ? 1 : 2, {});
}

void hopper_cotangents(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  const ScanEnds ends{{p.dhkT, p.dhvT}, {p.dhk0, p.dhv0}, false};
  if (w.products) hopper_scan_few(p, true, ends, const_cast<void*>(boundary), w);
  else hopper_scan(p, true, ends, const_cast<void*>(boundary), w, 2, hopper_scan_parts(p));
}

}  // namespace gsa::cuda
