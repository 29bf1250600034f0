#include "checks.h"

#include <atomic>
#include <sstream>
#include <vector>

namespace gsa {
namespace {

std::atomic<bool> checks_on{false};

using Sym = c10::SymInt;

void check_shape(const char* name, const Tensor& x, const char* letters, std::initializer_list<Sym> want) {
  bool fits = x.dim() == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (const Sym& w : want) {
    if (!fits) break;
    fits = x.sym_size(i++) == w;
  }
  if (fits) return;
  std::ostringstream expected;
  i = 0;
  for (const Sym& w : want) expected << (i++ ? ", " : "") << w;
  TORCH_CHECK_VALUE(false, name, ": expected shape ", letters, " = [", expected.str(), "], given ", x.sym_sizes());
}

void check_rank(const char* name, const Tensor& x, int64_t rank, const char* letters) {
  TORCH_CHECK_VALUE(x.dim() == rank, name, ": expected shape ", letters, ", given ", x.sym_sizes());
}

void check_device(const char* name, const Tensor& x, const Tensor& q, const char* lead = "q") {
  TORCH_CHECK(x.device() == q.device(), name, " is on ", x.device(), " and ", lead, " on ", q.device(), ": move them to one device");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto t = q.scalar_type();
  const bool wide = t == at::kDouble;
  TORCH_CHECK_TYPE(t == at::kBFloat16 || t == at::kHalf || t == at::kFloat || wide,
                   "q: expected dtype bfloat16, float16, float32 or (on the CPU) float64, given ", t);
  TORCH_CHECK_TYPE(!(wide && q.is_cuda()), "q: float64 is computed on the CPU only, given float64 on ", q.device(),
                   "; move the inputs to the CPU or cast them to float32");
  TORCH_CHECK_TYPE(k.scalar_type() == t, "k: expected q's dtype ", t, ", given ", k.scalar_type(), "; cast them to one dtype");
  TORCH_CHECK_TYPE(v.scalar_type() == t, "v: expected q's dtype ", t, ", given ", v.scalar_type(), "; cast them to one dtype");
  check_device("k", k, q);
  check_device("v", v, q);
}

void check_gate(const char* name, const Tensor& x, const Tensor& q) {
  TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type() || x.scalar_type() == at::kFloat, name, ": expected q's dtype ", q.scalar_type(), " or float32, given ",
                   x.scalar_type());
  check_device(name, x, q);
}

void check_state(const char* name, const Tensor& x, const Tensor& q, bool allow_bf16 = false) {
  const auto want = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool half_inputs = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(x.scalar_type() == want || (allow_bf16 && half_inputs && x.scalar_type() == at::kBFloat16), name, ": expected dtype ", want,
                   allow_bf16 && half_inputs ? " or bfloat16" : "", " for ", q.scalar_type(), " inputs, given ", x.scalar_type());
  check_device(name, x, q);
}

// A pool of states that is updated in place.
struct PoolNames {
  const char *all, *hk, *hv, *z;
};
void check_pool(const PoolNames& name, const Shape& d, const Tensor& q, const Tensor& hk, const Tensor& hv, const OptTensor& z, bool abc, bool allow_bf16) {
  const Sym P = hk.sym_size(0);
  check_shape(name.hk, hk, "[P, H, K, M]", {P, d.H, d.K, d.M});
  check_shape(name.hv, hv, "[P, H, M, V]", {P, d.H, d.M, d.V});
  check_state(name.hk, hk, q, allow_bf16);
  check_state(name.hv, hv, q, allow_bf16);
  TORCH_CHECK_TYPE(hk.scalar_type() == hv.scalar_type(), name.all, ": Hk is ", hk.scalar_type(), " and Hv ", hv.scalar_type(), ": use one dtype");
  TORCH_CHECK_VALUE(hk.is_contiguous() && hv.is_contiguous(), name.all,
                    ": Hk and Hv are updated in place and must be contiguous; call .contiguous() once when the state is made");
  if (!abc) return;
  TORCH_CHECK_VALUE(z, name.all, ": ABC (g is None) needs (Hk, Hv, z), z is missing; take it from the final state that was handed over");
  check_shape(name.z, *z, "[P, H, M]", {P, d.H, d.M});
  check_state(name.z, *z, q, allow_bf16);
  TORCH_CHECK_TYPE(z->scalar_type() == hk.scalar_type(), name.all, ": Hk is ", hk.scalar_type(), " and z ", z->scalar_type(), ": use one dtype");
  TORCH_CHECK_VALUE(z->is_contiguous(), name.all, ": z is updated in place and must be contiguous");
}

void check_state_indices(const Tensor& i, const Tensor& q, const char* letters, const Sym& N) {
  TORCH_CHECK_TYPE(i.scalar_type() == at::kInt || i.scalar_type() == at::kLong, "state_indices: expected dtype int32 or int64, given ", i.scalar_type());
  check_shape("state_indices", i, letters, {N});
  check_device("state_indices", i, q);
}

void check_heads(const Sym& HQ, const Sym& H) {
  TORCH_CHECK_VALUE(H > 0 && HQ > 0 && HQ % H == 0, "q has ", HQ, " heads and k has ", H, ": query heads must be a multiple of key/value heads");
}

void check_limits(const Tensor& q, const Sym& K, const Sym& V, const Sym& M) {
  TORCH_CHECK_VALUE(K > 0, "k: the head dimension K must be at least 1, given ", K);
  TORCH_CHECK_VALUE(V > 0, "v: the head dimension V must be at least 1, given ", V);
  TORCH_CHECK_VALUE(M > 0, "g or s: the number of slots M must be at least 1, given ", M);
  if (!q.is_cuda()) return;
  TORCH_CHECK_VALUE(K <= 512, "k: the CUDA kernels support K <= 512, given K = ", K);
  TORCH_CHECK_VALUE(V <= 512, "v: the CUDA kernels support V <= 512, given V = ", V);
  TORCH_CHECK_VALUE(M <= 256, "g or s: the CUDA kernels support M <= 256 slots, given M = ", M);
}

// Returns N; checks everything about cu_seqlens but its contents.
Sym check_packing(const OptTensor& cu_seqlens, const Tensor& q, const char* lead) {
  if (!cu_seqlens) return q.sym_size(0);
  const Tensor& c = *cu_seqlens;
  TORCH_CHECK_TYPE(c.scalar_type() == at::kInt || c.scalar_type() == at::kLong, "cu_seqlens: expected dtype int32 or int64, given ", c.scalar_type());
  TORCH_CHECK_VALUE(c.dim() == 1 && c.sym_size(0) >= 1, "cu_seqlens: expected shape [N + 1], given ", c.sym_sizes());
  TORCH_CHECK_VALUE(q.sym_size(0) == 1, "cu_seqlens: packed sequences need a batch of 1, given ", lead, " with B = ", q.sym_size(0),
                    "; flatten the batch into T");
  check_device("cu_seqlens", c, q, lead);
  return c.sym_size(0) - 1;
}

void check_leading(const char* name, const Tensor& x, const Sym& N) {
  TORCH_CHECK_VALUE(x.dim() > 0 && (x.sym_size(0) == N || x.sym_size(0) == 1), name, ": expected ", N,
                    " states (one for each sequence) or 1 for all of them, given shape ", x.sym_sizes());
}

}  // namespace

