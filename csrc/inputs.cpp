// torch.ops.gsa.rotate and log_gate, what a layer does to its projections before the op, mix and silu_norm, what it does after it, each in one pass over
// memory. CUDA kernels in cuda/inputs.cu; on the CPU and in fp64 the same from torch's own operations.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "params.h"
#include "signatures.h"

namespace gsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptTensor = std::optional<Tensor>;
using OptDouble = std::optional<double>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// ------------------------------------------------------------------------------------------------------------ rotate

void check_rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK_VALUE(q.dim() == 4, "q: expected shape [B, T, HQ, D], given ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sym_size(0) == q.sym_size(0) && k.sym_size(1) == q.sym_size(1) && k.sym_size(3) == q.sym_size(3),
                    "k: expected shape [B, T, H, D], q being ", q.sym_sizes(), ", given ", k.sym_sizes());
  TORCH_CHECK_VALUE(cos.dim() == 3 && (cos.sym_size(0) == q.sym_size(0) || cos.sym_size(0) == 1) && cos.sym_size(1) == q.sym_size(1) &&
                        cos.sym_size(2) % 2 == 0 && cos.sym_size(2) <= q.sym_size(3),
                    "cos: expected shape [B or 1, T, n] with an even n of at most D, q being ", q.sym_sizes(), ", given ", cos.sym_sizes());
  TORCH_CHECK_VALUE(sin.sym_sizes() == cos.sym_sizes(), "sin: expected cos's shape ", cos.sym_sizes(), ", given ", sin.sym_sizes());
  for (const Tensor* x : {&q, &k, &cos, &sin})
    TORCH_CHECK_TYPE(at::isFloatingType(x->scalar_type()), "q, k, cos, sin: expected floating point dtypes, given ", x->scalar_type());
  TORCH_CHECK(q.device() == k.device() && q.device() == cos.device() && q.device() == sin.device(), "q, k, cos and sin are on ", q.device(), ", ", k.device(),
              ", ", cos.device(), " and ", sin.device(), ": move them to one device");
}

#ifdef GSA_WITH_CUDA
bool has_kernel(const Tensor& x) { return x.is_cuda() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16); }
DType dtype_of(const Tensor& x) { return x.scalar_type() == at::kFloat ? DType::f32 : x.scalar_type() == at::kHalf ? DType::f16 : DType::bf16; }
void* stream_of(const Tensor& x) { return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle(); }
View view(const Tensor& x) {
  View r;
  r.ptr = x.data_ptr(), r.dtype = dtype_of(x), r.batch = x.stride(0), r.token = x.stride(1), r.head = x.dim() == 4 ? x.stride(2) : 0;
  return r;
}
#endif

Tensor rotate_one(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  const int64_t n = cos.size(2);
  Tensor o = at::empty(x.sizes(), x.options());
  const Tensor c = cos.unsqueeze(2), s = sin.unsqueeze(2);
  Tensor turned = o.slice(3, 0, n), o1 = o.slice(3, 0, n / 2), o2 = o.slice(3, n / 2, n);
  const Tensor first = s.slice(3, 0, n / 2), second = s.slice(3, n / 2);
  at::mul_out(turned, x.slice(3, 0, n), c);
  o1.addcmul_(x.slice(3, n / 2, n), transposed ? second : first, transposed ? 1 : -1);
  o2.addcmul_(x.slice(3, 0, n / 2), transposed ? first : second, transposed ? -1 : 1);
  o.slice(3, n).copy_(x.slice(3, n));
  return o;
}

