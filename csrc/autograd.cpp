// Autograd of the ops: each differentiable op saves its inputs and calls its backward op, which is an op of its own (so that
// torch.compile sees both). There is no backward of the backward.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "signatures.h"

namespace gsa {

bool tf32_allowed(const at::Tensor& q);  // ops.cpp: whether products of q and the like may be in TF32

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptDouble = std::optional<double>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using ChunkSignature = Four(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const Tensor&, OptDouble, const OptTensor&, const OptTensor&,
                            const OptTensor&, bool, int64_t);
using RecurrentSignature = Three(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const Tensor&, OptDouble, const OptTensor&, const OptTensor&,
                                 const OptTensor&, bool, bool);
using BackwardSignature = Seven(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                const Tensor&, OptDouble, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, bool, bool);
using AbcSignature = Three(const Tensor&, const OptTensor&, const OptTensor&, bool);
using AbcBackwardSignature = Two(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                 const OptTensor&, bool);
using PrefillSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, Tensor, Tensor, const OptTensor&, OptDouble,
                                const Tensor&, const OptTensor&, bool, bool);

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptTensor maybe(const Tensor& x) { return x.defined() ? OptTensor(x) : std::nullopt; }
Tensor or_undefined(const OptTensor& x) { return x.value_or(Tensor()); }
template <class... Ts>
bool any_requires_grad(const Ts&... xs) {
  auto one = [](const auto& x) {
    if constexpr (std::is_same_v<std::decay_t<decltype(x)>, Tensor>) return x.defined() && x.requires_grad();
    else return x.has_value() && x->defined() && x->requires_grad();
  };
  return at::GradMode::is_enabled() && (one(xs) || ...);
}

// ------------------------------------------------------------------------------------------------------------ chunk, recurrent

// Saved: q k v s g hk0 hv0 cu_seqlens boundary.
variable_list sequence_backward(AutogradContext* ctx, const variable_list& grads, bool exact) {
  static auto op = find<BackwardSignature>("gsa::chunk_backward");
  const variable_list x = ctx->get_saved_variables();
  OptDouble scale;
  if (!ctx->saved_data["scale"].isNone()) scale = ctx->saved_data["scale"].toDouble();
  auto [dq, dk, dv, ds, dg, dhk0, dhv0] = op.call(maybe(grads[0]), maybe(grads[1]), maybe(grads[2]), x[0], x[1], x[2], maybe(x[3]), x[4], scale, maybe(x[5]),
                                                  maybe(x[6]), maybe(x[7]), maybe(x[8]), exact, ctx->saved_data["reverse"].toBool());
  const Tensor none;
  return {dq, dk, dv, x[3].defined() ? ds : none, dg, none, x[5].defined() ? dhk0 : none, x[6].defined() ? dhv0 : none, none, none, none};
}

void save(AutogradContext* ctx, const OptDouble& scale, bool reverse, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g,
          const OptTensor& hk0, const OptTensor& hv0, const OptTensor& cu, const Tensor& boundary) {
  ctx->save_for_backward({q, k, v, or_undefined(s), g, or_undefined(hk0), or_undefined(hv0), or_undefined(cu), boundary});
  ctx->saved_data["scale"] = scale ? c10::IValue(*scale) : c10::IValue();
  ctx->saved_data["reverse"] = reverse;
  ctx->set_materialize_grads(false);
}

// In TF32 boundary states are made for those who ask the op below for them; backward has no use for them (chunk_forward.cu).
int64_t level_of(const Tensor& q, int64_t checkpoint_level) { return checkpoint_level >= 0 && checkpoint_level < 2 && tf32_allowed(q) ? 2 : checkpoint_level; }

