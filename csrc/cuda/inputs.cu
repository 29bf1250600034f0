// What a layer does before the op and after it, each in one pass over memory: the rotation of q and k, the log gate, the mix with a window's output, the
// output norm of silu.
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

constexpr int kRowThreads = 512, kBackwardThreads = 1024;   // at most, for a row; with more than one vector of it each, kRowThreads

// V elements as they are in memory, two in a word where they have 16 bits.
template <class E, int V>
struct Elements {
  using Word = std::conditional_t<sizeof(E) == 2 && V % 2 == 0, uint32_t, E>;
  static constexpr int each = sizeof(Word) / sizeof(E);
  Pack<Word, V / each> words;
  __device__ void get(float (&f)[V]) const {
#pragma unroll
    for (int i = 0; i < V / each; ++i)
      if constexpr (each == 2) {
        const float2 pair = unpack<E>(words.x[i]);
        f[2 * i] = pair.x, f[2 * i + 1] = pair.y;
      } else {
        f[i] = to_float(words.x[i]);
      }
  }
  __device__ void set(const float (&f)[V]) {
#pragma unroll
    for (int i = 0; i < V / each; ++i)
      if constexpr (each == 2) words.x[i] = pack<E>(f[2 * i], f[2 * i + 1]);
      else words.x[i] = from_float<E>(f[i]);
  }
  __device__ static Elements ones() {
    float f[V];
    Elements r;
#pragma unroll
    for (int e = 0; e < V; ++e) f[e] = 1.f;
    r.set(f);
    return r;
  }
};

template <class E>
__device__ float sigmoid(float x) {
  if constexpr (sizeof(E) == 4) return 1.f / (1.f + expf(-x));
  return fast_reciprocal(1.f + fast_exp2(-1.4426950408889634f * x));
}

// Over the block, the same bits in every thread. Whoever calls it again hands it other 32 floats, in turn, and needs no second barrier.
__device__ float block_sum(float x, float* shared) {
  const int lane = lane_id(), warps = blockDim.x / 32;
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  if (lane == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < warps ? shared[lane] : 0.f;
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

// A block has a row, a thread N vectors of it in registers. N = 0: rows of any width, read twice.
template <class E, int V, int N>
__global__ __launch_bounds__(kRowThreads) void silu_norm_kernel(const __grid_constant__ SiluNormParams p) {
  using Vector = Elements<E, V>;
  __shared__ float shared[32];
  const int64_t row = blockIdx.x, vectors = p.width / V;
  const Vector *from = static_cast<const Vector*>(p.o) + row * vectors, *weight = static_cast<const Vector*>(p.weight);
  Vector* to = static_cast<Vector*>(p.y) + row * vectors;
  float squares = 0.f;
  auto silu = [&](const Vector& o, float (&s)[V]) {
    o.get(s);
#pragma unroll
    for (int e = 0; e < V; ++e) s[e] *= sigmoid<E>(s[e]);
  };
  auto count = [&](const float (&s)[V]) {
#pragma unroll
    for (int e = 0; e < V; ++e) squares += s[e] * s[e];
  };
  auto finish = [&] {
    const float inverse = rsqrtf(block_sum(squares, shared) * p.share + p.eps);
    if (p.inverse && threadIdx.x == 0) p.inverse[row] = inverse;
    return inverse;
  };
  auto write = [&](int64_t i, float (&s)[V], const Vector& w, float inverse) {
    float f[V];
    Vector y;
    w.get(f);
#pragma unroll
    for (int e = 0; e < V; ++e) f[e] *= s[e] * inverse;
    y.set(f);
    to[i] = y;
  };
  if constexpr (N > 0) {
    Vector o[N]{}, w[N];
    float s[N][V];
    auto column = [](int n) { return n * blockDim.x + threadIdx.x; };
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (column(n) < vectors) o[n] = from[column(n)];
      w[n] = weight && column(n) < vectors ? weight[column(n)] : Vector::ones();
    }
#pragma unroll
    for (int n = 0; n < N; ++n) silu(o[n], s[n]), count(s[n]);
    const float inverse = finish();
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (column(n) < vectors) write(column(n), s[n], w[n], inverse);
  } else {
    float s[V];
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) silu(from[i], s), count(s);
    const float inverse = finish();
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) silu(from[i], s), write(i, s, weight ? weight[i] : Vector::ones(), inverse);
  }
}