Two rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool transposed) {
  check_rotate(q, k, cos, sin);
  const c10::DeviceGuard guard(q.device());
#ifdef GSA_WITH_CUDA
  const bool one_dtype = k.scalar_type() == q.scalar_type() && cos.scalar_type() == q.scalar_type() && sin.scalar_type() == q.scalar_type();
  if (has_kernel(q) && one_dtype) {
    auto readable = [](const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); };
    const Tensor qr = readable(q), kr = readable(k), c = readable(cos), s = readable(sin);
    Tensor qo = at::empty(q.sizes(), q.options()), ko = at::empty(k.sizes(), k.options());
    RotateParams p;
    p.B = q.size(0), p.T = q.size(1), p.q_heads = static_cast<int32_t>(q.size(2)), p.k_heads = static_cast<int32_t>(k.size(2));
    p.D = static_cast<int32_t>(q.size(3)), p.n = static_cast<int32_t>(cos.size(2)), p.transposed = transposed, p.stream = stream_of(q);
    p.q = view(qr), p.k = view(kr), p.q_out = view(qo), p.k_out = view(ko), p.cos = view(c), p.sin = view(s);
    if (c.size(0) == 1) p.cos.batch = 0;
    if (s.size(0) == 1) p.sin.batch = 0;
    if (qo.numel() + ko.numel() > 0) cuda::rotate(p);
    return {qo, ko};
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return {rotate_one(q, cos, sin, transposed), rotate_one(k, cos, sin, transposed)};
}

Two rotate_meta(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool) {
  check_rotate(q, k, cos, sin);
  return {at::empty_symint(q.sym_sizes(), q.options()), at::empty_symint(k.sym_sizes(), k.options())};
}

struct Rotate : torch::autograd::Function<Rotate> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool transposed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::rotate", "").typed<decltype(rotate)>();
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["transposed"] = transposed;
    auto [qo, ko] = op.call(q, k, cos, sin, transposed);
    return {qo, ko};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::rotate", "").typed<decltype(rotate)>();
    const variable_list saved = ctx->get_saved_variables();
    auto [dq, dk] = op.call(grads[0], grads[1], saved[0], saved[1], !ctx->saved_data["transposed"].toBool());
    return {dq, dk, {}, {}, {}};
  }
};

Two rotate_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool transposed) {
  const variable_list o = Rotate::apply(q, k, cos.detach(), sin.detach(), transposed);
  return {o[0], o[1]};
}

// ------------------------------------------------------------------------------------------------------------ log_gate

at::ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
void check_log_gate(const Tensor& logits, double normalizer, const OptTensor& mask) {
  TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()), "logits: expected a floating point dtype, given ", logits.scalar_type());
  TORCH_CHECK_VALUE(normalizer > 0, "normalizer: expected a positive number, given ", normalizer);
  if (!mask) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask: expected bool, given ", mask->scalar_type());
  TORCH_CHECK_VALUE(mask->dim() == 2 && logits.dim() >= 2 && mask->sym_size(0) == logits.sym_size(0) && mask->sym_size(1) == logits.sym_size(1),
                    "mask: expected shape [B, T], logits being ", logits.sym_sizes(), ", given ", mask->sym_sizes());
  TORCH_CHECK(mask->device() == logits.device(), "logits and mask are on ", logits.device(), " and ", mask->device(), ": move them to one device");
}
Tensor padding(const Tensor& mask, const Tensor& like) {  // [B, T, 1, ...]
  Tensor r = mask.logical_not();
  for (int64_t i = 2; i < like.dim(); ++i) r = r.unsqueeze(-1);
  return r;
}
Tensor raised(const Tensor& logits, OptDouble lowest) { return (lowest ? logits.clamp_min(*lowest) : logits).to(wide(logits)); }
Tensor log_gate_cotangent(const Tensor& d_g, const Tensor& logits, double normalizer, OptDouble lowest, const OptTensor& mask) {
  Tensor d = (d_g / normalizer * at::sigmoid(-raised(logits, lowest))).to(logits.scalar_type());
  if (lowest) d = d.masked_fill((logits >= *lowest).logical_not(), 0);
  return mask ? d.masked_fill(padding(*mask, logits), 0) : d;
}

