// Chunked forward, portable (sm_80 and up): states at the chunk boundaries (core/scan.cuh), then every chunk by itself:
//
//     A1 = tril(scale q k^T)                                              [C x C]
//     o1 = exp(G) (scale q Hk) + sum_j A1_ij s_j exp(G_i - G_j)           [C x M]      core/chunk.cuh, Triangle::apply
//     p  = softmax(o1)                                                    [C x M]
//     A2 = tril(sum_m p_im s_jm exp(G_im - G_jm))                         [C x C]      Triangle::contract
//     o  = A2 v + (p exp(G)) Hv                                           [C x V]
//
// A block has one chunk of one query head, a warp 16 of its rows; A1, o1, p, A2 never leave registers. Diagonals (j = i) are added in fp32.
// Shared memory: core/tile_io.cuh, RowsShared.
#include "core/scan.cuh"
#include "core/select.cuh"
#include "core/tile_io.cuh"
#include "hopper.h"
#include "states.h"

namespace gsa::cuda {
namespace {

template <class Cfg>
__global__ __launch_bounds__(Cfg::threads, Cfg::blocks_per_sm) void chunk_output(const __grid_constant__ ForwardParams p, const void* boundary,
                                                                                 const float* gate_tiles) {
  using E = typename Cfg::E;
  using A = typename Cfg::A;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, CT = Cfg::CT, DS = Cfg::DS, DT = Cfg::DT, NB = Cfg::NB, ldm = Cfg::ldm, ldd = Cfg::ldd;
  const int64_t q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.HQ, C, c)) return zero_padding(p, c.seq.n, q_head, (blockIdx.x / p.HQ - c.seq.slot) * C, C);
  const int warp = threadIdx.x / 32;

  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  Gates<Cfg> gates(mem, p, c, head, gate_tiles);
  float* S = RowsShared<Cfg>::needs_S ? mem.take<float>(C * Cfg::lds) : nullptr;
  const E* states = static_cast<const E*>(boundary) + (c.slot * p.H + head) * (p.K + p.V) * p.M;
  auto pass_of = [&](int pass) -> Pass {                   // (q, k, Hk), then (v, Hv)
    return {pass ? Rows{} : rows_of(p.q, c, q_head),
            rows_of(pass ? p.v : p.k, c, head),
            rows_of(states + (pass ? int64_t(p.K) * p.M : 0), p.M, tile_dtype<Cfg>()),
            pass ? p.V : p.K,
            c.length,
            p.M};
  };
  Ring<Cfg> ring{mem.p};
  ring.open(pass_of(0));
  gates.template load<Cfg::threads>();
  gates.template load_R<Cfg::threads>();
  if (S) gates.template load_S<Cfg::threads>(S, Cfg::lds);
  ring.send(2, pass_of);

  float o1[MT][4], x[CT][4];
  zero(o1);
  zero(x);
#pragma unroll 1
  for (int d = 0; d < p.K; d += DS) {
    const auto s = ring.next(2, pass_of);
    typename A::template TileOp<DS> q;
    A::template from_tile<DS>(q, s.x + warp * 16 * ldd, ldd);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J <= warp) A::template mma_nt<2, DS>(x + 2 * J, q, s.y + J * 16 * ldd, ldd);
    A::template mma_nn<MT, DS>(o1, q, s.h, ldm);
  }
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) o1[t][e] *= scale;
#pragma unroll
  for (int t = 0; t < CT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] *= scale;

  __syncthreads();                                         // scratch is free
  const Triangle<Cfg> triangle{gates, S, ring.x_scratch(warp), ring.y_scratch(warp), warp};
  float d[2];
  triangle.split_diagonal(x, d);
  triangle.apply(o1, x);
  add_diagonal_writes<Cfg>(gates, S, o1, d, warp);
  softmax_rows<Cfg>(o1, p.M);
  diagonal_of<Cfg>(gates, S, o1, warp, d);
  triangle.contract(x, o1);                                // o1 is now p exp(G)
  triangle.add_diagonal(x, d);

  typename A::template Split<C> a2;
  typename A::template Op<MP> pg;
  A::template from_acc_split<C>(a2, x, ring.x_scratch(warp), Cfg::ldx);
  A::template from_acc<MP>(pg, o1, ring.y_scratch(warp), Triangle<Cfg>::ldy);