// With x = o, g = sigmoid(x), s = x g, r = 1 / rms(s) and c the mean of d_y w s over the row: d_s = r d_y w - s r^3 c, d_o = d_s (g + s - s g), and to
// the weight's cotangent goes d_y s r. A block has every parts-th row, the next one on its way, and of what goes to the weight it keeps the sum.
template <class E, int V, int N>
__global__ __launch_bounds__(N == 1 ? kBackwardThreads : kRowThreads) void silu_norm_backward_kernel(const __grid_constant__ SiluNormParams p) {
  using Vector = Elements<E, V>;
  using Floats = Pack<float, V>;
  __shared__ float shared[2][32];
  const int64_t vectors = p.width / V, step = gridDim.x * vectors;
  const Vector *o_all = static_cast<const Vector*>(p.o), *d_all = static_cast<const Vector*>(p.d_y), *weight = static_cast<const Vector*>(p.weight);
  Floats* sums = reinterpret_cast<Floats*>(p.sums) + blockIdx.x * vectors;
  float dot = 0.f;
  int turn = 0;
  auto weights = [&](int64_t i, float (&w)[V]) { (weight && i < vectors ? weight[i] : Vector::ones()).get(w); };
  auto begin = [&](const Vector& o, const Vector& d, const float (&w)[V], float (&s)[V], float (&slope)[V]) {
    float d_y[V];
    o.get(s), d.get(d_y);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float g = sigmoid<E>(s[e]);
      s[e] *= g, slope[e] = g + (s[e] - s[e] * g), dot += d_y[e] * w[e] * s[e];
    }
  };
  auto middle = [&](float r) {
    const float c = r * (block_sum(dot, shared[turn]) * p.share) * r * r;
    turn ^= 1;
    return c;
  };
  auto end = [&](const Vector& d, const float (&w)[V], const float (&s)[V], const float (&slope)[V], float r, float c, Floats& sum) {
    float d_y[V];
    Vector d_o;
    d.get(d_y);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      d_y[e] *= r, sum.x[e] += d_y[e] * s[e];
      d_y[e] = (d_y[e] * w[e] - s[e] * c) * slope[e];
    }
    d_o.set(d_y);
    return d_o;
  };
  if constexpr (N > 0) {
    constexpr bool ahead = N == 1;                        // more would not fit into the registers
    auto column = [](int n) { return n * blockDim.x + threadIdx.x; };
    Vector o[N]{}, d[N]{};
    Floats sum[N]{};
    float r = 0.f, w[V];
    int64_t at = blockIdx.x * vectors;
    auto read = [&](int64_t row, int64_t at, Vector(&o)[N], Vector(&d)[N], float& r) {
      r = p.inverse[row + threadIdx.y];                   // + 0, or the compiler would wait for it at once, to have it in a uniform register
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (column(n) < vectors) o[n] = o_all[at + column(n)], d[n] = d_all[at + column(n)];
    };
    if constexpr (ahead) weights(column(0), w), read(blockIdx.x, at, o, d, r);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, at += step) {
      Vector next_o[N]{}, next_d[N]{};
      float next_r = 0.f, s[N][V], slope[N][V];
      if constexpr (!ahead) read(row, at, o, d, r);
      else if (row + gridDim.x < p.rows) read(row + gridDim.x, at + step, next_o, next_d, next_r);
      dot = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if constexpr (!ahead) weights(column(n), w);
        begin(o[n], d[n], w, s[n], slope[n]);
      }
      const float c = middle(r);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if constexpr (!ahead) weights(column(n), w);
        const Vector d_o = end(d[n], w, s[n], slope[n], r, c, sum[n]);
        if (column(n) < vectors) static_cast<Vector*>(p.d_o)[at + column(n)] = d_o;
      }
      if constexpr (ahead) o[0] = next_o[0], d[0] = next_d[0], r = next_r;
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (p.sums && column(n) < vectors) sums[column(n)] = sum[n];
  } else {
    float w[V], s[V], slope[V];
    int64_t at = blockIdx.x * vectors;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, at += step) {
      dot = 0.f;
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) weights(i, w), begin(o_all[at + i], d_all[at + i], w, s, slope);
      const float r = p.inverse[row], c = middle(r);
      for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        const Vector d = d_all[at + i];
        Floats sum = p.sums && row != blockIdx.x ? sums[i] : Floats{};
        weights(i, w), begin(o_all[at + i], d, w, s, slope);
        static_cast<Vector*>(p.d_o)[at + i] = end(d, w, s, slope, r, c, sum);
        if (p.sums) sums[i] = sum;
      }
    }
  }
}

