// o of padding: of the sequences that state_indices gives no row of the pool, and that the other kernels take for empty.
#include <algorithm>

#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void zero_padding_kernel(const __grid_constant__ ForwardParams p, int parts) {
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts;
  if (state_row(p, n) >= 0) return;
  const int64_t begin = p.cu_seqlens ? bound(p, n) : 0, end = p.cu_seqlens ? bound(p, n + 1) : p.T, batch = p.cu_seqlens ? 0 : n;
  for (int64_t t = begin + part; t < end; t += parts)
    for (int i = threadIdx.x; i < p.HQ * p.V; i += kThreads)
      store_as(p.o.ptr, batch * p.o.batch + t * p.o.token + i / p.V * p.o.head + i % p.V, p.o.dtype, 0.f);
}

}  // namespace

void zero_padding(const ForwardParams& p) {
  const int64_t parts = std::clamp<int64_t>(1024 / p.N, 1, std::min<int64_t>(p.T, 64));
  launch("zero_padding", zero_padding_kernel, p.N * parts, kThreads, 0, p.stream, p, static_cast<int>(parts));
}

}  // namespace gsa::cuda