#ifdef GSA_WITH_CUDA
void log_gate_kernel(const Tensor& logits, const OptTensor& d_g, double normalizer, OptDouble lowest, const OptTensor& mask, Tensor& o) {
  const Tensor in = logits.contiguous(), cotangent = d_g ? d_g->contiguous() : Tensor(), tokens = mask ? mask->contiguous() : Tensor();
  LogGateParams p;
  p.count = in.numel(), p.normalizer = normalizer, p.dtype = dtype_of(in), p.logits = in.const_data_ptr(), p.o = o.data_ptr(), p.stream = stream_of(in);
  if (d_g) p.d_o = cotangent.const_data_ptr<float>();
  if (lowest) p.has_lowest = true, p.lowest = *lowest;
  if (mask) p.mask = tokens.const_data_ptr<bool>(), p.per_token = in.numel() / std::max<int64_t>(tokens.numel(), 1);
  if (p.count > 0) cuda::log_gate(p);
}
#endif

Tensor log_gate(const Tensor& logits, double normalizer, OptDouble lowest, const OptTensor& mask) {
  check_log_gate(logits, normalizer, mask);
  const c10::DeviceGuard guard(logits.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(logits)) {
    Tensor o = at::empty(logits.sizes(), logits.options().dtype(at::kFloat));
    log_gate_kernel(logits, {}, normalizer, lowest, mask, o);
    return o;
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor g = at::log_sigmoid(raised(logits, lowest));
  if (normalizer != 1) g = g / normalizer;
  return mask ? g.masked_fill(padding(*mask, logits), 0) : g;
}

Tensor log_gate_backward(const Tensor& d_g, const Tensor& logits, double normalizer, OptDouble lowest, const OptTensor& mask) {
  check_log_gate(logits, normalizer, mask);
  const c10::DeviceGuard guard(logits.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(logits) && d_g.scalar_type() == at::kFloat) {
    Tensor o = at::empty(logits.sizes(), logits.options());
    log_gate_kernel(logits, d_g, normalizer, lowest, mask, o);
    return o;
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return log_gate_cotangent(d_g, logits, normalizer, lowest, mask);
}

Tensor log_gate_meta(const Tensor& logits, double normalizer, OptDouble, const OptTensor& mask) {
  check_log_gate(logits, normalizer, mask);
  return at::empty_symint(logits.sym_sizes(), logits.options().dtype(wide(logits)));
}
Tensor log_gate_backward_meta(const Tensor&, const Tensor& logits, double, OptDouble, const OptTensor&) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

struct LogGate : torch::autograd::Function<LogGate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, double normalizer, OptDouble lowest, const OptTensor& mask) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::log_gate", "").typed<decltype(log_gate)>();
    ctx->save_for_backward({logits, mask.value_or(Tensor())});
    ctx->saved_data["normalizer"] = normalizer;
    ctx->saved_data["lowest"] = lowest ? c10::IValue(*lowest) : c10::IValue();
    return op.call(logits, normalizer, lowest, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const double normalizer = ctx->saved_data["normalizer"].toDouble();
    const OptDouble lowest = ctx->saved_data["lowest"].isNone() ? OptDouble() : ctx->saved_data["lowest"].toDouble();
    const OptTensor mask = saved[1].defined() ? OptTensor(saved[1]) : std::nullopt;
    if (at::GradMode::is_enabled())  // of a gradient of a gradient
      return {log_gate_cotangent(grads[0], saved[0], normalizer, lowest, mask), {}, {}, {}};
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::log_gate_backward", "").typed<decltype(log_gate_backward)>();
    return {op.call(grads[0], saved[0], normalizer, lowest, mask), {}, {}, {}};
  }
};

Tensor log_gate_autograd(const Tensor& logits, double normalizer, OptDouble lowest, const OptTensor& mask) {
  return LogGate::apply(logits, normalizer, lowest, mask);
}

// --------------------------------------------------------------------------------------------------------------- mix