#pragma unroll 1
  for (int v = 0; v < p.V; v += DS) {
    const auto s = ring.next(2, pass_of);
    float o[DT][4];
    zero(o);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J <= warp) A::template mma_nn<DT, 16>(o, a2.block(J), s.y + J * 16 * ldd, ldd);
    A::template mma_nt<DT, MP>(o, pg, s.h, ldm);
    store_rows<E, DT>(rows_of(p.o, c, q_head), o, warp * 16, c.length, v, p.V);
  }
}

// Workspace of forward_states: the right factors of the sweep, the chunk decays, the gate tiles, and (where they are not kept) the states themselves.
struct StatePlan {
  int64_t decay, tiles, states, bytes;   // offsets; the factors are at 0
};
StatePlan state_plan(const Params& p) {
  StatePlan s{};
  select_config(p, [&]<class Cfg>() {
    const int64_t n = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C) * p.H;
    s.decay = arena(n * Cfg::C * Cfg::MP, sizeof(typename Cfg::E));
    s.tiles = s.decay + arena(n * Cfg::MP, 4);
    s.states = s.tiles + arena(n * GateTile<Cfg>::floats, 4);
    s.bytes = s.states + (p.boundary ? 0 : arena(n * (p.K + p.V) * p.M, sizeof(typename Cfg::E)));
  });
  return s;
}

}  // namespace

int64_t states_workspace(const Params& p) { return state_plan(p).bytes; }

States forward_states(const Params& p, void* hkT, void* hvT, bool recompute) {
  char* base = static_cast<char*>(p.workspace);
  const StatePlan at = state_plan(p);
  States s{p.boundary ? p.boundary : base + at.states, reinterpret_cast<const float*>(base + at.decay), reinterpret_cast<const float*>(base + at.tiles)};
  select_config(p, [&]<class Cfg>() {
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
    GatesParams w{p, base, reinterpret_cast<float*>(base + at.decay), reinterpret_cast<float*>(base + at.tiles)};
    launch("chunk_gates", chunk_gates<Cfg>, slots * p.H, gates_threads<Cfg>, 0, p.stream, w);
    if (!recompute) return;
    ScanParams a{};
    a.base = p;
    a.out = s.boundary;
    a.hk_in = p.hk0, a.hv_in = p.hv0, a.in_broadcast = p.h0_broadcast;
    a.hk_out = hkT, a.hv_out = hvT;
    a.x_k = p.k, a.x_v = p.v;
    a.y_k = a.y_v = base;
    a.decay = s.decay;
    const int64_t slices = ceil_div(p.K, kStateRows) + ceil_div(p.V, kStateRows);
    launch("state_scan", state_scan<Cfg, false>, p.N * p.H * slices, 128, ScanShared<Cfg>::bytes, p.stream, a);
  });
  return s;
}

namespace {

// The workspace for Hopper. A group of query heads shares its gates, parts need them for every chunk; where neither is the case (`fuses`) the walk makes its own, unless
// they are kept for backward. Where backward goes in parts the states are made as it would make them again, and may find them kept. In walks every query head of a group,
// or segment, starts from a pool's row by itself, and not the block that starts with it may be the one that leaves it: they are counted.
struct HopperPlan {
  bool walks, fuses, images, few, counts;
  int64_t cut, started, starts, states, products, bytes;   // offsets; the images are at 0
  explicit HopperPlan(const Params& p)
      : walks(hopper_walks(p)),
        fuses(hopper_fuses(p)),
        images(!fuses || p.gates),
        few(!fuses && (!walks || p.boundary) && hopper_few(p)),
        counts(p.state_indices && walks && (p.HQ > p.H || hopper_segments(p).count > 1)) {
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, chunk_length(p.q.dtype, p.math, p.M));
    cut = images && !p.gates ? arena(hopper_gates_bytes(p), 1) : 0;
    started = cut + (walks && images ? arena(p.N * p.H * hopper_segments(p).count, 4) : 0);
    starts = started + (counts ? arena(started_bytes(p), 1) : 0);
    states = starts + arena(hopper_starts_floats(p), 4);
    products = states + (walks || p.boundary ? 0 : arena(slots * p.H * (p.K + p.V) * p.M, 2));
    bytes = products + (few ? arena(hopper_products_bytes(p), 1) : hopper_wide(p) ? arena(hopper_wide_scores_bytes(p), 1) : 0);
  }
  static int64_t started_bytes(const Params& p) { return p.N * p.H * 2 * static_cast<int64_t>(sizeof(int)); }
};

