// The typed signatures of the ops that a layer calls at every token, for those who call them through the dispatcher.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace gsa {

using StepSignature = at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& s,
                                 const std::optional<at::Tensor>& g, at::Tensor hk, at::Tensor hv, const std::optional<at::Tensor>& z,
                                 std::optional<double> scale, const std::optional<at::Tensor>& state_indices, const std::optional<at::Tensor>& mask,
                                 double gate_normalizer, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, bool silu_qk, bool silu_v);

using ConvStepSignature = at::Tensor(const at::Tensor& x, at::Tensor history, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                     const std::optional<at::Tensor>& mask);

using WindowStepSignature = at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor keys, at::Tensor values, at::Tensor filled,
                                       double scale, const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& cos,
                                       const std::optional<at::Tensor>& sin);

using SiluNormSignature = at::Tensor(const at::Tensor& o, const std::optional<at::Tensor>& weight, std::optional<double> eps);

using MixSignature = at::Tensor(const at::Tensor& a, const at::Tensor& b, const at::Tensor& share);

}  // namespace gsa
