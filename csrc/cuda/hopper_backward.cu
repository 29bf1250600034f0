// Chunked backward for Hopper, host side: the walk or the parts in order (hopper.h), and what lies in the workspace.
#include "core/hopper.cuh"
#include "hopper_wide.h"

namespace gsa::cuda {
namespace {

// A walk that leaves nothing to the parts.
bool walks_alone(const Params& p) { return hopper_fuses(p) && hopper_segments(p).count == 1; }

// The parts do half of the sequences at a time, where that is enough for the GPU: half of the memory.
int slices(const Params& p) {
  const int64_t enough = hopper_wide_walks(p) ? 64 : 32;
  return !walks_alone(p) && !p.cu_seqlens && p.N % 2 == 0 && p.N / 2 * p.H >= enough ? 2 : 1;
}

int64_t slots_of(const Params& p) { return boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, hopper::kChunk); }

// slice: what the parts do at a time. A walk does all of them.
struct Plan {
  int64_t boundary = 0, gates = 0, cut = 0, starts = 0, saved = 0, E0 = 0, edge = 0, products = 0, bytes = 0;
  Plan(const Params& whole, const Params& slice, bool few) {
    auto take = [&](int64_t n) {
      const int64_t at = bytes;
      bytes += (n + 255) / 256 * 256;
      return at;
    };
    const bool walks = hopper_fuses(whole);
    const Params& p = walks ? whole : slice;
    if (!p.boundary) boundary = take(slots_of(p) * p.H * (p.K + p.V) * p.M * 2);
    if (!p.gates || !walks_alone(whole)) gates = take(hopper_gates_bytes(p));  // kept: factors; after segments, what is cut in the parts' order
    if (walks) cut = take((p.N * p.H + 1) * 4), starts = take(hopper_starts_floats(p) * 4);
    if (walks_alone(whole)) return;
    const int64_t slots = slots_of(slice), banks = hopper::banks_of(p), chunks = slots * p.H * banks;
    saved = take(slots * p.HQ * banks * static_cast<int64_t>(hopper_wide(p) ? sizeof(hopper::WideSaved<half>) : sizeof(hopper::Saved<half>)));
    if (hopper_wide_walks(slice)) {
      E0 = take(hopper_wide_walk_bytes(slice));
      return;
    }
    E0 = take(chunks * 3 * 64 * p.K * 2);
    edge = take(chunks * 2 * p.K * 4);
    if (few && !walks) products = take(hopper_products_bytes(p));
  }
};

// Sequences n, n + 1, .. (`count` of them).
BackwardParams sequences(const BackwardParams& p, int64_t n, int64_t count) {
  BackwardParams x = p;
  x.B = x.N = count;
  for (View* v : {&x.q, &x.k, &x.v, &x.s, &x.g, &x.d_o, &x.dq, &x.dk, &x.dv, &x.ds, &x.dg})
    if (v->ptr) v->ptr = static_cast<char*>(v->ptr) + n * v->batch * (v->dtype == DType::f32 ? 4 : 2);
  auto state = [&](auto& s, bool broadcast = false) {
    if (s && !broadcast) s = const_cast<char*>(static_cast<const char*>(s)) + n * p.H * p.K * p.M * 4;
  };
  state(x.hk0, p.h0_broadcast), state(x.hv0, p.h0_broadcast), state(x.dhkT), state(x.dhvT), state(x.dhk0), state(x.dhv0);
  const int64_t slot = boundary_slot(false, 0, p.T, n, hopper::kChunk);
  if (x.boundary) x.boundary = static_cast<char*>(x.boundary) + slot * p.H * (p.K + p.V) * p.M * 2;
  if (x.gates) x.gates = static_cast<char*>(x.gates) + slot * p.H * kept_gates(p.q.dtype, p.K, p.V, p.M);
  return x;
}

// After the gates and the states.
void parts(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  if (hopper_wide(p)) {
    hopper_wide_queries(p, boundary, w);
    if (hopper_wide_walks(p)) return hopper_wide_walk(p, boundary, w);
    hopper_cotangents(p, boundary, w);
    return hopper_wide_keys(p, boundary, w);
  }
  hopper_queries(p, boundary, w);
  hopper_cotangents(p, boundary, w);
  hopper_keys(p, w);
}

ForwardParams states_only(const Params& p) {
  ForwardParams x{};
  static_cast<Params&>(x) = p;
  return x;
}

Plan plan_of(const Params& whole) {
  Params slice = whole;
  slice.B /= slices(whole), slice.N /= slices(whole);
  return {whole, slice, hopper_few(whole)};
}

}  // namespace

int64_t hopper_backward_workspace(const Params& p) { return plan_of(p).bytes; }

void hopper_backward(const BackwardParams& whole) {
  const int count = slices(whole);
  const int64_t each = whole.N / count;
  const Plan plan = plan_of(whole);
  char* const base = static_cast<char*>(whole.workspace);
  BackwardWorkspace w{base + plan.gates, base + plan.saved, base + plan.E0, reinterpret_cast<float*>(base + plan.edge), nullptr};
  if (hopper_fuses(whole)) {
    BackwardParams p = whole;
    int* const cut = reinterpret_cast<int*>(base + plan.cut);
    float* const starts = reinterpret_cast<float*>(base + plan.starts);  // then the ends
    const bool segments = hopper_segments(p).count > 1;
    const void* const gates = p.gates ? p.gates : w.gates;
    if (p.boundary) {
      if (!p.gates) hopper_gates(p, w.gates, true);
    } else {
      p.boundary = base + plan.boundary;
      if (segments) hopper_starts(p, starts);
      hopper_forward_states(states_only(whole), p.boundary, w.gates, starts);
    }
    if (segments) hopper_ends(p, p.boundary, gates, starts, cut);
    hopper_walk(p, p.boundary, gates, cut, starts);
    if (!segments) return hopper_fused(p, p.boundary, cut);
    w.some = cut + p.N * p.H;
    for (int i = 0; i < count; ++i) {  // what is cut
      const BackwardParams slice = count == 1 ? p : sequences(p, each * i, each);
      w.only = cut + each * i * p.H;
      hopper_gates(slice, w.gates, false, w.only, w.some);
      parts(slice, slice.boundary, w);
      w.gates = static_cast<char*>(w.gates) + hopper_gates_bytes(slice);
    }
    return;
  }
  if (hopper_few(whole)) w.products = reinterpret_cast<float*>(base + plan.products);
  for (int i = 0; i < count; ++i) {
    const BackwardParams p = count == 1 ? whole : sequences(whole, each * i, each);
    void* const boundary = p.boundary ? p.boundary : base + plan.boundary;
    if (p.gates) w.factors = base + plan.gates, w.gates = p.gates;
    else hopper_gates(p, w.gates);
    if (!p.boundary) hopper_states(states_only(p), w.gates, boundary, w.products);
    parts(p, boundary, w);
  }
}

}  // namespace gsa::cuda
