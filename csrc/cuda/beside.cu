// One token of what some layers have beside the slots: short convolutions, and softmax attention to a window of the last tokens. States are updated in place,
// in one launch (a window's count of tokens in a second).
#include <algorithm>

#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 32;   // kRows: of keys or values in shared memory at a time

template <class E>
__global__ __launch_bounds__(kThreads) void conv_step_kernel(const __grid_constant__ ConvParams p) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= p.B * p.D) return;
  const int64_t b = i / p.D, d = i % p.D;
  const bool moves = !p.mask || p.mask[b];
  const E x = static_cast<const E*>(p.x.ptr)[b * p.x.batch + d];
  const E* weight = static_cast<const E*>(p.weight) + d * p.W;
  E* history = static_cast<E*>(p.history) + b * (p.W - 1) * p.D + d;
  float sum = to_float(x) * to_float(weight[p.W - 1]);
  for (int j = 0; j < p.W - 1; ++j) {
    const E h = history[j * p.D];
    sum = fmaf(to_float(h), to_float(weight[j]), sum);
    if (moves && j > 0) history[(j - 1) * p.D] = h;
  }
  if (moves && p.W > 1) history[(p.W - 2) * p.D] = x;
  if (p.bias) sum += to_float(static_cast<const E*>(p.bias)[d]);
  static_cast<E*>(p.o)[i] = from_float<E>(sum / (1.f + expf(-sum)));
}

template <class E>
__device__ float round_to(float x) {
  return to_float(from_float<E>(x));
}

// Component i of a row, rotated: each product and the sum are rounded, as separate kernels would leave them.
template <class E>
__device__ float rotated(const E* x, int i, const WindowParams& p, const E* cos, const E* sin) {
  const float f = to_float(x[i]);
  if (i >= p.rotary) return f;
  const int half = p.rotary / 2;
  const float y = i < half ? -to_float(x[i + half]) : to_float(x[i - half]);
  return round_to<E>(__fadd_rn(round_to<E>(__fmul_rn(f, to_float(cos[i]))), round_to<E>(__fmul_rn(y, to_float(sin[i])))));
}

template <class E>
struct WindowShared {
  float *q, *score, *out;                                  // [r][K], [r][back + 1], [r][V]
  E* tile;                                                 // [kRows][max(K, V)]; then the token's own row
  static __host__ __device__ int64_t floats(const WindowParams& p) { return int64_t(p.HQ / p.H) * (p.K + p.back + 1 + p.V); }
  static int64_t bytes(const WindowParams& p) { return floats(p) * 4 + int64_t(kRows + 1) * std::max(p.K, p.V) * int64_t(sizeof(E)); }
  __device__ WindowShared(const WindowParams& p, char* memory) {
    const int r = p.HQ / p.H;
    q = reinterpret_cast<float*>(memory), score = q + r * p.K, out = score + r * (p.back + 1);
    tile = reinterpret_cast<E*>(out + r * p.V);
  }
};

