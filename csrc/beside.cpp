// torch.ops.gsa.conv_step and window_step: one token of what some layers have beside the slots, states updated in place. CUDA kernels in cuda/beside.cu; on the
// CPU, in fp64 and for windows too large for a block, the same from torch's own operations. No gradients.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "checks.h"
#include "params.h"
#include "signatures.h"

namespace gsa {
namespace {

using Sym = c10::SymInt;

void check_state_like(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), name, ": expected dtype ", like.scalar_type(), ", given ", x.scalar_type());
  TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", the token on ", like.device(), ": move them to one device");
}
void check_sizes(const char* name, const Tensor& x, const char* letters, const std::vector<Sym>& want) {
  TORCH_CHECK_VALUE(x.sym_sizes() == c10::SymIntArrayRef(want), name, ": expected shape ", letters, " = ", c10::SymIntArrayRef(want), ", given ",
                    x.sym_sizes());
}
void check_mask(const std::optional<Tensor>& mask, const Tensor& x) {
  if (!mask) return;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask: expected dtype bool, given ", mask->scalar_type());
  check_sizes("mask", *mask, "[B]", {x.sym_size(0)});
  TORCH_CHECK(mask->device() == x.device(), "mask is on ", mask->device(), ", the token on ", x.device(), ": move them to one device");
}

void check_conv(const Tensor& x, const Tensor& history, const Tensor& weight, const OptTensor& bias, const OptTensor& mask) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected shape [B, D], given ", x.sym_sizes());
  TORCH_CHECK_VALUE(weight.dim() == 3 && weight.sym_size(2) > 0, "weight: expected shape [D, 1, W], given ", weight.sym_sizes());
  check_sizes("weight", weight, "[D, 1, W]", {x.sym_size(1), 1, weight.sym_size(2)});
  check_sizes("history", history, "[B, W - 1, D]", {x.sym_size(0), weight.sym_size(2) - 1, x.sym_size(1)});
  if (bias) check_sizes("bias", *bias, "[D]", {x.sym_size(1)}), check_state_like("bias", *bias, x);
  check_state_like("history", history, x), check_state_like("weight", weight, x);
  TORCH_CHECK_VALUE(history.is_contiguous(), "history is updated in place and must be contiguous");
  check_mask(mask, x);
}

void check_window(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Tensor& filled, const OptTensor& mask,
                  const OptTensor& cos, const OptTensor& sin) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v: expected shapes [B, HQ, K], [B, H, K], [B, H, V], given ", q.sym_sizes(), ", ",
                    k.sym_sizes(), ", ", v.sym_sizes());
  TORCH_CHECK_VALUE(keys.dim() == 4, "keys: expected shape [B, window - 1, H, K], given ", keys.sym_sizes());
  const Sym B = q.sym_size(0), HQ = q.sym_size(1), K = q.sym_size(2), H = k.sym_size(1), V = v.sym_size(2), back = keys.sym_size(1);
  check_sizes("k", k, "[B, H, K]", {B, H, K});
  check_sizes("v", v, "[B, H, V]", {B, H, V});
  TORCH_CHECK_VALUE(H > 0 && HQ % H == 0, "q has ", HQ, " heads and k has ", H, ": query heads must be a multiple of key/value heads");
  check_sizes("keys", keys, "[B, window - 1, H, K]", {B, back, H, K});
  check_sizes("values", values, "[B, window - 1, H, V]", {B, back, H, V});
  check_sizes("filled", filled, "[B]", {B});
  TORCH_CHECK_TYPE(filled.scalar_type() == at::kLong, "filled: expected dtype int64, given ", filled.scalar_type());
  TORCH_CHECK(filled.device() == q.device(), "filled is on ", filled.device(), ", the token on ", q.device(), ": move them to one device");
  for (const auto& [name, x] : {std::pair("k", &k), std::pair("v", &v), std::pair("keys", &keys), std::pair("values", &values)}) check_state_like(name, *x, q);
  TORCH_CHECK_VALUE(keys.is_contiguous() && values.is_contiguous() && filled.is_contiguous(),
                    "keys, values and filled are updated in place and must be contiguous");
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither");
  if (cos) {
    TORCH_CHECK_VALUE(cos->dim() == 2 && (cos->sym_size(0) == B || cos->sym_size(0) == 1) && cos->sym_size(1) % 2 == 0 && cos->sym_size(1) <= K,
                      "cos: expected shape [B or 1, rotary] with an even number of at most K = ", K, " components, given ", cos->sym_sizes());
    check_sizes("sin", *sin, "[B or 1, rotary]", {cos->sym_size(0), cos->sym_size(1)});
    check_state_like("cos", *cos, q), check_state_like("sin", *sin, q);
  }
  check_mask(mask, q);
}

