// What a layer does before the op and after it, each in one pass over memory: the rotation of q and k, the log gate, the mix with a window's output.
#include <algorithm>

#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256;

template <class E, int V>
struct alignas(sizeof(E) * V) Pack {
  E x[V];
};
template <class E>
__device__ float rounded(float x) {
  return to_float(from_float<E>(x));
}

// A block has one token. A thread reads the angles of a vector of components once and turns these components of every `rows`-th head.
// x cos is rounded, then the sum, as the families' own formula in 16 bits leaves them.
template <class E, int V>
__global__ __launch_bounds__(kThreads) void rotate_kernel(const __grid_constant__ RotateParams p, int width) {
  using Vector = Pack<E, V>;
  const int64_t b = blockIdx.x / p.T, t = blockIdx.x % p.T;
  auto at = [&](const View& x) { return static_cast<E*>(x.ptr) + b * x.batch + t * x.token; };
  const E *q = at(p.q), *k = at(p.k), *cos = at(p.cos), *sin = at(p.sin);
  E *q_out = at(p.q_out), *k_out = at(p.k_out);
  auto load = [](const E* from) { return *reinterpret_cast<const Vector*>(from); };
  const int half = p.n / 2, turning = half / V, pieces = turning + (p.D - p.n) / V, heads = p.q_heads + p.k_heads;
  const int rows = blockDim.x / width, row = threadIdx.x / width;
  const float sign = p.transposed ? -1.f : 1.f;
  for (int piece = threadIdx.x % width; piece < pieces; piece += width) {
    const bool turns = piece < turning;
    const int d = turns ? piece * V : p.n + (piece - turning) * V;
    Vector c1{}, c2{}, s1{}, s2{};
    if (turns) c1 = load(cos + d), c2 = load(cos + half + d), s1 = load(sin + (p.transposed ? half : 0) + d), s2 = load(sin + (p.transposed ? 0 : half) + d);
#pragma unroll 1
    for (int head = row; head < heads; head += rows) {
      const bool is_q = head < p.q_heads;
      const E* from = (is_q ? q + head * p.q.head : k + (head - p.q_heads) * p.k.head) + d;
      E* to = (is_q ? q_out + head * p.q_out.head : k_out + (head - p.q_heads) * p.k_out.head) + d;
      if (!turns) {
        *reinterpret_cast<Vector*>(to) = load(from);
        continue;
      }
      const Vector x1 = load(from), x2 = load(from + half);
      Vector y1, y2;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float a = to_float(x1.x[e]), c = to_float(x2.x[e]);
        y1.x[e] = from_float<E>(__fadd_rn(rounded<E>(__fmul_rn(a, to_float(c1.x[e]))), -sign * __fmul_rn(c, to_float(s1.x[e]))));
        y2.x[e] = from_float<E>(__fadd_rn(rounded<E>(__fmul_rn(c, to_float(c2.x[e]))), sign * __fmul_rn(a, to_float(s2.x[e]))));
      }
      *reinterpret_cast<Vector*>(to) = y1;
      *reinterpret_cast<Vector*>(to + half) = y2;
    }
  }
}

template <class E, bool backward, int V>
__global__ __launch_bounds__(kThreads) void log_gate_kernel(const __grid_constant__ LogGateParams p) {
  using Out = std::conditional_t<backward, E, float>;
  const int64_t i = (blockIdx.x * int64_t(kThreads) + threadIdx.x) * V;
  if (i >= p.count) return;
  const Pack<E, V> x = *reinterpret_cast<const Pack<E, V>*>(static_cast<const E*>(p.logits) + i);
  Pack<float, V> d{};
  if constexpr (backward) d = *reinterpret_cast<const Pack<float, V>*>(p.d_o + i);
  const float normalizer = static_cast<float>(p.normalizer), lowest = rounded<E>(static_cast<float>(p.lowest));
  const bool token = !p.mask || p.mask[i / p.per_token];    // V elements are of one token
  Pack<Out, V> o;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float logit = to_float(x.x[e]), f = p.has_lowest && logit < lowest ? lowest : logit, z = expf(-fabsf(f));
    if constexpr (backward) {
      const bool moves = token && (!p.has_lowest || logit >= lowest);
      o.x[e] = from_float<E>(moves ? d.x[e] / normalizer * (f < 0 ? 1.f / (1.f + z) : z / (1.f + z)) : 0.f);
    } else {
      o.x[e] = !token ? 0.f : isnan(f) ? f : (fminf(f, 0.f) - log1pf(z)) / normalizer;
    }
  }
  *reinterpret_cast<Pack<Out, V>*>(static_cast<Out*>(p.o) + i) = o;
}