void forward_for_hopper(const ForwardParams& p) {
  const HopperPlan at(p);
  char* const room = static_cast<char*>(p.workspace);
  void* const images = p.gates ? p.gates : room;
  int* const cut = reinterpret_cast<int*>(room + at.cut);
  float* const starts = hopper_segments(p).count > 1 ? reinterpret_cast<float*>(room + at.starts) : nullptr;
  int* const started = at.counts ? reinterpret_cast<int*>(room + at.started) : nullptr;
  if (started) check(cudaMemsetAsync(started, 0, HopperPlan::started_bytes(p), static_cast<cudaStream_t>(p.stream)), "cudaMemsetAsync");
  if (starts) hopper_starts(p, starts);
  if (at.images) hopper_gates(p, images, at.fuses);
  if (at.fuses)
    return at.images ? hopper_forward(p, p.boundary, images, cut, starts, started, true) : hopper_forward(p, p.boundary, nullptr, nullptr, starts, started);
  float* const products = at.few ? reinterpret_cast<float*>(room + at.products) : nullptr;
  if (!at.walks) {
    void* const states = p.boundary ? p.boundary : room + at.states;
    hopper_states(p, images, states, products, hopper_wide(p));
    return hopper_wide(p) ? hopper_wide_output(p, states, images, room + at.products) : hopper_output(p, states, images);
  }
  if (p.boundary) {
    ForwardParams states_only{};
    static_cast<Params&>(states_only) = p;
    hopper_states(states_only, images, p.boundary, products);
  }
  hopper_forward(p, nullptr, images, cut, starts, started);
}

}  // namespace

// Boundary states that are kept have the distance that they have in exact arithmetic (chunk_length), whatever may be allowed: shapes do not depend on it. Chunks are
// longer in TF32, where they are made for those who want to have them, and not read.
Params exactly(Params p) {
  p.math = Math::native;
  return p;
}
Params without_boundary(Params p) {
  p.boundary = nullptr;
  return p;
}

bool keeps_gates(const Params& p) { return hopper_takes(p) && kept_gates(p.q.dtype, p.K, p.V, p.M); }

int64_t forward_workspace(const Params& p) {
  if (p.math == Math::tf32 && p.boundary) return std::max(states_workspace(without_boundary(p)), states_workspace(exactly(p)));
  return hopper_takes(p) ? HopperPlan(p).bytes : states_workspace(p);
}

void chunk_forward(const ForwardParams& p) {
  require_device();
  if (hopper_takes(p)) return forward_for_hopper(p);
  if (p.math == Math::tf32 && p.boundary) {
    forward_states(exactly(p), nullptr, nullptr, true);
    ForwardParams x = p;
    x.boundary = nullptr;
    return chunk_forward(x);
  }
  const States s = forward_states(p, p.hkT, p.hvT, true);
  select_config(p, [&]<class Cfg>() {
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
    launch("chunk_output", chunk_output<Cfg>, slots * p.HQ, Cfg::threads, RowsShared<Cfg>::bytes, p.stream, p, static_cast<const void*>(s.boundary),
           s.gate_tiles);
  });
}

}  // namespace gsa::cuda