void check_mix(const Tensor& a, const Tensor& b, const Tensor& share) {
  TORCH_CHECK_TYPE(at::isFloatingType(a.scalar_type()), "a: expected a floating point dtype, given ", a.scalar_type());
  TORCH_CHECK_TYPE(b.scalar_type() == a.scalar_type() && share.scalar_type() == a.scalar_type(), "b, share: expected a's dtype ", a.scalar_type(), ", given ",
                   b.scalar_type(), " and ", share.scalar_type());
  TORCH_CHECK_VALUE(a.dim() >= 2, "a: expected shape [..., heads, D], given ", a.sym_sizes());
  TORCH_CHECK_VALUE(b.sym_sizes() == a.sym_sizes(), "b: expected a's shape ", a.sym_sizes(), ", given ", b.sym_sizes());
  TORCH_CHECK_VALUE(share.dim() == 1 && share.sym_size(0) == a.sym_size(-2), "share: expected shape [heads], a being ", a.sym_sizes(), ", given ",
                    share.sym_sizes());
  TORCH_CHECK(a.device() == b.device() && a.device() == share.device(), "a, b and share are on ", a.device(), ", ", b.device(), " and ", share.device(),
              ": move them to one device");
}
Three mix_cotangents(const Tensor& d, const Tensor& a, const Tensor& b, const Tensor& share) {
  const Tensor w = share.unsqueeze(-1);
  std::vector<int64_t> rest(a.dim() - 1);
  for (int64_t i = 0; i < a.dim() - 2; ++i) rest[i] = i;
  rest.back() = a.dim() - 1;
  const at::ScalarType sums = wide(a);
  return {d * (1 - w), d * w, (d.to(sums) * (b.to(sums) - a.to(sums))).sum(rest).to(share.scalar_type())};
}

#ifdef GSA_WITH_CUDA
MixParams mix_params(const Tensor& a, const Tensor& b, const Tensor& share) {  // contiguous ones
  MixParams p;
  p.heads = static_cast<int32_t>(a.size(-2)), p.D = static_cast<int32_t>(a.size(-1)), p.rows = a.numel() / std::max<int64_t>(int64_t(p.heads) * p.D, 1);
  p.slabs = (p.rows + kMixSlab - 1) / kMixSlab, p.dtype = dtype_of(a), p.stream = stream_of(a);
  p.a = a.const_data_ptr(), p.b = b.const_data_ptr(), p.share = share.const_data_ptr();
  const int64_t V = 16 / a.element_size();
  if (p.D % V == 0 && (reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b)) % 16 == 0) p.V = static_cast<int32_t>(V);
  return p;
}
#endif

Tensor mix(const Tensor& a, const Tensor& b, const Tensor& share) {
  check_mix(a, b, share);
  const c10::DeviceGuard guard(a.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(a)) {
    const Tensor ac = a.contiguous(), bc = b.contiguous(), sc = share.contiguous();
    Tensor o = at::empty(a.sizes(), a.options());
    MixParams p = mix_params(ac, bc, sc);
    p.o = o.data_ptr();
    if (o.numel() > 0) cuda::mix(p);
    return o;
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at::lerp(a, b, share.unsqueeze(-1));
}

Three mix_backward(const Tensor& d_o, const Tensor& a, const Tensor& b, const Tensor& share) {
  check_mix(a, b, share);
  const c10::DeviceGuard guard(a.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(a) && d_o.scalar_type() == a.scalar_type() && a.numel() > 0) {
    const Tensor ac = a.contiguous(), bc = b.contiguous(), sc = share.contiguous(), dc = d_o.contiguous();
    Tensor d_a = at::empty(a.sizes(), a.options()), d_b = at::empty(a.sizes(), a.options());
    MixParams p = mix_params(ac, bc, sc);
    if (reinterpret_cast<uintptr_t>(dc.const_data_ptr()) % 16 != 0) p.V = 1;
    Tensor parts = at::empty({p.slabs, p.heads, p.D / p.V}, a.options().dtype(at::kFloat));
    p.d_o = dc.const_data_ptr(), p.d_a = d_a.data_ptr(), p.d_b = d_b.data_ptr(), p.d_share = parts.data_ptr<float>();
    cuda::mix(p);
    return {d_a, d_b, parts.sum(at::IntArrayRef({0, 2})).to(share.scalar_type())};
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return mix_cotangents(d_o, a, b, share);
}

Tensor mix_meta(const Tensor& a, const Tensor& b, const Tensor& share) {
  check_mix(a, b, share);
  return at::empty_symint(a.sym_sizes(), a.options());
}
Three mix_backward_meta(const Tensor&, const Tensor& a, const Tensor& b, const Tensor& share) {
  check_mix(a, b, share);
  return {at::empty_symint(a.sym_sizes(), a.options()), at::empty_symint(a.sym_sizes(), a.options()), at::empty_symint(share.sym_sizes(), share.options())};
}

struct Mix : torch::autograd::Function<Mix> {
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b, const Tensor& share) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::mix", "").typed<MixSignature>();
    ctx->save_for_backward({a, b, share});
    return op.call(a, b, share);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::mix_backward", "").typed<decltype(mix_backward)>();
    auto [d_a, d_b, d_share] = at::GradMode::is_enabled() ? mix_cotangents(grads[0], saved[0], saved[1], saved[2])  // of a gradient of a gradient
                                                          : op.call(grads[0], saved[0], saved[1], saved[2]);
    return {d_a, d_b, d_share};
  }
};