#ifdef GSA_WITH_CUDA
Tensor readable(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }
DType dtype_of(const Tensor& x) { return x.scalar_type() == at::kFloat ? DType::f32 : x.scalar_type() == at::kHalf ? DType::f16 : DType::bf16; }
bool has_kernel(const Tensor& x) { return x.is_cuda() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16); }
void* stream_of(const Tensor& x) { return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle(); }
View view(const Tensor& x) {
  View r;
  r.ptr = x.data_ptr(), r.dtype = dtype_of(x), r.batch = x.stride(0), r.head = x.dim() == 3 ? x.stride(1) : 0;
  return r;
}
#endif

// moved where mask holds, else as it was
void keep(const Tensor& state, const Tensor& moved, const OptTensor& mask) {
  if (!mask) state.copy_(moved);
  else
    state.copy_(at::where(mask->view([&] {
      std::vector<int64_t> shape(state.dim(), 1);
      shape[0] = state.size(0);
      return shape;
    }()),
                          moved, state));
}

Tensor conv_step(const Tensor& x, Tensor history, const Tensor& weight, const OptTensor& bias, const OptTensor& mask) {
  check_conv(x, history, weight, bias, mask);
  const c10::DeviceGuard guard(x.device());
#ifdef GSA_WITH_CUDA
  if (has_kernel(x)) {
    const Tensor in = readable(x), factors = weight.contiguous(), add = bias ? bias->contiguous() : Tensor(), where = mask ? mask->contiguous() : Tensor();
    Tensor o = at::empty(x.sizes(), x.options());
    ConvParams p;
    p.B = x.size(0), p.D = x.size(1), p.W = static_cast<int32_t>(weight.size(2));
    p.x = view(in), p.history = history.data_ptr(), p.weight = factors.data_ptr(), p.o = o.data_ptr(), p.stream = stream_of(x);
    if (add.defined()) p.bias = add.data_ptr();
    if (where.defined()) p.mask = where.const_data_ptr<bool>();
    cuda::conv_step(p);
    return o;
  }
#endif
  const Tensor all = at::cat({history, x.unsqueeze(1)}, 1);
  Tensor sum = (all * weight.squeeze(1).t()).sum(1);
  if (bias) sum = sum + *bias;
  keep(history, all.slice(1, 1), mask);
  return at::silu(sum);
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t rotary = cos.size(1);
  const Tensor turning = x.slice(2, 0, rotary), swapped = at::cat({-turning.slice(2, rotary / 2), turning.slice(2, 0, rotary / 2)}, 2);
  return at::cat({turning * cos.unsqueeze(1) + swapped * sin.unsqueeze(1), x.slice(2, rotary)}, 2);
}

