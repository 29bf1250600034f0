// What every op asks of its arguments before anything runs, for real and for fake (symbolic) tensors alike.
// Each check names the tensor, what was expected and what was given.
#pragma once
#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>

namespace gsa {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Contents of cu_seqlens and state_indices on the GPU are checked only when this is on: it costs a host synchronisation.
void set_checks(bool on);
bool checks();

// Sizes and the resolved optional arguments of chunk and recurrent.
struct Shape {
  c10::SymInt B, T, HQ, H, K, V, M, N;
  bool packed = false;
};

Shape check_sequence(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const Tensor& g, const OptTensor& hk0, const OptTensor& hv0,
                     const OptTensor& cu_seqlens);
Shape check_abc(const Tensor& e, const OptTensor& z0, const OptTensor& cu_seqlens);
Shape check_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, const Tensor& hk, const Tensor& hv,
                 const OptTensor& z, const OptTensor& state_indices, const OptTensor& mask, double gate_normalizer, const OptTensor& cos, const OptTensor& sin);

Shape check_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& s, const OptTensor& g, const Tensor& hk, const Tensor& hv,
                    const OptTensor& z, const Tensor& state_indices, const OptTensor& cu_seqlens);

// For real tensors only: contents, where they may be looked at.
void check_lengths(const OptTensor& cu_seqlens, int64_t T);
void check_indices(const OptTensor& state_indices, int64_t P);

}  // namespace gsa