void set_checks(bool on) { checks_on = on; }
bool checks() { return checks_on; }

Shape check_sequence(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, const OptTensor& hk0, const OptTensor& hv0,
                     const OptTensor& cu_seqlens) {
  check_rank("q", q, 4, "[B, T, HQ, K]");
  check_rank("k", k, 4, "[B, T, H, K]");
  check_rank("v", v, 4, "[B, T, H, V]");
  check_rank("g", g, 4, "[B, T, H, M]");
  Shape d{q.sym_size(0), q.sym_size(1), q.sym_size(2), k.sym_size(2), q.sym_size(3), v.sym_size(3), g.sym_size(3), 0, cu_seqlens.has_value()};
  check_shape("k", k, "[B, T, H, K]", {d.B, d.T, d.H, d.K});
  check_shape("v", v, "[B, T, H, V]", {d.B, d.T, d.H, d.V});
  check_shape("g", g, "[B, T, H, M]", {d.B, d.T, d.H, d.M});
  check_heads(d.HQ, d.H);
  check_inputs(q, k, v);
  check_gate("g", g, q);
  if (s) {
    check_shape("s", *s, "[B, T, H, M]", {d.B, d.T, d.H, d.M});
    check_gate("s", *s, q);
  }
  check_limits(q, d.K, d.V, d.M);
  d.N = check_packing(cu_seqlens, q, "q");
  TORCH_CHECK_VALUE(hk0.has_value() == hv0.has_value(), "initial_state: expected both Hk and Hv, given one");
  if (hk0) {
    check_leading("initial_state Hk", *hk0, d.N);
    check_leading("initial_state Hv", *hv0, d.N);
    check_shape("initial_state Hk", *hk0, "[N, H, K, M]", {hk0->sym_size(0), d.H, d.K, d.M});
    check_shape("initial_state Hv", *hv0, "[N, H, M, V]", {hk0->sym_size(0), d.H, d.M, d.V});
    check_state("initial_state Hk", *hk0, q);
    check_state("initial_state Hv", *hv0, q);
  }
  return d;
}