// A block has one row of the batch and one key/value head, for all query heads of its group. Rows are moved a tile at a time: a tile is in shared memory before
// the one in front of it is written over.
template <class E>
__global__ __launch_bounds__(kThreads) void window_step_kernel(const __grid_constant__ WindowParams p) {
  extern __shared__ __align__(16) char memory[];
  const WindowShared<E> m(p, memory);
  const int64_t b = blockIdx.x / p.H, head = blockIdx.x % p.H;
  const int r = p.HQ / p.H, K = p.K, V = p.V, back = p.back, W = back + 1, warp = threadIdx.x / 32, lane = lane_id();
  E* o = static_cast<E*>(p.o.ptr) + b * p.o.batch + head * r * p.o.head;
  if (p.mask && !p.mask[b]) {
    for (int e = threadIdx.x; e < r * V; e += kThreads) o[e / V * p.o.head + e % V] = from_float<E>(0.f);
    return;
  }
  const int64_t held = p.filled[b];
  const int filled = held < 0 ? 0 : held > back ? back : static_cast<int>(held), first = back - filled;
  const E* cos = static_cast<const E*>(p.cos.ptr) + b * p.cos.batch;
  const E* sin = static_cast<const E*>(p.sin.ptr) + b * p.sin.batch;
  for (int e = threadIdx.x; e < r * K; e += kThreads) {
    const E* q = static_cast<const E*>(p.q.ptr) + b * p.q.batch + (head * r + e / K) * p.q.head;
    m.q[e] = rotated(q, e % K, p, cos, sin) * static_cast<float>(p.scale);
  }
  for (int e = threadIdx.x; e < r * V; e += kThreads) m.out[e] = 0.f;

  // Rows first .. back - 1 of `held`, which move one up, then `own`, which takes the last place; use(row, i): row is row i of the window.
  auto walk = [&](E* held, int64_t ld, int D, auto&& own, auto&& use) {
    for (int j = first; j < W; j += kRows) {
      const int count = min(kRows, W - j);
      __syncthreads();
      for (int e = threadIdx.x; e < count * D; e += kThreads) {
        const int i = j + e / D;
        m.tile[e] = i < back ? held[i * ld + e % D] : own(e % D);
      }
      __syncthreads();
      for (int e = threadIdx.x; e < count * D; e += kThreads)
        if (const int i = j + e / D; i > 0) held[(i - 1) * ld + e % D] = m.tile[e];
      use(j, count);
    }
    __syncthreads();
  };

  const E* k = static_cast<const E*>(p.k.ptr) + b * p.k.batch + head * p.k.head;
  walk(
      static_cast<E*>(p.keys) + (b * back * p.H + head) * K, int64_t(p.H) * K, K, [&](int i) { return from_float<E>(rotated(k, i, p, cos, sin)); },
      [&](int j, int count) {
        for (int e = warp; e < count * r; e += kWarps) {
          const int i = e / r, h = e % r;
          float sum = 0.f;
          for (int c = lane; c < K; c += 32) sum = fmaf(m.q[h * K + c], to_float(m.tile[i * K + c]), sum);
          for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
          if (lane == 0) m.score[h * W + j + i] = sum;
        }
      });
  for (int h = warp; h < r; h += kWarps) {
    float* score = m.score + h * W;
    float top = -INFINITY, total = 0.f;
    for (int i = first + lane; i < W; i += 32) top = fmaxf(top, score[i]);
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    for (int i = first + lane; i < W; i += 32) total += score[i] = expf(score[i] - top);
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
    for (int i = first + lane; i < W; i += 32) score[i] /= total;
  }
  const E* v = static_cast<const E*>(p.v.ptr) + b * p.v.batch + head * p.v.head;
  walk(
      static_cast<E*>(p.values) + (b * back * p.H + head) * V, int64_t(p.H) * V, V, [&](int i) { return v[i]; },
      [&](int j, int count) {
        for (int e = threadIdx.x; e < r * V; e += kThreads) {
          const float* score = m.score + e / V * W + j;
          float sum = m.out[e];
          for (int i = 0; i < count; ++i) sum = fmaf(score[i], to_float(m.tile[i * V + e % V]), sum);
          m.out[e] = sum;
        }
      });
  for (int e = threadIdx.x; e < r * V; e += kThreads) o[e / V * p.o.head + e % V] = from_float<E>(m.out[e]);
}

// Apart, because all heads of a row read `filled`.
__global__ __launch_bounds__(kThreads) void count_kernel(const __grid_constant__ WindowParams p) {
  const int64_t b = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (b < p.B && (!p.mask || p.mask[b])) p.filled[b] = min(p.filled[b] + 1, int64_t(p.back));
}

template <class F>
void by_dtype(DType t, F&& f) {
  if (t == DType::f32) f.template operator()<float>();
  else if (t == DType::bf16) f.template operator()<bf16>();
  else f.template operator()<half>();
}

}  // namespace

void conv_step(const ConvParams& p) {
  require_device();
  by_dtype(p.x.dtype, [&]<class E>() { launch("conv_step", conv_step_kernel<E>, ceil_div(p.B * p.D, kThreads), kThreads, 0, p.stream, p); });
}

int64_t window_step_shared(const WindowParams& p) {
  int64_t bytes = 0;
  by_dtype(p.q.dtype, [&]<class E>() { bytes = WindowShared<E>::bytes(p); });
  return bytes;
}

void window_step(const WindowParams& p) {
  require_device();
  by_dtype(p.q.dtype, [&]<class E>() { launch("window_step", window_step_kernel<E>, p.B * p.H, kThreads, WindowShared<E>::bytes(p), p.stream, p); });
  launch("window_count", count_kernel, ceil_div(p.B, kThreads), kThreads, 0, p.stream, p);
}

}  // namespace gsa::cuda