// d_weight from the blocks' sums: 32 columns a block, 32 threads each.
template <class E>
__global__ __launch_bounds__(1024) void silu_norm_weight_kernel(const __grid_constant__ SiluNormParams p) {
  __shared__ float shared[32][33];
  const int64_t column = blockIdx.x * int64_t(32) + threadIdx.x % 32;
  const int first = threadIdx.x / 32;
  float sum = 0.f;
  if (column < p.width) {
#pragma unroll 8
    for (int64_t part = first; part < p.parts; part += 32) sum += p.sums[part * p.width + column];
  }
  shared[first][threadIdx.x % 32] = sum;
  __syncthreads();
  sum = shared[threadIdx.x % 32][first];
#pragma unroll
  for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  const int64_t mine = blockIdx.x * int64_t(32) + first;
  if (threadIdx.x % 32 == 0 && mine < p.width) static_cast<E*>(p.d_weight)[mine] = from_float<E>(sum);
}

template <class F>
void of_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float());
  else if (dtype == DType::bf16) f(bf16());
  else f(half());
}

// f<E, V, N>(threads): the kernel for such rows; up to `single` vectors a thread has one.
template <int single, class F>
void of_row(const SiluNormParams& p, F&& f) {
  of_dtype(p.dtype, [&]<class E>(E) {
    constexpr int V = 16 / sizeof(E);
    bool whole = p.width % V == 0;
    for (const void* x : {p.o, p.weight, p.d_y, static_cast<const void*>(p.y), static_cast<const void*>(p.d_o)})
      whole &= reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const int64_t vectors = whole ? p.width / V : p.width;
    auto run = [&]<int W, int N>() {
      const int64_t warps = ceil_div(vectors, 32 * std::max(N, 1));
      f.template operator()<E, W, N>(static_cast<int>(32 * std::min<int64_t>(warps, (N == 1 ? single : kRowThreads) / 32)));
    };
    if (!whole) run.template operator()<1, 0>();
    else if (vectors <= single) run.template operator()<V, 1>();
    else if (vectors <= 2 * kRowThreads) run.template operator()<V, (2 * kRowThreads > single ? 2 : 0)>();
    else if (vectors <= 4 * kRowThreads) run.template operator()<V, V == 4 ? 4 : 0>();
    else run.template operator()<V, 0>();
  });
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

void silu_norm(const SiluNormParams& p) {
  of_row<kRowThreads / 2>(p, [&]<class E, int V, int N>(int threads) { launch("silu_norm", silu_norm_kernel<E, V, N>, p.rows, threads, 0, p.stream, p); });
}

// As many blocks as the device has at a time.
int64_t silu_norm_parts(const SiluNormParams& p) {
  int device = 0, multiprocessors = 0, blocks = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  of_row<kBackwardThreads>(p, [&]<class E, int V, int N>(int threads) {
    check_launch(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, silu_norm_backward_kernel<E, V, N>, threads, 0), "silu_norm_backward");
  });
  return std::min(p.rows, int64_t(multiprocessors) * std::max(blocks, 1));
}

void silu_norm_backward(const SiluNormParams& p) {
  of_row<kBackwardThreads>(
      p, [&]<class E, int V, int N>(int threads) { launch("silu_norm_backward", silu_norm_backward_kernel<E, V, N>, p.parts, threads, 0, p.stream, p); });
  if (!p.sums) return;
  of_dtype(p.dtype, [&]<class E>(E) { launch("silu_norm_backward", silu_norm_weight_kernel<E>, ceil_div(p.width, 32), 1024, 0, p.stream, p); });
}

}  // namespace gsa::cuda