Shape check_abc(const Tensor& e, const OptTensor& z0, const OptTensor& cu_seqlens) {
  check_rank("s", e, 4, "[B, T, H, M]");
  const auto t = e.scalar_type();
  TORCH_CHECK_TYPE(t == at::kBFloat16 || t == at::kHalf || t == at::kFloat || t == at::kDouble, "s: expected a floating dtype, given ", t);
  TORCH_CHECK_TYPE(!(t == at::kDouble && e.is_cuda()), "s: float64 is computed on the CPU only, given float64 on ", e.device());
  Shape d;
  d.B = e.sym_size(0), d.T = e.sym_size(1), d.H = e.sym_size(2), d.M = e.sym_size(3);
  d.packed = cu_seqlens.has_value();
  TORCH_CHECK_VALUE(d.H > 0 && d.M > 0, "s: heads and slots must be at least 1, given shape ", e.sym_sizes());
  d.N = check_packing(cu_seqlens, e, "s");
  if (z0) {
    check_leading("initial_state z", *z0, d.N);
    check_shape("initial_state z", *z0, "[N, H, M]", {z0->sym_size(0), d.H, d.M});
    check_state("initial_state z", *z0, e);
  }
  return d;
}

Shape check_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, const Tensor& hk, const Tensor& hv,
                 const OptTensor& z, const OptTensor& state_indices, const OptTensor& mask, double gate_normalizer, const OptTensor& cos,
                 const OptTensor& sin) {
  TORCH_CHECK_VALUE(s || g, "s and g are both None: give g (coupled write s = 1 - exp(g)), s (ABC: raw slot logits), or both");
  const Tensor& gate = g ? *g : *s;
  check_rank("q", q, 3, "[B, HQ, K]");
  check_rank("k", k, 3, "[B, H, K]");
  check_rank("v", v, 3, "[B, H, V]");
  check_rank(g ? "g" : "s", gate, 3, "[B, H, M]");
  Shape d;
  d.B = q.sym_size(0), d.HQ = q.sym_size(1), d.H = k.sym_size(1), d.K = q.sym_size(2), d.V = v.sym_size(2), d.M = gate.sym_size(2);
  check_shape("k", k, "[B, H, K]", {d.B, d.H, d.K});
  check_shape("v", v, "[B, H, V]", {d.B, d.H, d.V});
  check_heads(d.HQ, d.H);
  check_inputs(q, k, v);
  if (g) check_shape("g", *g, "[B, H, M]", {d.B, d.H, d.M}), check_gate("g", *g, q);
  if (s) check_shape("s", *s, "[B, H, M]", {d.B, d.H, d.M}), check_gate("s", *s, q);
  check_limits(q, d.K, d.V, d.M);
  check_rank("state Hk", hk, 4, "[P, H, K, M]");
  d.N = hk.sym_size(0);
  check_pool({"state", "state Hk", "state Hv", "state z"}, d, q, hk, hv, z, !g, true);
  if (state_indices) check_state_indices(*state_indices, q, "[B]", d.B);
  else TORCH_CHECK_VALUE(d.N == d.B, "state: expected P = B = ", d.B, " rows, given ", d.N, "; pass state_indices to use a pool");
  if (mask) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask: expected dtype bool, given ", mask->scalar_type());
    check_shape("mask", *mask, "[B]", {d.B});
    check_device("mask", *mask, q);
  }
  TORCH_CHECK_VALUE(gate_normalizer == 0 || (gate_normalizer > 0 && g), "gate_normalizer: expected a positive number and g, its logits, or 0, given ",
                    gate_normalizer, g ? "" : " and no g");
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither");
  for (const auto& [name, x] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    if (!*x) continue;
    const Tensor& t = **x;
    check_rank(name, t, 2, "[B or 1, rotary]");
    TORCH_CHECK_VALUE((t.sym_size(0) == d.B || t.sym_size(0) == 1) && t.sym_size(1) % 2 == 0 && t.sym_size(1) <= d.K, name,
                      ": expected shape [B or 1, rotary] with an even number of at most K = ", d.K, " components, given ", t.sym_sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == q.scalar_type(), name, ": expected q's dtype ", q.scalar_type(), ", given ", t.scalar_type());
    check_device(name, t, q);
  }
  if (cos) check_shape("sin", *sin, "[B or 1, rotary]", {cos->sym_size(0), cos->sym_size(1)});
  return d;
}

