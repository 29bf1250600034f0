// torch.ops.gsa: schemas, and for each op its CPU / CUDA kernel (checks, allocation, parameter structs, dispatch), its fake kernel and its
// autocast rule. Autograd is in autograd.cpp. The kernels behind it (cpu/, cuda/) never see torch.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "params.h"

namespace gsa {

bool tf32_allowed(const Tensor& q);  // autograd.cpp asks, too

bool tf32_allowed(const Tensor& q) {
  if (!q.is_cuda() || q.scalar_type() != at::kFloat) return false;
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

namespace {

using Sym = c10::SymInt;
using OptDouble = std::optional<double>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

DType dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: return DType::none;
  }
}

at::ScalarType state_dtype(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// ------------------------------------------------------------------------------------------------------------ building parameters

// Kernels read any strides but need the last dimension contiguous; only where it is not is the tensor copied.
Tensor readable(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// The same, at addresses that 16-byte loads reach, each element at one of its own. Cotangents come from anywhere.
Tensor readable_in_pieces(const Tensor& x) {
  const Tensor y = readable(x);
  int64_t all = reinterpret_cast<int64_t>(y.data_ptr());
  bool expanded = false;
  for (int64_t i = 0; i + 1 < y.dim(); ++i) all |= y.stride(i) * y.element_size(), expanded |= y.stride(i) == 0 && y.size(i) > 1;
  return all % 16 == 0 && !expanded ? y : y.clone(at::MemoryFormat::Contiguous);
}

Tensor in_dtype(const Tensor& x, at::ScalarType t) { return x.scalar_type() == t ? x : x.to(t); }

// s and g may be fp32 beside any q; beside fp64 they are widened.
Tensor gate_input(const Tensor& x, const Tensor& q) { return readable(q.scalar_type() == at::kDouble ? in_dtype(x, at::kDouble) : x); }

View view(const Tensor& x) {
  View r;
  r.ptr = x.data_ptr();
  r.dtype = dtype_of(x.scalar_type());
  if (x.dim() == 4) r.batch = x.stride(0), r.token = x.stride(1), r.head = x.stride(2);
  else r.batch = x.stride(0), r.head = x.stride(1);
  return r;
}

void* stream_of(const Tensor& x) {
  if (!x.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
}

Math math_of(const Tensor& q, bool exact) {
  if (exact) return Math::exact;
  return tf32_allowed(q) ? Math::tf32 : Math::native;
}

// The inputs as kernels read them: kept alive here while the parameters point into them.
struct Inputs {
  Tensor q, k, v, s, g, hk0, hv0, cu;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& s_, const Tensor& g_, const OptTensor& hk0_, const OptTensor& hv0_,
         const OptTensor& cu_)
      : q(readable(q_)), k(readable(k_)), v(readable(v_)), g(gate_input(g_, q_)) {
    if (s_) s = gate_input(*s_, q_);
    if (hk0_) hk0 = hk0_->contiguous(), hv0 = hv0_->contiguous();
    if (cu_) cu = cu_->contiguous();
  }

  void fill(Params& p, const OptDouble& scale, bool reverse, Math math) const {
    p.B = q.size(0), p.T = q.size(1), p.N = cu.defined() ? cu.size(0) - 1 : q.size(0);
    p.HQ = q.size(2), p.H = k.size(2), p.K = q.size(3), p.V = v.size(3), p.M = g.size(3);
    p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.K)));
    p.reverse = reverse;
    p.math = math;
    if (cu.defined()) p.cu_seqlens = cu.data_ptr(), p.cu_seqlens_64 = cu.scalar_type() == at::kLong;
    p.q = view(q), p.k = view(k), p.v = view(v), p.g = view(g);
    if (s.defined()) p.s = view(s);
    if (hk0.defined()) p.hk0 = hk0.data_ptr(), p.hv0 = hv0.data_ptr(), p.h0_broadcast = hk0.size(0) == 1;
    p.stream = stream_of(q);
  }
};

Tensor workspace(Params& p, int64_t bytes, const Tensor& like) {
  Tensor w = at::empty({bytes}, like.options().dtype(at::kByte));
  p.workspace = w.data_ptr();
  return w;
}