struct Chunk : torch::autograd::Function<Chunk> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale,
                               const OptTensor& hk0, const OptTensor& hv0, const OptTensor& cu, bool output_final_state, int64_t checkpoint_level) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<ChunkSignature>("gsa::chunk");
    checkpoint_level = level_of(q, checkpoint_level);
    auto [o, hk, hv, boundary] = op.call(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, checkpoint_level);
    save(ctx, scale, false, q, k, v, s, g, hk0, hv0, cu, checkpoint_level < 2 ? boundary : Tensor());
    if (output_final_state) ctx->mark_non_differentiable({boundary});
    else ctx->mark_non_differentiable({hk, hv, boundary});
    return {o, hk, hv, boundary};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return sequence_backward(ctx, grads, false); }
};

Four chunk(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0, const OptTensor& hv0,
           const OptTensor& cu, bool output_final_state, int64_t checkpoint_level) {
  if (!any_requires_grad(q, k, v, s, g, hk0, hv0)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<ChunkSignature>("gsa::chunk");
    return op.call(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, level_of(q, checkpoint_level));
  }
  auto r = Chunk::apply(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, checkpoint_level);
  return {r[0], r[1], r[2], r[3]};
}

struct Recurrent : torch::autograd::Function<Recurrent> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale,
                               const OptTensor& hk0, const OptTensor& hv0, const OptTensor& cu, bool output_final_state, bool reverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<RecurrentSignature>("gsa::recurrent");
    auto [o, hk, hv] = op.call(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, reverse);
    save(ctx, scale, reverse, q, k, v, s, g, hk0, hv0, cu, Tensor());
    if (!output_final_state) ctx->mark_non_differentiable({hk, hv});
    return {o, hk, hv};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return sequence_backward(ctx, grads, true); }
};

Three recurrent(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0,
                const OptTensor& hv0, const OptTensor& cu, bool output_final_state, bool reverse) {
  if (!any_requires_grad(q, k, v, s, g, hk0, hv0)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<RecurrentSignature>("gsa::recurrent");
    return op.call(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, reverse);
  }
  auto r = Recurrent::apply(q, k, v, s, g, scale, hk0, hv0, cu, output_final_state, reverse);
  return {r[0], r[1], r[2]};
}

// ------------------------------------------------------------------------------------------------------------ ABC gates

struct Abc : torch::autograd::Function<Abc> {
  static variable_list forward(AutogradContext* ctx, const Tensor& e, const OptTensor& z0, const OptTensor& cu, bool reverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<AbcSignature>("gsa::abc_gates");
    auto [s, g, z] = op.call(e, z0, cu, reverse);
    ctx->save_for_backward({e, s, g, or_undefined(z0), or_undefined(cu)});
    ctx->saved_data["reverse"] = reverse;
    return {s, g, z};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static auto op = find<AbcBackwardSignature>("gsa::abc_gates_backward");
    const variable_list x = ctx->get_saved_variables();
    auto [de, dz0] = op.call(grads[0], grads[1], maybe(grads[2]), x[0], x[1], x[2], maybe(x[3]), maybe(x[4]), ctx->saved_data["reverse"].toBool());
    return {de, x[3].defined() ? dz0 : Tensor(), Tensor(), Tensor()};
  }
};

Three abc_gates(const Tensor& e, const OptTensor& z0, const OptTensor& cu, bool reverse) {
  auto r = Abc::apply(e, z0, cu, reverse);
  return {r[0], r[1], r[2]};
}

// ------------------------------------------------------------------------------------------------------------ second derivatives

[[noreturn]] void no_second_derivative() {
  TORCH_CHECK(false,
              "gsa_ext: the backward of the backward is not supported; use gsa_ext.reference.naive_gsa, which can be differentiated any number of times");
}

struct ChunkBackward : torch::autograd::Function<ChunkBackward> {
  static variable_list forward(AutogradContext*, const OptTensor& d_o, const OptTensor& d_hk, const OptTensor& d_hv, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptTensor& s, const Tensor& g, OptDouble scale, const OptTensor& hk0, const OptTensor& hv0,
                               const OptTensor& cu, const OptTensor& boundary, bool exact, bool reverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<BackwardSignature>("gsa::chunk_backward");
    auto [a, b, c, d, e, f, h] = op.call(d_o, d_hk, d_hv, q, k, v, s, g, scale, hk0, hv0, cu, boundary, exact, reverse);
    return {a, b, c, d, e, f, h};
  }
  static variable_list backward(AutogradContext*, const variable_list&) { no_second_derivative(); }
};