Shape check_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, const Tensor& hk, const Tensor& hv,
                    const OptTensor& z, const Tensor& state_indices, const OptTensor& cu_seqlens) {
  TORCH_CHECK_VALUE(s || g, "s and g are both None: give g (coupled write s = 1 - exp(g)), s (ABC: raw slot logits), or both");
  const Shape d = check_sequence(q, k, v, g ? s : std::nullopt, g ? *g : *s, std::nullopt, std::nullopt, cu_seqlens);
  check_rank("initial_state Hk", hk, 4, "[P, H, K, M]");
  check_pool({"initial_state", "initial_state Hk", "initial_state Hv", "initial_state z"}, d, q, hk, hv, z, !g, true);
  check_state_indices(state_indices, q, "[N]", d.N);
  return d;
}

void check_lengths(const OptTensor& cu_seqlens, int64_t T) {
  if (!cu_seqlens || !(cu_seqlens->is_cpu() || checks())) return;
  const Tensor c = cu_seqlens->to(at::kCPU, at::kLong).contiguous();
  const int64_t* p = c.const_data_ptr<int64_t>();
  bool good = p[0] == 0 && p[c.numel() - 1] == T;
  for (int64_t i = 1; i < c.numel(); ++i) good = good && p[i] >= p[i - 1];
  TORCH_CHECK_VALUE(good, "cu_seqlens: expected 0 = c[0] <= c[1] <= ... <= c[N] = T = ", T, ", given ", at::IntArrayRef(p, c.numel()));
}

void check_indices(const OptTensor& state_indices, int64_t P) {
  if (!state_indices || !(state_indices->is_cpu() || checks())) return;
  const Tensor c = state_indices->to(at::kCPU, at::kLong).contiguous();
  const int64_t* p = c.const_data_ptr<int64_t>();
  std::vector<bool> seen(P, false);
  for (int64_t i = 0; i < c.numel(); ++i) {
    if (p[i] == -1) continue;
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < P, "state_indices: expected -1 or rows 0 .. ", P - 1, " of the pool, given ", p[i], " at position ", i);
    TORCH_CHECK_VALUE(!seen[p[i]], "state_indices: row ", p[i], " is given twice; a state belongs to one sequence");
    seen[p[i]] = true;
  }
}

}  // namespace gsa