void fill_abc(AbcParams& p, const Tensor& e, const Tensor& cu, bool reverse) {
  p.B = e.size(0), p.T = e.size(1), p.N = cu.defined() ? cu.size(0) - 1 : e.size(0);
  p.H = e.size(2), p.M = e.size(3);
  p.reverse = reverse;
  if (cu.defined()) p.cu_seqlens = cu.data_ptr(), p.cu_seqlens_64 = cu.scalar_type() == at::kLong;
  p.e = view(e);
  p.stream = stream_of(e);
}

// One name per kernel, whichever device. A build without CUDA answers CUDA tensors with a sentence.
#ifdef GSA_WITH_CUDA
#define GSA_CALL(like, call) ((like).is_cuda() ? cuda::call : cpu::call)
#else
[[noreturn]] void no_cuda() {
  TORCH_CHECK(false,
              "CUDA tensors given, but this build of gsa_ext has CPU kernels only (no CUDA toolkit was found when it was built); "
              "install a CUDA toolkit of torch's major version and reinstall gsa_ext with GSA_BUILD_CUDA=1, or move the tensors to the CPU");
}
#define GSA_CALL(like, call) ((like).is_cuda() ? (no_cuda(), cpu::call) : cpu::call)
#endif

Tensor initial_states(const Tensor& h0, const std::vector<int64_t>& shape, const Tensor& q) {
  return h0.defined() ? h0.expand(shape).clone(at::MemoryFormat::Contiguous) : at::zeros(shape, q.options().dtype(state_dtype(q)));
}

// ------------------------------------------------------------------------------------------------------------ chunk, recurrent

// Room for the states at the chunk boundaries. Zeros where the kernels write nothing, for slots that belong to no chunk are part of the output, too: the last ones of each
// of `sequences` of `chunks` chunks; where these are packed (0), and on the CPU, which keeps no states, everywhere.
// gates: so many slots' room more, behind them, for Params::gates, all of which the kernels write, up to the last slot's end, or none.
Tensor kept_states(at::IntArrayRef shape, int64_t gates, bool written, int64_t sequences, int64_t chunks, const Tensor& q) {
  std::vector<int64_t> all = shape.vec();
  all[0] += gates;
  if (!q.is_cuda() || sequences == 0 || (gates && !written)) return at::zeros(all, q.options());
  const Tensor x = at::empty(all, q.options());
  x.slice(0, 0, shape[0]).unflatten(0, {sequences, shape[0] / sequences}).slice(1, chunks).zero_();
  if (gates) x.slice(0, all[0] - 1).zero_();
  return x;
}
// Of the gates of so many slots. Sizes that are symbolic are decided here, where it may be one of those that count.
template <class Int, class Size>
Int slots_of_gates(const Int& slots, DType dtype, const Size& K, const Size& V, const Size& M) {
  const auto number = [](const Size& x) {
    if constexpr (std::is_same_v<Size, c10::SymInt>) return x.guard_int(__FILE__, __LINE__);
    else return int64_t(x);
  };
  if (dtype != DType::bf16 && dtype != DType::f16) return slots * 0;
  const int64_t slot = (number(K) + number(V)) * number(M) * 2, gates = kept_gates(dtype, number(K), number(V), number(M));
  return gates ? (slots * gates + (slot - 1)) / slot : slots * 0;
}

void check_level(int64_t level) { TORCH_CHECK_VALUE(level >= 0 && level <= 2, "checkpoint_level: expected 0, 1 or 2, given ", level); }

