// The signature of torch.ops.gsa.step, for those who call it through the dispatcher.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace gsa {

using StepSignature = at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& s,
                                 const std::optional<at::Tensor>& g, at::Tensor hk, at::Tensor hv, const std::optional<at::Tensor>& z,
                                 std::optional<double> scale, const std::optional<at::Tensor>& state_indices, const std::optional<at::Tensor>& mask,
                                 double gate_normalizer, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, bool silu_qk, bool silu_v);

}  // namespace gsa
