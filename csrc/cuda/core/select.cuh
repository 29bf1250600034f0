// Which tile configuration runs: the one place that maps dtype, arithmetic and number of slots to a Config.
// The chunk kernels take up to 109 KB of shared memory: two blocks fit a multiprocessor of sm_90 (228 KB), one those of sm_80. GPUs with 99 KB a block
// (sm_86, sm_89, sm_120) get narrower slices where more would be needed.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

template <class F>
void select_config(const Params& p, F&& f) {
  const bool fp32 = p.q.dtype == DType::f32 || p.math == Math::exact, tf32 = p.q.dtype == DType::f32 && p.math == Math::tf32;
  auto by_slots = [&]<class E>() {
    if constexpr (sizeof(E) == 4) {
      if (p.M <= 64) f.template operator()<Config<E, 64, 32, 32>>();
      else if (p.M <= 128) f.template operator()<Config<E, 128, 16, 32>>();
      else f.template operator()<Config<E, 256, 16, 8>>();
    } else {
      if (p.M <= 64) f.template operator()<Config<E, 64, 64, 32>>();
      else if (p.M <= 128 && shared_memory() >= 112 * 1024) f.template operator()<Config<E, 128, 64, 32>>();
      else if (p.M <= 128) f.template operator()<Config<E, 128, 64, 16>>();
      else f.template operator()<Config<E, 256, 32, 16>>();
    }
  };
  if (tf32) {
    if (p.M <= 64) f.template operator()<Config<float, 64, 64, 16, true>>();
    else if (p.M <= 128 && shared_memory() >= 112 * 1024) f.template operator()<Config<float, 128, 64, 16, true>>();
    else if (p.M <= 128) f.template operator()<Config<float, 128, 64, 8, true>>();
    else f.template operator()<Config<float, 256, 32, 8, true>>();
  } else if (fp32) by_slots.template operator()<float>();
  else if (p.q.dtype == DType::bf16) by_slots.template operator()<bf16>();
  else by_slots.template operator()<half>();
}

}  // namespace gsa::cuda