Four chunk(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& s_, const Tensor& g_, OptDouble scale, const OptTensor& hk0_,
           const OptTensor& hv0_, const OptTensor& cu_, bool output_final_state, int64_t checkpoint_level) {
  check_sequence(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  check_level(checkpoint_level);
  check_lengths(cu_, q_.size(1));
  const c10::DeviceGuard guard(q_.device());
  const Inputs in(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  ForwardParams p;
  in.fill(p, scale, false, math_of(q_, false));
  const auto states = q_.options().dtype(state_dtype(q_));
  Tensor o = at::empty({p.B, p.T, p.HQ, p.V}, q_.options());
  Tensor hk, hv, boundary;
  const bool keep = checkpoint_level < 2;
  const int64_t C = chunk_length(p.q.dtype, p.math, p.M);
  const int64_t slots = boundary_slots(p.B, p.T, p.N, cu_.has_value(), C);
  const int64_t gates = checkpoint_level == 0 ? slots_of_gates(slots, p.q.dtype, p.K, p.V, p.M) : 0;
  const bool gates_written = gates && GSA_CALL(q_, keeps_gates)(p);
  boundary = keep ? kept_states({slots, p.H, p.K + p.V, p.M}, gates, gates_written, cu_ ? 0 : p.B, (p.T + C - 1) / C, q_) : at::empty({0}, q_.options());
  if (p.B == 0 || p.T == 0 || p.N == 0) {
    o.zero_();
    boundary.zero_();
    hk = output_final_state ? initial_states(in.hk0, {p.N, p.H, p.K, p.M}, q_) : at::empty({0}, states);
    hv = output_final_state ? initial_states(in.hv0, {p.N, p.H, p.M, p.V}, q_) : at::empty({0}, states);
    return {o, hk, hv, boundary};
  }
  hk = output_final_state ? at::empty({p.N, p.H, p.K, p.M}, states) : at::empty({0}, states);
  hv = output_final_state ? at::empty({p.N, p.H, p.M, p.V}, states) : at::empty({0}, states);
  p.o = view(o);
  if (output_final_state) p.hkT = hk.data_ptr(), p.hvT = hv.data_ptr();
  if (keep) p.boundary = boundary.data_ptr();
  if (gates_written) p.gates = boundary[slots].data_ptr();
  const Tensor w = workspace(p, GSA_CALL(q_, forward_workspace)(p), q_);
  GSA_CALL(q_, chunk_forward)(p);
  return {o, hk, hv, boundary};
}

Three recurrent(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& s_, const Tensor& g_, OptDouble scale, const OptTensor& hk0_,
                const OptTensor& hv0_, const OptTensor& cu_, bool output_final_state, bool reverse) {
  check_sequence(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  check_lengths(cu_, q_.size(1));
  const c10::DeviceGuard guard(q_.device());
  const Inputs in(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  ForwardParams p;
  in.fill(p, scale, reverse, Math::exact);
  const auto states = q_.options().dtype(state_dtype(q_));
  Tensor o = at::empty({p.B, p.T, p.HQ, p.V}, q_.options());
  Tensor hk, hv;
  if (p.B == 0 || p.T == 0 || p.N == 0) {
    o.zero_();
    hk = output_final_state ? initial_states(in.hk0, {p.N, p.H, p.K, p.M}, q_) : at::empty({0}, states);
    hv = output_final_state ? initial_states(in.hv0, {p.N, p.H, p.M, p.V}, q_) : at::empty({0}, states);
    return {o, hk, hv};
  }
  hk = output_final_state ? at::empty({p.N, p.H, p.K, p.M}, states) : at::empty({0}, states);
  hv = output_final_state ? at::empty({p.N, p.H, p.M, p.V}, states) : at::empty({0}, states);
  p.o = view(o);
  if (output_final_state) p.hkT = hk.data_ptr(), p.hvT = hv.data_ptr();
  const Tensor w = workspace(p, GSA_CALL(q_, recurrent_workspace)(p), q_);
  GSA_CALL(q_, recurrent_forward)(p);
  return {o, hk, hv};
}

Four chunk_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble, const OptTensor& hk0, const OptTensor& hv0,
                const OptTensor& cu, bool output_final_state, int64_t checkpoint_level) {
  const Shape d = check_sequence(q, k, v, s, g, hk0, hv0, cu);
  check_level(checkpoint_level);
  const auto states = q.options().dtype(state_dtype(q));
  Tensor o = at::empty_symint({d.B, d.T, d.HQ, d.V}, q.options());
  Tensor hk = output_final_state ? at::empty_symint({d.N, d.H, d.K, d.M}, states) : at::empty({0}, states);
  Tensor hv = output_final_state ? at::empty_symint({d.N, d.H, d.M, d.V}, states) : at::empty({0}, states);
  if (checkpoint_level == 2) return {o, hk, hv, at::empty({0}, q.options())};
  // chunk_length's steps in M are decided here once (a guard), the number of slots stays symbolic.
  const int64_t C = chunk_length(dtype_of(q.scalar_type()), Math::native, d.M <= 64 ? 64 : d.M <= 128 ? 128 : 256);
  const Sym slots = d.packed ? d.T / C + d.N * 2 : d.N * (d.T / C + 2);
  Sym kept = slots;
  if (checkpoint_level == 0) kept = kept + slots_of_gates(slots, dtype_of(q.scalar_type()), d.K, d.V, d.M);
  return {o, hk, hv, at::empty_symint({kept, d.H, d.K + d.V, d.M}, q.options())};
}

Three recurrent_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0,
                     const OptTensor& hv0, const OptTensor& cu, bool output_final_state, bool) {
  auto [o, hk, hv, none] = chunk_meta(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, 2);
  return {o, hk, hv};
}

// ------------------------------------------------------------------------------------------------------------ prefill into a pool

// chunk, or with `exact` recurrent: initial states from, final states to the rows of a pool. g nullopt: ABC. No gradients.
Tensor prefill(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& s_, const OptTensor& g_, Tensor hk, Tensor hv, const OptTensor& z,
               OptDouble scale, const Tensor& state_indices, const OptTensor& cu_, bool exact, bool reverse) {
  check_prefill(q_, k_, v_, s_, g_, hk, hv, z, state_indices, cu_);
  check_lengths(cu_, q_.size(1));
  check_indices(state_indices, hk.size(0));
  TORCH_CHECK_VALUE(exact || !reverse, "reverse: the chunked form goes forward only; use fused_recurrent_gsa");
  const c10::DeviceGuard guard(q_.device());
  const Tensor indices = state_indices.contiguous();
  auto into_pool = [&](auto& p) {
    p.state_indices = indices.data_ptr(), p.indices_64 = indices.scalar_type() == at::kLong, p.P = hk.size(0), p.state_dtype = dtype_of(hk.scalar_type());
  };
  Tensor o = at::empty({q_.size(0), q_.size(1), q_.size(2), v_.size(3)}, q_.options());
  if (o.numel() == 0 || indices.numel() == 0) return o.zero_();
  Tensor s = s_.value_or(Tensor()), g = g_.value_or(Tensor());
  if (!g_) {
    const Tensor e = readable(*s_), cu = cu_ ? cu_->contiguous() : Tensor();
    const auto states = q_.options().dtype(state_dtype(q_));
    s = at::empty(e.sizes(), states), g = at::empty(e.sizes(), states);
    AbcParams p;
    fill_abc(p, e, cu, reverse);
    into_pool(p);
    p.z0 = p.zT = z->data_ptr();
    p.s = view(s), p.g = view(g);
    GSA_CALL(q_, abc_gates)(p);
  }
  const Inputs in(q_, k_, v_, s.defined() ? OptTensor(s) : std::nullopt, g, std::nullopt, std::nullopt, cu_);
  ForwardParams p;
  in.fill(p, scale, reverse, math_of(q_, exact));
  into_pool(p);
  p.hk0 = p.hkT = hk.data_ptr(), p.hv0 = p.hvT = hv.data_ptr();
  p.o = view(o);
  const Tensor w = workspace(p, exact ? GSA_CALL(q_, recurrent_workspace)(p) : GSA_CALL(q_, forward_workspace)(p), q_);
  if (exact) GSA_CALL(q_, recurrent_forward)(p);
  else GSA_CALL(q_, chunk_forward)(p);
  return o;
}

Tensor prefill_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z,
                    OptDouble, const Tensor& state_indices, const OptTensor& cu, bool, bool) {
  const Shape d = check_prefill(q, k, v, s, g, hk, hv, z, state_indices, cu);
  return at::empty_symint({d.B, d.T, d.HQ, d.V}, q.options());
}

// ------------------------------------------------------------------------------------------------------------ backward of both

// exact: the backward of the recurrent form, in fp32 whatever the inputs. Gradients come in the dtype of the input they belong to; those of
// absent inputs are empty.
Seven chunk_backward(const OptTensor& d_o_, const OptTensor& d_hk_, const OptTensor& d_hv_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                     const OptTensor& s_, const Tensor& g_, OptDouble scale, const OptTensor& hk0_, const OptTensor& hv0_, const OptTensor& cu_,
                     const OptTensor& boundary_, bool exact, bool reverse) {
  check_sequence(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  const c10::DeviceGuard guard(q_.device());
  const Inputs in(q_, k_, v_, s_, g_, hk0_, hv0_, cu_);
  BackwardParams p;
  in.fill(p, scale, reverse, math_of(q_, exact));
  const auto states = q_.options().dtype(state_dtype(q_));
  Tensor dq = at::empty(q_.sizes(), q_.options()), dk = at::empty(k_.sizes(), k_.options()), dv = at::empty(v_.sizes(), v_.options());
  Tensor dg = at::empty(in.g.sizes(), in.g.options());
  Tensor ds = in.s.defined() ? at::empty(in.s.sizes(), in.s.options()) : at::empty({0}, in.g.options());
  const bool has_state = in.hk0.defined();
  Tensor dhk0 = has_state ? at::empty({p.N, p.H, p.K, p.M}, states) : at::empty({0}, states);
  Tensor dhv0 = has_state ? at::empty({p.N, p.H, p.M, p.V}, states) : at::empty({0}, states);
  Tensor dhk, dhv;
  if (d_hk_) dhk = in_dtype(*d_hk_, state_dtype(q_)).contiguous();
  if (d_hv_) dhv = in_dtype(*d_hv_, state_dtype(q_)).contiguous();
  if (p.B == 0 || p.T == 0 || p.N == 0) {
    for (Tensor* x : {&dq, &dk, &dv, &ds, &dg}) x->zero_();
    if (has_state) {
      if (dhk.defined()) dhk0.copy_(dhk);
      else dhk0.zero_();
      if (dhv.defined()) dhv0.copy_(dhv);
      else dhv0.zero_();
    }
  } else {
    const Tensor d_o = d_o_ ? readable_in_pieces(in_dtype(*d_o_, q_.scalar_type())) : at::zeros({p.B, p.T, p.HQ, p.V}, q_.options());
    p.d_o = view(d_o);
    p.dq = view(dq), p.dk = view(dk), p.dv = view(dv), p.dg = view(dg);
    if (in.s.defined()) p.ds = view(ds);
    if (dhk.defined()) p.dhkT = dhk.data_ptr();
    if (dhv.defined()) p.dhvT = dhv.data_ptr();
    if (has_state) p.dhk0 = dhk0.data_ptr(), p.dhv0 = dhv0.data_ptr();
    if (boundary_ && boundary_->numel() > 0) {
      const int64_t slots = boundary_slots(p.B, p.T, p.N, cu_.has_value(), chunk_length(p.q.dtype, p.math, p.M));
      p.boundary = boundary_->data_ptr();
      if (boundary_->size(0) > slots && GSA_CALL(q_, keeps_gates)(p)) p.gates = (*boundary_)[slots].data_ptr();
    }
    const Tensor w = workspace(p, GSA_CALL(q_, backward_workspace)(p), q_);
    GSA_CALL(q_, chunk_backward)(p);
  }
  if (has_state && hk0_->size(0) == 1 && p.N != 1) dhk0 = dhk0.sum(0, true), dhv0 = dhv0.sum(0, true);
  return {dq, dk, dv, s_ ? in_dtype(ds, s_->scalar_type()) : ds, in_dtype(dg, g_.scalar_type()), dhk0, dhv0};
}

Seven chunk_backward_meta(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s,
                          const Tensor& g, OptDouble, const OptTensor& hk0, const OptTensor& hv0, const OptTensor&, const OptTensor&, bool, bool) {
  const auto states = q.options().dtype(state_dtype(q));
  auto like = [](const Tensor& x, const at::TensorOptions& o) { return at::empty_symint(x.sym_sizes(), o); };
  return {like(q, q.options()),
          like(k, k.options()),
          like(v, v.options()),
          s ? like(*s, s->options()) : at::empty({0}, q.scalar_type() == at::kDouble ? states : g.options()),
          like(g, g.options()),
          hk0 ? like(*hk0, states) : at::empty({0}, states),
          hv0 ? like(*hv0, states) : at::empty({0}, states)};
}

// ------------------------------------------------------------------------------------------------------------ ABC gates

Three abc_gates(const Tensor& e_, const OptTensor& z0_, const OptTensor& cu_, bool reverse) {
  const Shape d = check_abc(e_, z0_, cu_);
  check_lengths(cu_, e_.size(1));
  const c10::DeviceGuard guard(e_.device());
  const auto states = e_.options().dtype(state_dtype(e_));
  const int64_t N = d.N.expect_int(), H = e_.size(2), M = e_.size(3);
  const Tensor e = readable(e_), cu = cu_ ? cu_->contiguous() : Tensor();
  const Tensor z0 = z0_ ? z0_->expand({N, H, M}).contiguous() : Tensor();
  Tensor s = at::empty(e.sizes(), states), g = at::empty(e.sizes(), states), z = at::empty({N, H, M}, states);
  if (e.numel() == 0 || N == 0) {
    if (z0.defined()) z.copy_(z0);
    else z.fill_(-INFINITY);
    return {s, g, z};
  }
  AbcParams p;
  fill_abc(p, e, cu, reverse);
  if (z0.defined()) p.z0 = z0.data_ptr();
  p.s = view(s), p.g = view(g), p.zT = z.data_ptr();
  GSA_CALL(e_, abc_gates)(p);
  return {s, g, z};
}

Three abc_gates_meta(const Tensor& e, const OptTensor& z0, const OptTensor& cu, bool) {
  const Shape d = check_abc(e, z0, cu);
  const auto states = e.options().dtype(state_dtype(e));
  return {at::empty_symint(e.sym_sizes(), states), at::empty_symint(e.sym_sizes(), states), at::empty_symint({d.N, d.H, d.M}, states)};
}

Two abc_gates_backward(const Tensor& ds_, const Tensor& dg_, const OptTensor& dz_, const Tensor& e_, const Tensor& s_, const Tensor& g_, const OptTensor& z0_,
                       const OptTensor& cu_, bool reverse) {
  const Shape d = check_abc(e_, z0_, cu_);
  const c10::DeviceGuard guard(e_.device());
  const auto states = e_.options().dtype(state_dtype(e_));
  const int64_t N = d.N.expect_int(), H = e_.size(2), M = e_.size(3);
  const Tensor e = readable(e_), cu = cu_ ? cu_->contiguous() : Tensor();
  const Tensor z0 = z0_ ? z0_->expand({N, H, M}).contiguous() : Tensor();
  const Tensor ds = readable(ds_), dg = readable(dg_), s = readable(s_), g = readable(g_);
  const Tensor dz = dz_ ? dz_->contiguous() : Tensor();
  Tensor de = at::empty(e.sizes(), e.options());
  Tensor dz0 = z0.defined() ? at::empty({N, H, M}, states) : at::empty({0}, states);
  if (e.numel() == 0 || N == 0) {
    if (z0.defined()) {
      if (dz.defined()) dz0.copy_(dz);
      else dz0.zero_();
    }
  } else {
    AbcParams p;
    fill_abc(p, e, cu, reverse);
    if (z0.defined()) p.z0 = z0.data_ptr(), p.dz0 = dz0.data_ptr();
    p.s = view(s), p.g = view(g), p.ds = view(ds), p.dg = view(dg), p.de = view(de);
    if (dz.defined()) p.dzT = dz.data_ptr();
    GSA_CALL(e_, abc_gates_backward)(p);
  }
  if (z0_ && z0_->size(0) == 1 && N != 1) dz0 = dz0.sum(0, true);
  return {de, dz0};
}

Two abc_gates_backward_meta(const Tensor&, const Tensor&, const OptTensor&, const Tensor& e, const Tensor&, const Tensor&, const OptTensor& z0,
                            const OptTensor&, bool) {
  const auto states = e.options().dtype(state_dtype(e));
  return {at::empty_symint(e.sym_sizes(), e.options()), z0 ? at::empty_symint(z0->sym_sizes(), states) : at::empty({0}, states)};
}

// ------------------------------------------------------------------------------------------------------------ step

Tensor step(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& s_, const OptTensor& g_, Tensor hk, Tensor hv, const OptTensor& z,
            OptDouble scale, const OptTensor& state_indices, const OptTensor& mask_, double gate_normalizer, const OptTensor& cos_, const OptTensor& sin_,
            bool silu_qk, bool silu_v) {
  check_step(q_, k_, v_, s_, g_, hk, hv, z, state_indices, mask_, gate_normalizer, cos_, sin_);
  check_indices(state_indices, hk.size(0));
  const c10::DeviceGuard guard(q_.device());
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  const Tensor s = s_ ? gate_input(*s_, q_) : Tensor(), g = g_ ? gate_input(*g_, q_) : Tensor();
  const Tensor indices = state_indices ? state_indices->contiguous() : Tensor(), mask = mask_ ? mask_->contiguous() : Tensor();
  StepParams p;
  p.B = q.size(0), p.P = hk.size(0);
  p.HQ = q.size(1), p.H = k.size(1), p.K = q.size(2), p.V = v.size(2), p.M = hk.size(3);
  p.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(p.K)));
  p.q = view(q), p.k = view(k), p.v = view(v);
  if (s.defined()) p.s = view(s);
  if (g.defined()) p.g = view(g);
  p.hk = hk.data_ptr(), p.hv = hv.data_ptr();
  if (!g.defined()) p.z = z->data_ptr();
  p.state_dtype = dtype_of(hk.scalar_type());
  if (indices.defined()) p.state_indices = indices.data_ptr(), p.indices_64 = indices.scalar_type() == at::kLong;
  if (mask.defined()) p.mask = mask.const_data_ptr<bool>();
  const Tensor cos = cos_ ? readable(*cos_) : Tensor(), sin = sin_ ? readable(*sin_) : Tensor();
  if (cos.defined()) {
    p.cos = view(cos), p.sin = view(sin), p.rotary = cos.size(1);
    if (cos.size(0) == 1) p.cos.batch = p.sin.batch = 0;
  }
  p.gate_normalizer = gate_normalizer, p.silu_qk = silu_qk, p.silu_v = silu_v;
  Tensor o = at::empty({p.B, p.HQ, p.V}, q_.options());
  p.o = view(o);
  p.stream = stream_of(q);
  if (p.B > 0) GSA_CALL(q_, step)(p);
  return o;
}