// A thread has V components of a slab's tokens and, in backward, sums their part of the share's cotangent for itself: the same bits every time.
template <class E, bool backward, int V>
__global__ __launch_bounds__(kThreads) void mix_kernel(const __grid_constant__ MixParams p) {
  using Vector = Pack<E, V>;
  const int64_t width = int64_t(p.heads) * p.D / V, at = blockIdx.x * int64_t(kThreads) + threadIdx.x, slab = at / width, column = at % width;
  if (slab >= p.slabs) return;
  const float share = to_float(static_cast<const E*>(p.share)[column * V / p.D]);
  const int64_t end = min(p.rows, (slab + 1) * kMixSlab);
  float sum = 0.f;
  for (int64_t row = slab * kMixSlab; row < end; ++row) {
    const int64_t i = row * width + column;
    const Vector a = static_cast<const Vector*>(p.a)[i], b = static_cast<const Vector*>(p.b)[i];
    if constexpr (backward) {
      const Vector d = static_cast<const Vector*>(p.d_o)[i];
      Vector d_a, d_b;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float f = to_float(d.x[e]);
        sum += f * (to_float(b.x[e]) - to_float(a.x[e]));
        d_a.x[e] = from_float<E>(f * (1.f - share)), d_b.x[e] = from_float<E>(f * share);
      }
      static_cast<Vector*>(p.d_a)[i] = d_a, static_cast<Vector*>(p.d_b)[i] = d_b;
    } else {
      Vector o;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float x = to_float(a.x[e]), y = to_float(b.x[e]);
        o.x[e] = from_float<E>(share < 0.5f ? x + share * (y - x) : y - (y - x) * (1.f - share));   // as torch.lerp: exact where the share is 0 or 1
      }
      static_cast<Vector*>(p.o)[i] = o;
    }
  }
  if constexpr (backward) p.d_share[at] = sum;
}

template <class F>
void of_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float());
  else if (dtype == DType::bf16) f(bf16());
  else f(half());
}

}  // namespace

void rotate(const RotateParams& p) {
  of_dtype(p.q.dtype, [&]<class E>(E) {
    auto run = [&]<int V>() {
      const int heads = p.q_heads + p.k_heads, width = std::clamp(p.n / 2 / V + (p.D - p.n) / V, 1, kThreads);
      const int turns = ceil_div(heads, std::min(heads, kThreads / width)), rows = ceil_div(heads, turns);    // as many heads for each thread
      launch("rotate", rotate_kernel<E, V>, p.B * p.T, width * rows, 0, p.stream, p, width);
    };
    constexpr int V = 16 / sizeof(E);
    bool whole = p.n / 2 % V == 0 && (p.D - p.n) % V == 0;
    for (const View& x : {p.q, p.k, p.q_out, p.k_out, p.cos, p.sin})
      whole &= reinterpret_cast<uintptr_t>(x.ptr) % 16 == 0 && (x.batch | x.token | x.head) % V == 0;
    whole ? run.template operator()<V>() : run.template operator()<1>();
  });
}

void log_gate(const LogGateParams& p) {
  of_dtype(p.dtype, [&]<class E>(E) {
    auto run = [&]<bool backward, int V>() { launch("log_gate", log_gate_kernel<E, backward, V>, ceil_div(p.count, kThreads * V), kThreads, 0, p.stream, p); };
    const bool whole = (p.mask ? p.per_token : p.count) % 4 == 0 &&
                       ((reinterpret_cast<uintptr_t>(p.logits) | reinterpret_cast<uintptr_t>(p.d_o) | reinterpret_cast<uintptr_t>(p.o)) & 15) == 0;
    if (p.d_o) whole ? run.template operator()<true, 4>() : run.template operator()<true, 1>();
    else whole ? run.template operator()<false, 4>() : run.template operator()<false, 1>();
  });
}

void mix(const MixParams& p) {
  of_dtype(p.dtype, [&]<class E>(E) {
    auto run = [&]<bool backward, int V>() {
      launch("mix", mix_kernel<E, backward, V>, ceil_div(p.slabs * (int64_t(p.heads) * p.D / V), kThreads), kThreads, 0, p.stream, p);
    };
    constexpr int V = 16 / sizeof(E);
    if (p.d_o) p.V == V ? run.template operator()<true, V>() : run.template operator()<true, 1>();
    else p.V == V ? run.template operator()<false, V>() : run.template operator()<false, 1>();
  });
}

}  // namespace gsa::cuda