Seven chunk_backward(const OptTensor& d_o, const OptTensor& d_hk, const OptTensor& d_hv, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s,
                     const Tensor& g, OptDouble scale, const OptTensor& hk0, const OptTensor& hv0, const OptTensor& cu, const OptTensor& boundary, bool exact,
                     bool reverse) {
  auto r = ChunkBackward::apply(d_o, d_hk, d_hv, q, k, v, s, g, scale, hk0, hv0, cu, boundary, exact, reverse);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

struct AbcBackward : torch::autograd::Function<AbcBackward> {
  static variable_list forward(AutogradContext*, const Tensor& ds, const Tensor& dg, const OptTensor& dz, const Tensor& e, const Tensor& s, const Tensor& g,
                               const OptTensor& z0, const OptTensor& cu, bool reverse) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<AbcBackwardSignature>("gsa::abc_gates_backward");
    auto [de, dz0] = op.call(ds, dg, dz, e, s, g, z0, cu, reverse);
    return {de, dz0};
  }
  static variable_list backward(AutogradContext*, const variable_list&) { no_second_derivative(); }
};

Two abc_gates_backward(const Tensor& ds, const Tensor& dg, const OptTensor& dz, const Tensor& e, const Tensor& s, const Tensor& g, const OptTensor& z0,
                       const OptTensor& cu, bool reverse) {
  auto r = AbcBackward::apply(ds, dg, dz, e, s, g, z0, cu, reverse);
  return {r[0], r[1]};
}

// ------------------------------------------------------------------------------------------------------------ prefill, step

void written(const Tensor& hk, const Tensor& hv, const OptTensor& z) {
  torch::autograd::increment_version(hk);
  torch::autograd::increment_version(hv);
  if (z) torch::autograd::increment_version(*z);
}

// These two have no gradient: they write the states in place.
Tensor prefill(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z,
               OptDouble scale, const Tensor& state_indices, const OptTensor& cu, bool exact, bool reverse) {
  TORCH_CHECK(!any_requires_grad(q, k, v, s, g, hk, hv, z),
              "state_indices: grad mode is on and an input or state requires grad, but the states of a pool are written in place and have no backward; "
              "leave state_indices out and give each sequence its initial_state, or call it under torch.no_grad()");
  Tensor o;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<PrefillSignature>("gsa::prefill");
    o = op.call(q, k, v, s, g, hk, hv, z, scale, state_indices, cu, exact, reverse);
  }
  written(hk, hv, z);
  return o;
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, Tensor hk, Tensor hv, const OptTensor& z,
            OptDouble scale, const OptTensor& state_indices, const OptTensor& mask, double gate_normalizer, const OptTensor& cos, const OptTensor& sin,
            bool silu_qk, bool silu_v) {
  TORCH_CHECK(!any_requires_grad(q, k, v, s, g, hk, hv, z),
              "gsa_step: grad mode is on and an input or state requires grad, but the step writes the states in place and has no backward; "
              "use fused_recurrent_gsa, or call it under torch.no_grad()");
  Tensor o;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static auto op = find<StepSignature>("gsa::step");
    o = op.call(q, k, v, s, g, hk, hv, z, scale, state_indices, mask, gate_normalizer, cos, sin, silu_qk, silu_v);
  }
  written(hk, hv, z);
  return o;
}

}  // namespace

TORCH_LIBRARY_IMPL(gsa, Autograd, m) {
  m.impl("chunk", chunk);
  m.impl("recurrent", recurrent);
  m.impl("abc_gates", abc_gates);
  m.impl("chunk_backward", chunk_backward);
  m.impl("abc_gates_backward", abc_gates_backward);
  m.impl("prefill", prefill);
  m.impl("step", step);
}

}  // namespace gsa