Tensor step_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z, OptDouble,
                 const OptTensor& state_indices, const OptTensor& mask, double gate_normalizer, const OptTensor& cos, const OptTensor& sin, bool, bool) {
  const Shape d = check_step(q, k, v, s, g, hk, hv, z, state_indices, mask, gate_normalizer, cos, sin);
  return at::empty_symint({d.B, d.HQ, d.V}, q.options());
}

// ------------------------------------------------------------------------------------------------------------ autocast

// q, k and v are cast to the autocast dtype; s, g and the states keep theirs, but for 16-bit gates of another 16-bit dtype, which are widened.
template <at::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard off{at::autocast::get_autocast_dispatch_key_from_device_type(device)};

  static Tensor cast(const Tensor& x) { return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device); }
  static Tensor gate(const Tensor& x, const Tensor& q) {
    return x.scalar_type() == q.scalar_type() || x.scalar_type() == at::kDouble || !x.is_floating_point() ? x : x.to(at::kFloat);
  }
  static OptTensor gate(const OptTensor& x, const Tensor& q) { return x ? OptTensor(gate(*x, q)) : x; }

  static Four chunk(const Tensor& q_, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0,
                    const OptTensor& hv0, const OptTensor& cu, bool output_final_state, int64_t checkpoint_level) {
    const Autocast disabled;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::chunk", "").typed<decltype(gsa::chunk)>();
    const Tensor q = cast(q_);
    return op.call(q, cast(k), cast(v), gate(s, q), gate(g, q), scale, hk0, hv0, cu, output_final_state, checkpoint_level);
  }
  static Three recurrent(const Tensor& q_, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0,
                         const OptTensor& hv0, const OptTensor& cu, bool output_final_state, bool reverse) {
    const Autocast disabled;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::recurrent", "").typed<decltype(gsa::recurrent)>();
    const Tensor q = cast(q_);
    return op.call(q, cast(k), cast(v), gate(s, q), gate(g, q), scale, hk0, hv0, cu, output_final_state, reverse);
  }
  static Tensor prefill(const Tensor& q_, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z,
                        OptDouble scale, const Tensor& state_indices, const OptTensor& cu, bool exact, bool reverse) {
    const Autocast disabled;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::prefill", "").typed<decltype(gsa::prefill)>();
    const Tensor q = cast(q_);
    return op.call(q, cast(k), cast(v), gate(s, q), gate(g, q), hk, hv, z, scale, state_indices, cu, exact, reverse);
  }
  static OptTensor turned(const OptTensor& x) { return x ? OptTensor(cast(*x)) : x; }
  static Tensor step(const Tensor& q_, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z,
                     OptDouble scale, const OptTensor& state_indices, const OptTensor& mask, double gate_normalizer, const OptTensor& cos_,
                     const OptTensor& sin_, bool silu_qk, bool silu_v) {
    const Autocast disabled;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::step", "").typed<decltype(gsa::step)>();
    const Tensor q = cast(q_);
    return op.call(q, cast(k), cast(v), gate(s, q), gate(g, q), hk, hv, z, scale, state_indices, mask, gate_normalizer, turned(cos_), turned(sin_), silu_qk,
                   silu_v);
  }
};

