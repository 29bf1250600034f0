// Chunked backward for Hopper, host side: the walk or the parts in order (hopper.h), and what lies in the workspace.
#include "core/hopper.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

// Half of the sequences at a time, where that is enough for the GPU: half of the memory.
int slices(const Params& p) { return !hopper_fuses(p) && !p.cu_seqlens && p.N % 2 == 0 && p.N * p.H >= 64 ? 2 : 1; }

struct Plan {
  int64_t boundary = 0, gates = 0, cut = 0, saved = 0, E0 = 0, edge = 0, products = 0, bytes = 0;
  Plan(const Params& p, bool few) {
    auto take = [&](int64_t n) {
      const int64_t at = bytes;
      bytes += (n + 255) / 256 * 256;
      return at;
    };
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, hopper::kChunk), chunks = slots * p.H, banks = hopper::banks_of(p);
    if (!p.boundary) boundary = take(chunks * (p.K + p.V) * p.M * 2);
    gates = take(hopper_gates_bytes(p));
    cut = take(p.N * p.H * 4);
    if (hopper_fuses(p)) return;
    saved = take(slots * p.HQ * banks * static_cast<int64_t>(hopper_wide(p) ? sizeof(hopper::WideSaved<half>) : sizeof(hopper::Saved<half>)));
    E0 = take(chunks * banks * 3 * 64 * p.K * 2);
    edge = take(chunks * banks * 2 * p.K * 4);
    if (few) products = take(hopper_products_bytes(p));
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
  if (x.boundary) x.boundary = static_cast<char*>(x.boundary) + boundary_slot(false, 0, p.T, n, hopper::kChunk) * p.H * (p.K + p.V) * p.M * 2;
  return x;
}

}  // namespace

int64_t hopper_backward_workspace(const Params& p) {
  Params part = p;
  part.B /= slices(p), part.N /= slices(p);
  return Plan(part, hopper_few(p)).bytes;
}

void hopper_backward(const BackwardParams& whole) {
  const int count = slices(whole);
  const bool few = hopper_few(whole);
  for (int i = 0; i < count; ++i) {
    const BackwardParams p = count == 1 ? whole : sequences(whole, whole.N / count * i, whole.N / count);
    const Plan plan(p, few);
    char* base = static_cast<char*>(p.workspace);
    void* boundary = p.boundary ? p.boundary : base + plan.boundary;
    ForwardParams states_only{};
    static_cast<Params&>(states_only) = p;
    if (hopper_fuses(p)) {
      void* const gates = base + plan.gates;
      int* const cut = reinterpret_cast<int*>(base + plan.cut);
      p.boundary ? hopper_gates(p, gates, true) : hopper_forward_states(states_only, boundary, gates);
      hopper_walk(p, boundary, gates, cut);
      hopper_fused(p, boundary, cut);
      continue;
    }
    float* const products = few ? reinterpret_cast<float*>(base + plan.products) : nullptr;
    const BackwardWorkspace w{base + plan.gates, base + plan.saved, base + plan.E0, reinterpret_cast<float*>(base + plan.edge), products};
    hopper_gates(p, w.gates);
    if (!p.boundary) hopper_states(states_only, w.gates, boundary, products);
    if (hopper_wide(p)) {
      hopper_wide_queries(p, boundary, w);
      hopper_cotangents(p, boundary, w);
      hopper_wide_keys(p, boundary, w);
      continue;
    }
    hopper_queries(p, boundary, w);
    hopper_cotangents(p, boundary, w);
    hopper_keys(p, w);
  }
}

}  // namespace gsa::cuda
