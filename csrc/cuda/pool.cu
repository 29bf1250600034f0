// States that could not be read from their pool, or written to it, in place.
#include <algorithm>

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

// The same cut. widen: bf16 pool -> fp32 rows, else back.
template <bool widen>
__global__ __launch_bounds__(kThreads) void convert_states(const __grid_constant__ PoolParams p, int parts) {
  const int64_t part = blockIdx.x % parts, n = blockIdx.x / parts, row = state_row(p, n);
  if (widen && part == 0 && threadIdx.x == 0) p.numbers[n] = row < 0 ? -1 : static_cast<int32_t>(n);
  if (row < 0) return;
  for (const auto& x : p.parts) {
    bf16* const narrow = static_cast<bf16*>(x.pool) + row * x.size;
    float* const wide = x.rows + n * x.size;
    const int64_t stride = int64_t(parts) * kThreads, first = part * kThreads + threadIdx.x;
    if (x.size % 4 == 0 && (reinterpret_cast<uintptr_t>(x.pool) & 7) == 0) {
      for (int64_t i = first; i < x.size / 4; i += stride) {
        float4& f = reinterpret_cast<float4*>(wide)[i];
        uint2& h = reinterpret_cast<uint2*>(narrow)[i];
        if constexpr (widen) {
          const uint2 y = h;
          f = {__uint_as_float(y.x << 16), __uint_as_float(y.x & 0xffff0000u), __uint_as_float(y.y << 16), __uint_as_float(y.y & 0xffff0000u)};
        } else {
          const float4 y = f;
          h = {pack<bf16>(y.x, y.y), pack<bf16>(y.z, y.w)};
        }
      }
    } else {
      for (int64_t i = first; i < x.size; i += stride) {
        if constexpr (widen) wide[i] = to_float(narrow[i]);
        else narrow[i] = from_float<bf16>(wide[i]);
      }
    }
  }
}

template <bool widen>
void convert(const PoolParams& p) {
  const int64_t parts = std::clamp<int64_t>(p.parts[0].size / (kThreads * 32), 1, 64);
  launch("convert_states", convert_states<widen>, p.N * parts, kThreads, 0, p.stream, p, static_cast<int>(parts));
}

}  // namespace

void widen_states(const PoolParams& p) { convert<true>(p); }
void narrow_states(const PoolParams& p) { convert<false>(p); }

void states_to_pool(const ForwardParams& p, const void* hk, const void* hv) {
  launch("states_to_pool", states_to_pool_kernel, p.N * p.H * 4, kThreads, 0, p.stream, p, static_cast<const float*>(hk), static_cast<const float*>(hv), 4);
}

}  // namespace gsa::cuda