template <at::DeviceType device>
void register_autocast(torch::Library& m) {
  m.impl("chunk", Autocast<device>::chunk);
  m.impl("recurrent", Autocast<device>::recurrent);
  m.impl("prefill", Autocast<device>::prefill);
  m.impl("step", Autocast<device>::step);
}

void register_kernels(torch::Library& m) {
  m.impl("chunk", chunk);
  m.impl("recurrent", recurrent);
  m.impl("chunk_backward", chunk_backward);
  m.impl("abc_gates", abc_gates);
  m.impl("abc_gates_backward", abc_gates_backward);
  m.impl("prefill", prefill);
  m.impl("step", step);
}

}  // namespace

TORCH_LIBRARY(gsa, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "chunk(Tensor q, Tensor k, Tensor v, Tensor? s, Tensor g, float? scale, Tensor? hk0, Tensor? hv0, Tensor? cu_seqlens, "
      "bool output_final_state, int checkpoint_level) -> (Tensor o, Tensor hk, Tensor hv, Tensor boundary)",
      tags);
  m.def(
      "recurrent(Tensor q, Tensor k, Tensor v, Tensor? s, Tensor g, float? scale, Tensor? hk0, Tensor? hv0, Tensor? cu_seqlens, "
      "bool output_final_state, bool reverse) -> (Tensor o, Tensor hk, Tensor hv)",
      tags);
  m.def(
      "chunk_backward(Tensor? d_o, Tensor? d_hk, Tensor? d_hv, Tensor q, Tensor k, Tensor v, Tensor? s, Tensor g, float? scale, Tensor? hk0, "
      "Tensor? hv0, Tensor? cu_seqlens, Tensor? boundary, bool exact, bool reverse) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds, Tensor dg, Tensor dhk0, Tensor dhv0)",
      tags);
  m.def("abc_gates(Tensor e, Tensor? z0, Tensor? cu_seqlens, bool reverse) -> (Tensor s, Tensor g, Tensor z)", tags);
  m.def(
      "abc_gates_backward(Tensor ds, Tensor dg, Tensor? dz, Tensor e, Tensor s, Tensor g, Tensor? z0, Tensor? cu_seqlens, bool reverse) -> (Tensor de, Tensor "
      "dz0)",
      tags);
  m.def(
      "prefill(Tensor q, Tensor k, Tensor v, Tensor? s, Tensor? g, Tensor(a!) hk, Tensor(b!) hv, Tensor(c!)? z, float? scale, Tensor state_indices, "
      "Tensor? cu_seqlens, bool exact, bool reverse) -> Tensor",
      tags);
  m.def(
      "step(Tensor q, Tensor k, Tensor v, Tensor? s, Tensor? g, Tensor(a!) hk, Tensor(b!) hv, Tensor(c!)? z, float? scale, Tensor? state_indices, "
      "Tensor? mask=None, float gate_normalizer=0., Tensor? cos=None, Tensor? sin=None, bool silu_qk=False, bool silu_v=False) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(gsa, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(gsa, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(gsa, Meta, m) {
  m.impl("chunk", chunk_meta);
  m.impl("recurrent", recurrent_meta);
  m.impl("chunk_backward", chunk_backward_meta);
  m.impl("abc_gates", abc_gates_meta);
  m.impl("abc_gates_backward", abc_gates_backward_meta);
  m.impl("prefill", prefill_meta);
  m.impl("step", step_meta);
}

TORCH_LIBRARY_IMPL(gsa, AutocastCPU, m) { register_autocast<at::kCPU>(m); }
TORCH_LIBRARY_IMPL(gsa, AutocastCUDA, m) { register_autocast<at::kCUDA>(m); }

}  // namespace gsa
