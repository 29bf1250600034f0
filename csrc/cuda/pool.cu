// States that could not be written to their pool in place.
#include "core/chunk.cuh"
#include "states.h"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256;

// A block has a sequence, head and `part` of its states.
__global__ __launch_bounds__(kThreads) void states_to_pool_kernel(const __grid_constant__ ForwardParams p, const float* hk, const float* hv, int parts) {
  const int64_t part = blockIdx.x % parts, head = blockIdx.x / parts % p.H, n = blockIdx.x / parts / p.H, row = state_row(p, n);
  if (row < 0) return;
  auto copy = [&](void* to, const float* from, int64_t size) {
    for (int64_t i = part * kThreads + threadIdx.x; i < size; i += parts * kThreads)
      static_cast<float*>(to)[(row * p.H + head) * size + i] = from[(n * p.H + head) * size + i];
  };
  copy(p.hkT, hk, int64_t(p.K) * p.M);
  copy(p.hvT, hv, int64_t(p.M) * p.V);
}

}  // namespace

void states_to_pool(const ForwardParams& p, const void* hk, const void* hv) {
  launch("states_to_pool", states_to_pool_kernel, p.N * p.H * 4, kThreads, 0, p.stream, p, static_cast<const float*>(hk), static_cast<const float*>(hv), 4);
}

}  // namespace gsa::cuda