Tensor window_step(const Tensor& q_, const Tensor& k_, const Tensor& v, Tensor keys, Tensor values, Tensor filled, double scale, const OptTensor& mask,
                   const OptTensor& cos, const OptTensor& sin) {
  check_window(q_, k_, v, keys, values, filled, mask, cos, sin);
  const c10::DeviceGuard guard(q_.device());
  const int64_t B = q_.size(0), HQ = q_.size(1), H = k_.size(1), V = v.size(2), back = keys.size(1);
#ifdef GSA_WITH_CUDA
  if (has_kernel(q_) && B > 0) {
    const Tensor qr = readable(q_), kr = readable(k_), vr = readable(v), where = mask ? mask->contiguous() : Tensor();
    const Tensor c = cos ? readable(*cos) : Tensor(), s = sin ? readable(*sin) : Tensor();
    Tensor o = at::empty({B, HQ, V}, q_.options());
    WindowParams p;
    p.B = B, p.HQ = HQ, p.H = H, p.K = q_.size(2), p.V = V, p.back = back, p.scale = scale;
    p.q = view(qr), p.k = view(kr), p.v = view(vr), p.o = view(o), p.stream = stream_of(q_);
    p.keys = keys.data_ptr(), p.values = values.data_ptr(), p.filled = filled.data_ptr<int64_t>();
    if (where.defined()) p.mask = where.const_data_ptr<bool>();
    if (c.defined()) {
      p.cos = view(c), p.sin = view(s), p.rotary = c.size(1);
      if (c.size(0) == 1) p.cos.batch = p.sin.batch = 0;
    }
    if (cuda::window_step_shared(p) <= 96 * 1024) {
      cuda::window_step(p);
      return o;
    }
  }
#endif
  const Tensor q = cos ? rotated(q_, *cos, *sin) : q_, k = cos ? rotated(k_, *cos, *sin) : k_;
  const Tensor all_keys = at::cat({keys, k.unsqueeze(1)}, 1), all_values = at::cat({values, v.unsqueeze(1)}, 1);
  const Tensor visible = at::arange(back + 1, filled.options()).ge(back - filled.unsqueeze(1)).view({B, 1, 1, back + 1});
  Tensor o = at::scaled_dot_product_attention(q.unflatten(1, {H, HQ / H}), all_keys.transpose(1, 2), all_values.transpose(1, 2), visible, 0.0, false, scale);
  o = o.reshape({B, HQ, V});
  keep(keys, all_keys.slice(1, 1), mask);
  keep(values, all_values.slice(1, 1), mask);
  filled.copy_((filled + (mask ? mask->to(at::kLong) : at::ones_like(filled))).clamp_max(back));
  return mask ? o.masked_fill(mask->logical_not().view({B, 1, 1}), 0) : o;
}

Tensor conv_step_meta(const Tensor& x, Tensor history, const Tensor& weight, const OptTensor& bias, const OptTensor& mask) {
  check_conv(x, history, weight, bias, mask);
  return at::empty_symint(x.sym_sizes(), x.options());
}

Tensor window_step_meta(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values, Tensor filled, double, const OptTensor& mask,
                        const OptTensor& cos, const OptTensor& sin) {
  check_window(q, k, v, keys, values, filled, mask, cos, sin);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), v.sym_size(2)}, q.options());
}

template <class... Ts>
void refuse_gradients(const char* name, const Ts&... xs) {
  auto one = [](const auto& x) { return OptTensor(x).has_value() && OptTensor(x)->defined() && OptTensor(x)->requires_grad(); };
  TORCH_CHECK(!(at::GradMode::is_enabled() && (one(xs) || ...)), name,
              ": grad mode is on and an input requires grad, but the states are written in place and have no backward; call it under torch.no_grad()");
}

Tensor conv_step_autograd(const Tensor& x, Tensor history, const Tensor& weight, const OptTensor& bias, const OptTensor& mask) {
  refuse_gradients("conv_step", x, history, weight, bias);
  Tensor o;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::conv_step", "").typed<ConvStepSignature>();
    o = op.call(x, history, weight, bias, mask);
  }
  torch::autograd::increment_version(history);
  return o;
}

Tensor window_step_autograd(const Tensor& q, const Tensor& k, const Tensor& v, Tensor keys, Tensor values, Tensor filled, double scale, const OptTensor& mask,
                            const OptTensor& cos, const OptTensor& sin) {
  refuse_gradients("window_step", q, k, v, keys, values);
  Tensor o;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gsa::window_step", "").typed<WindowStepSignature>();
    o = op.call(q, k, v, keys, values, filled, scale, mask, cos, sin);
  }
  for (const Tensor& x : {keys, values, filled}) torch::autograd::increment_version(x);
  return o;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gsa, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("conv_step(Tensor x, Tensor(a!) history, Tensor weight, Tensor? bias=None, Tensor? mask=None) -> Tensor", tags);
  m.def(
      "window_step(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) filled, float scale, Tensor? mask=None, Tensor? cos=None, "
      "Tensor? sin=None) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(gsa, CPU, m) {
  m.impl("conv_step", conv_step);
  m.impl("window_step", window_step);
}
TORCH_LIBRARY_IMPL(gsa, CUDA, m) {
  m.impl("conv_step", conv_step);
  m.impl("window_step", window_step);
}
TORCH_LIBRARY_IMPL(gsa, Meta, m) {
  m.impl("conv_step", conv_step_meta);
  m.impl("window_step", window_step_meta);
}
TORCH_LIBRARY_IMPL(gsa, Autograd, m) {
  m.impl("conv_step", conv_step_autograd);
  m.impl("window_step", window_step_autograd);
}

}  // namespace gsa