Tensor mix_autograd(const Tensor& a, const Tensor& b, const Tensor& share) { return Mix::apply(a, b, share); }

// --------------------------------------------------------------------------------------------------------- silu_norm
// rms_norm(silu(o)) * weight over the last dimension, in fp32 (fp64), rounded once.

void check_silu_norm(const Tensor& o, const OptTensor& weight, OptDouble eps) {
  TORCH_CHECK_TYPE(at::isFloatingType(o.scalar_type()), "o: expected a floating point dtype, given ", o.scalar_type());
  TORCH_CHECK_VALUE(o.dim() >= 1, "o: expected shape [..., D], given ", o.sym_sizes());
  TORCH_CHECK_VALUE(!eps || *eps >= 0, "eps: expected a number that is not negative, or None, given ", *eps);
  if (!weight) return;
  TORCH_CHECK_TYPE(weight->scalar_type() == o.scalar_type(), "weight: expected o's dtype ", o.scalar_type(), ", given ", weight->scalar_type());
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == o.sym_size(-1), "weight: expected shape [D], o being ", o.sym_sizes(), ", given ",
                    weight->sym_sizes());
  TORCH_CHECK(weight->device() == o.device(), "o and weight are on ", o.device(), " and ", weight->device(), ": move them to one device");
}
double eps_of(const Tensor& o, OptDouble eps) {  // None: what torch's rms_norm takes it for
  return eps.value_or(o.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon());
}
Tensor inverse_rms(const Tensor& s, double eps) { return (s.square().mean(-1, true) + eps).rsqrt(); }
Two silu_norm_cotangents(const Tensor& d_y, const Tensor& o, const OptTensor& weight, const Tensor& inverse, bool of_weight) {
  const Tensor x = o.to(wide(o)), gate = at::sigmoid(x), s = x * gate, d = d_y.to(wide(o)), d_normed = weight ? d * *weight : d;
  const Tensor d_s = inverse * (d_normed - s * (inverse.square() * (d_normed * s).mean(-1, true)));
  const Tensor d_o = (d_s * (gate + s * (1 - gate))).to(o.scalar_type());
  if (!of_weight) return {d_o, at::empty({0}, o.options())};
  const Tensor each = d * s * inverse;
  return {d_o, (o.dim() > 1 ? each.flatten(0, -2).sum(0) : each).to(o.scalar_type())};
}

#ifdef GSA_WITH_CUDA
SiluNormParams silu_norm_params(const Tensor& o, const Tensor& weight, double eps) {  // contiguous ones, or no weight
  SiluNormParams p;
  p.width = o.size(-1), p.rows = o.numel() / std::max<int64_t>(p.width, 1), p.eps = static_cast<float>(eps);
  p.share = 1.f / static_cast<float>(p.width), p.dtype = dtype_of(o), p.stream = stream_of(o);
  p.o = o.const_data_ptr(), p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  return p;
}
#endif

