// Which tile configuration runs: the one place that maps dtype, arithmetic and number of slots to a Config.
// Shared memory stays below 99 KB in every one of them, so that all GPUs from sm_80 on can run it.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

template <class F>
void select_config(const Params& p, F&& f) {
  const bool fp32 = p.q.dtype == DType::f32 || p.math == Math::exact;
  auto by_slots = [&]<class E>() {
    if constexpr (sizeof(E) == 4) {
      if (p.M <= 64) f.template operator()<Config<E, 64, 32, 32>>();
      else if (p.M <= 128) f.template operator()<Config<E, 128, 16, 32>>();
      else f.template operator()<Config<E, 256, 16, 16>>();
    } else {
      if (p.M <= 64) f.template operator()<Config<E, 64, 64, 64>>();
      else if (p.M <= 128) f.template operator()<Config<E, 128, 64, 32>>();
      else f.template operator()<Config<E, 256, 32, 32>>();
    }
  };
  if (fp32) by_slots.template operator()<float>();
  else if (p.q.dtype == DType::bf16) by_slots.template operator()<bf16>();
  else by_slots.template operator()<half>();
}

}  // namespace gsa::cuda
