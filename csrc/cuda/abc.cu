// ABC's gates from raw slot logits e, one thread per slot, along time. With d = e_t - z_{t-1}:
//
//     z_t = z_{t-1} + log(1 + exp(d))      g_t = -log(1 + exp(d))      s_t = sigmoid(d)
//
// (written so that g keeps its relative accuracy however large z is). Silent tokens (e = -inf) give g = 0, s = 0 and leave z; the first write of an
// empty slot (z = -inf) gives s = 1 and g = -inf, or g = 0 when no z was handed over. Backward, with zeta_t the cotangent of z_t:
//
//     zeta = carry - ds s - dg       de = s (ds + zeta)       carry <- zeta exp(g) + dg
#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kSlots = 64, kAhead = 8;

struct AbcSequence {
  int64_t begin, end, batch;
};
__device__ AbcSequence abc_sequence(const AbcParams& p, int64_t n) {
  if (!p.cu_seqlens) return {0, p.T, n};
  Params q;
  q.T = p.T, q.cu_seqlens = p.cu_seqlens, q.cu_seqlens_64 = p.cu_seqlens_64;
  const int64_t begin = bound(q, n);
  return {begin, max(bound(q, n + 1), begin), 0};
}

__global__ __launch_bounds__(kSlots) void abc_gates_kernel(const __grid_constant__ AbcParams p) {
  const int tiles = (p.M + kSlots - 1) / kSlots;
  const int64_t n = blockIdx.x / tiles / p.H, head = blockIdx.x / tiles % p.H;
  const int m = blockIdx.x % tiles * kSlots + threadIdx.x;
  if (m >= p.M) return;
  const AbcSequence q = abc_sequence(p, n);
  const int64_t row = state_row(p, n), length = q.end - q.begin, slot = (row * p.H + head) * p.M + m;
  const bool there = row >= 0;  // or padding of a pool: silent tokens, for the kernels read them
  float z = p.z0 && there ? load_as_float(p.z0, slot, p.state_dtype) : -INFINITY;
  auto token = [&](int64_t i) { return p.reverse ? q.end - 1 - i : q.begin + i; };
  auto at = [&](const View& x, int64_t t) { return q.batch * x.batch + t * x.token + head * x.head + m; };
  for (int64_t i0 = 0; i0 < length; i0 += kAhead) {
    float e[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) e[i] = i0 + i < length ? load_as_float(p.e.ptr, at(p.e, token(i0 + i)), p.e.dtype) : -INFINITY;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i0 + i >= length) break;
      float s = 0.f, g = 0.f;
      if (there && e[i] != -INFINITY) {
        if (z == -INFINITY) {
          s = 1.f, g = p.z0 ? -INFINITY : 0.f, z = e[i];
        } else {
          const float d = e[i] - z, x = expf(-fabsf(d)), l = log1pf(x);
          s = d > 0.f ? 1.f / (1.f + x) : x / (1.f + x);
          g = d > 0.f ? -(d + l) : -l;
          z = d > 0.f ? e[i] + l : z + l;
        }
      }
      static_cast<float*>(p.s.ptr)[at(p.s, token(i0 + i))] = s;
      static_cast<float*>(p.g.ptr)[at(p.g, token(i0 + i))] = g;
    }
  }
  if (there) store_as(p.zT, slot, p.state_dtype, z);
}

__global__ __launch_bounds__(kSlots) void abc_gates_backward_kernel(const __grid_constant__ AbcParams p) {
  const int tiles = (p.M + kSlots - 1) / kSlots;
  const int64_t n = blockIdx.x / tiles / p.H, head = blockIdx.x / tiles % p.H;
  const int m = blockIdx.x % tiles * kSlots + threadIdx.x;
  if (m >= p.M) return;
  const AbcSequence q = abc_sequence(p, n);
  const int64_t length = q.end - q.begin, slot = (n * p.H + head) * p.M + m;
  float carry = p.dzT ? static_cast<const float*>(p.dzT)[slot] : 0.f;
  auto at = [&](const View& x, int64_t i) { return q.batch * x.batch + (p.reverse ? q.begin + i : q.end - 1 - i) * x.token + head * x.head + m; };
  for (int64_t i0 = 0; i0 < length; i0 += kAhead) {
    float s[kAhead], g[kAhead], ds[kAhead], dg[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t t = i0 + i < length ? i0 + i : length - 1;
      s[i] = static_cast<const float*>(p.s.ptr)[at(p.s, t)], g[i] = static_cast<const float*>(p.g.ptr)[at(p.g, t)];
      ds[i] = static_cast<const float*>(p.ds.ptr)[at(p.ds, t)], dg[i] = static_cast<const float*>(p.dg.ptr)[at(p.dg, t)];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i0 + i >= length) break;
      float de = 0.f;
      const bool first = s[i] == 1.f && (g[i] == 0.f || g[i] == -INFINITY);
      if (first) {                                        // z_t = e_t; s and g are constants
        de = carry, carry = 0.f;
      } else if (s[i] != 0.f || g[i] != 0.f) {
        const float zeta = carry - ds[i] * s[i] - dg[i];
        de = s[i] * (ds[i] + zeta);
        carry = zeta * expf(g[i]) + dg[i];
      }
      store_as(p.de.ptr, at(p.de, i0 + i), p.de.dtype, de);
    }
  }
  if (p.dz0) static_cast<float*>(p.dz0)[slot] = carry;
}

}  // namespace

void abc_gates(const AbcParams& p) {
  require_device();
  launch("abc_gates", abc_gates_kernel, p.N * p.H * ceil_div(p.M, kSlots), kSlots, 0, p.stream, p);
}
void abc_gates_backward(const AbcParams& p) {
  require_device();
  launch("abc_gates_backward", abc_gates_backward_kernel, p.N * p.H * ceil_div(p.M, kSlots), kSlots, 0, p.stream, p);
}

}  // namespace gsa::cuda