Tensor silu_norm_of(const Tensor& o, const OptTensor& weight, OptDouble eps, Tensor* inverse) {
  check_silu_norm(o, weight, eps);
  const c10::DeviceGuard guard(o.device());
  std::vector<int64_t> rows = o.sizes().vec();
  rows.back() = 1;
#ifdef GSA_WITH_CUDA
  if (has_kernel(o)) {
    const Tensor oc = o.contiguous(), wc = weight ? weight->contiguous() : Tensor();
    Tensor y = at::empty(o.sizes(), o.options());
    SiluNormParams p = silu_norm_params(oc, wc, eps_of(o, eps));
    p.y = y.data_ptr();
    if (inverse) *inverse = at::empty(rows, o.options().dtype(at::kFloat)), p.inverse = inverse->data_ptr<float>();
    if (o.numel() > 0) cuda::silu_norm(p);
    return y;
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor s = at::silu(o.to(wide(o))), r = inverse_rms(s, eps_of(o, eps)), normed = s * r;
  if (inverse) *inverse = r;
  return (weight ? normed * *weight : normed).to(o.scalar_type());
}
Tensor silu_norm(const Tensor& o, const OptTensor& weight, OptDouble eps) { return silu_norm_of(o, weight, eps, nullptr); }
Two silu_norm_forward(const Tensor& o, const OptTensor& weight, OptDouble eps) {
  Tensor inverse;
  Tensor y = silu_norm_of(o, weight, eps, &inverse);
  return {y, inverse};
}

Two silu_norm_backward(const Tensor& d_y, const Tensor& o, const OptTensor& weight, const Tensor& inverse, bool of_weight) {
  check_silu_norm(o, weight, {});
  const c10::DeviceGuard guard(o.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(o) && d_y.scalar_type() == o.scalar_type() && o.numel() > 0) {
    const Tensor oc = o.contiguous(), wc = weight ? weight->contiguous() : Tensor(), dc = d_y.contiguous(), rc = inverse.contiguous();
    Tensor d_o = at::empty(o.sizes(), o.options()), d_weight = at::empty({of_weight ? o.size(-1) : 0}, o.options());
    SiluNormParams p = silu_norm_params(oc, wc, 0);
    p.d_y = dc.const_data_ptr(), p.d_o = d_o.data_ptr(), p.inverse = rc.data_ptr<float>(), p.parts = cuda::silu_norm_parts(p);
    Tensor sums;
    if (of_weight) sums = at::empty({p.parts, p.width}, rc.options()), p.sums = sums.data_ptr<float>(), p.d_weight = d_weight.data_ptr();
    cuda::silu_norm_backward(p);
    return {d_o, d_weight};
  }
#endif
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return silu_norm_cotangents(d_y, o, weight, inverse, of_weight);
}

Tensor silu_norm_meta(const Tensor& o, const OptTensor& weight, OptDouble eps) {
  check_silu_norm(o, weight, eps);
  return at::empty_symint(o.sym_sizes(), o.options());
}
Two silu_norm_forward_meta(const Tensor& o, const OptTensor& weight, OptDouble eps) {
  std::vector<c10::SymInt> rows = o.sym_sizes().vec();
  Tensor y = silu_norm_meta(o, weight, eps);
  rows.back() = 1;
  return {y, at::empty_symint(rows, o.options().dtype(wide(o)))};
}
Two silu_norm_backward_meta(const Tensor&, const Tensor& o, const OptTensor& weight, const Tensor&, bool of_weight) {
  check_silu_norm(o, weight, {});
  return {at::empty_symint(o.sym_sizes(), o.options()), at::empty_symint({of_weight ? o.sym_size(-1) : c10::SymInt(0)}, o.options())};
}

struct SiluNorm : torch::autograd::Function<SiluNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& o, const OptTensor& weight, OptDouble eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::silu_norm_forward", "").typed<decltype(silu_norm_forward)>();
    auto [y, inverse] = op.call(o, weight, eps);
    ctx->save_for_backward({o, weight.value_or(Tensor()), inverse});
    ctx->saved_data["eps"] = eps ? c10::IValue(*eps) : c10::IValue();
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptTensor weight = saved[1].defined() ? OptTensor(saved[1]) : std::nullopt;
    const bool of_weight = weight && ctx->needs_input_grad(1);
    Tensor d_o, d_weight;
    if (at::GradMode::is_enabled()) {  // of a gradient of a gradient
      const OptDouble eps = ctx->saved_data["eps"].isNone() ? OptDouble() : ctx->saved_data["eps"].toDouble();
      const Tensor inverse = inverse_rms(at::silu(saved[0].to(wide(saved[0]))), eps_of(saved[0], eps));
      std::tie(d_o, d_weight) = silu_norm_cotangents(grads[0], saved[0], weight, inverse, of_weight);
    } else {
      static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::silu_norm_backward", "").typed<decltype(silu_norm_backward)>();
      std::tie(d_o, d_weight) = op.call(grads[0], saved[0], weight, saved[2], of_weight);
    }
    return {d_o, of_weight ? d_weight : Tensor(), {}};
  }
};

