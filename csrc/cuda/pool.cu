// Rows of a pool of states, brought together where a kernel does not go to the pool itself, and brought back.
#include <algorithm>

#include "core/chunk.cuh"
#include "states.h"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Blocks of `parts` to a sequence. T: of the pool. gather: pool -> rows, of padding zeros; else back, and padding gets its o, where f has one.
template <class T, bool gather>
__global__ __launch_bounds__(kThreads) void move_states(const __grid_constant__ PoolParams p, const __grid_constant__ ForwardParams f, int parts) {
  const int64_t part = blockIdx.x % parts, n = blockIdx.x / parts, row = state_row(p, n);
  if (gather && p.numbers && part == 0 && threadIdx.x == 0) p.numbers[n] = row < 0 ? -1 : static_cast<int32_t>(n);
  if (row < 0) {
    for (int64_t q_head = part; !gather && f.o.ptr && q_head < f.HQ; q_head += parts) zero_padding(f, n, q_head);
    if constexpr (gather)
      for (const auto& x : p.parts)
        for (int64_t i = part * kThreads + threadIdx.x; i < x.size; i += int64_t(parts) * kThreads) x.rows[n * x.size + i] = 0.f;
    return;
  }
  for (const auto& x : p.parts) {
    T* const there = static_cast<T*>(x.pool) + row * x.size;
    float* const here = x.rows + n * x.size;
    const int64_t stride = int64_t(parts) * kThreads, first = part * kThreads + threadIdx.x;
    if (x.size % 4 == 0 && reinterpret_cast<uintptr_t>(x.pool) % sizeof(Four<T>) == 0) {
#pragma unroll 4
      for (int64_t i = first; i < x.size / 4; i += stride) {
        if constexpr (gather) {
          const Four<T> y = reinterpret_cast<const Four<T>*>(there)[i];
          reinterpret_cast<float4*>(here)[i] = {to_float(y.x[0]), to_float(y.x[1]), to_float(y.x[2]), to_float(y.x[3])};
        } else {
          const float4 y = reinterpret_cast<const float4*>(here)[i];
          reinterpret_cast<Four<T>*>(there)[i] = {from_float<T>(y.x), from_float<T>(y.y), from_float<T>(y.z), from_float<T>(y.w)};
        }
      }
    } else {
      for (int64_t i = first; i < x.size; i += stride) {
        if constexpr (gather) here[i] = to_float(there[i]);
        else there[i] = from_float<T>(here[i]);
      }
    }
  }
}

template <bool gather>
void move(const PoolParams& p, const ForwardParams& f, DType pool) {
  const int64_t parts = std::clamp<int64_t>(p.parts[0].size / (kThreads * 16), 1, 64);
  auto run = [&](auto kernel) { launch("move_states", kernel, p.N * parts, kThreads, 0, p.stream, p, f, static_cast<int>(parts)); };
  if (pool == DType::bf16) run(move_states<bf16, gather>);
  else run(move_states<float, gather>);
}

PoolParams pool_of(const ForwardParams& p, float* hk, float* hv) {
  PoolParams x;
  x.N = p.N, x.P = p.P, x.state_indices = p.state_indices, x.indices_64 = p.indices_64, x.stream = p.stream;
  x.parts[0] = {p.hkT, hk, int64_t(p.H) * p.K * p.M};
  x.parts[1] = {p.hvT, hv, int64_t(p.H) * p.M * p.V};
  return x;
}

}  // namespace

void widen_states(const PoolParams& p) { move<true>(p, {}, DType::bf16); }
void narrow_states(const PoolParams& p) { move<false>(p, {}, DType::bf16); }
void states_from_pool(const ForwardParams& p, float* hk, float* hv) { move<true>(pool_of(p, hk, hv), {}, DType::f32); }
void states_to_pool(const ForwardParams& p, float* hk, float* hv) { move<false>(pool_of(p, hk, hv), p, DType::f32); }

}  // namespace gsa::cuda