Tensor silu_norm_autograd(const Tensor& o, const OptTensor& weight, OptDouble eps) {
  if (!(at::GradMode::is_enabled() && (o.requires_grad() || (weight && weight->requires_grad())))) {  // nothing to save
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::silu_norm", "").typed<SiluNormSignature>();
    return op.call(o, weight, eps);
  }
  return SiluNorm::apply(o, weight, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gsa, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed=False) -> (Tensor, Tensor)", tags);
  m.def("log_gate(Tensor logits, float normalizer, float? lowest=None, Tensor? mask=None) -> Tensor", tags);
  m.def("log_gate_backward(Tensor d_g, Tensor logits, float normalizer, float? lowest=None, Tensor? mask=None) -> Tensor", tags);
  m.def("mix(Tensor a, Tensor b, Tensor share) -> Tensor", tags);
  m.def("mix_backward(Tensor d_o, Tensor a, Tensor b, Tensor share) -> (Tensor, Tensor, Tensor)", tags);
  m.def("silu_norm(Tensor o, Tensor? weight=None, float? eps=None) -> Tensor", tags);
  m.def("silu_norm_forward(Tensor o, Tensor? weight=None, float? eps=None) -> (Tensor, Tensor)", tags);
  m.def("silu_norm_backward(Tensor d_y, Tensor o, Tensor? weight, Tensor inverse, bool of_weight) -> (Tensor, Tensor)", tags);
}
TORCH_LIBRARY_IMPL(gsa, CPU, m) {
  m.impl("rotate", rotate);
  m.impl("log_gate", log_gate);
  m.impl("log_gate_backward", log_gate_backward);
  m.impl("mix", mix);
  m.impl("mix_backward", mix_backward);
  m.impl("silu_norm", silu_norm);
  m.impl("silu_norm_forward", silu_norm_forward);
  m.impl("silu_norm_backward", silu_norm_backward);
}
TORCH_LIBRARY_IMPL(gsa, CUDA, m) {
  m.impl("rotate", rotate);
  m.impl("log_gate", log_gate);
  m.impl("log_gate_backward", log_gate_backward);
  m.impl("mix", mix);
  m.impl("mix_backward", mix_backward);
  m.impl("silu_norm", silu_norm);
  m.impl("silu_norm_forward", silu_norm_forward);
  m.impl("silu_norm_backward", silu_norm_backward);
}
TORCH_LIBRARY_IMPL(gsa, Meta, m) {
  m.impl("rotate", rotate_meta);
  m.impl("log_gate", log_gate_meta);
  m.impl("log_gate_backward", log_gate_backward_meta);
  m.impl("mix", mix_meta);
  m.impl("mix_backward", mix_backward_meta);
  m.impl("silu_norm", silu_norm_meta);
  m.impl("silu_norm_forward", silu_norm_forward_meta);
  m.impl("silu_norm_backward", silu_norm_backward_meta);
}
TORCH_LIBRARY_IMPL(gsa, Autograd, m) {
  m.impl("rotate", rotate_autograd);
  m.impl("log_gate", log_gate_autograd);
  m.impl("mix", mix_autograd);
  m.impl("silu_norm", silu_norm_autograd);
}

}  // namespace gsa
