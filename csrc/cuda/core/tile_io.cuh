// Accumulators to memory, and what the products of a chunk leave for later kernels.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

// Shared memory of the kernels that work on the rows of one chunk of one query head (chunk_output, backward_queries): gates, S, and a ring of two stages,
// each with slices of the rows of two matrices x, y [C][DS] and of a state h [DS][MP]. While one is worked on the next one is on its way.
// Slow blocks need scratch between the passes: in 16 bit it is the stage that nothing is on its way to. fp32 operands live in scratch while slices stream
// by, so there it has room of its own.
template <class Cfg>
struct RowsShared {
  using E = typename Cfg::E;
  static constexpr bool needs_S = !(Cfg::fp32 && Cfg::NB == 1);
  static constexpr int64_t xy = arena(Cfg::C * Cfg::ldd, sizeof(E)), slices = 2 * xy + arena(Cfg::DS * Cfg::ldm, sizeof(E));
  static constexpr int64_t scratch = arena(Cfg::NB * (Triangle<Cfg>::x_floats + Triangle<Cfg>::y_floats), 4);
  static constexpr int64_t stage = Cfg::fp32 || slices > scratch ? slices : scratch;
  static constexpr int64_t bytes = Gates<Cfg>::bytes + (needs_S ? arena(Cfg::C * Cfg::lds, 4) : 0) + 2 * stage + (Cfg::fp32 ? scratch : 0);
  static_assert(bytes <= (Cfg::small || Cfg::fp32 ? 99 : 113) * 1024);
};

// The ring, and the order in which slices come: pass after pass, each along the columns of x and y and the rows of h.
template <class Cfg>
struct Ring {
  using E = typename Cfg::E;
  using Shared = RowsShared<Cfg>;
  struct Slice {
    E *x, *y, *h;
  };
  char* base;
  int pass = 0, d = 0, sent = 0;                          // of the next one to be sent off
  TileLoader<Cfg::threads, E, Cfg::C, Cfg::DS> x, y;
  TileLoader<Cfg::threads, E, Cfg::DS, Cfg::MP> h;

  __device__ char* stage(int i) const { return base + (i & 1) * Shared::stage; }
  __device__ Slice slice(int i) const {
    char* s = stage(i);
    return {reinterpret_cast<E*>(s), reinterpret_cast<E*>(s + Shared::xy), reinterpret_cast<E*>(s + 2 * Shared::xy)};
  }
  // What slow blocks use between the passes, after a barrier: x, then y, for each warp.
  __device__ float* x_scratch(int warp) const {
    char* s = Cfg::fp32 ? base + 2 * Shared::stage : stage(sent);
    return reinterpret_cast<float*>(s) + warp * Triangle<Cfg>::x_floats;
  }
  __device__ float* y_scratch(int warp) const { return x_scratch(0) + Cfg::NB * Triangle<Cfg>::x_floats + warp * Triangle<Cfg>::y_floats; }

  // Sends off the next slice, if there is one. pass_of(i): {x, y, h: Rows; D; rows; M} of pass i; x.ptr == nullptr: pass without x.
  template <class PassOf>
  __device__ void send(int passes, PassOf&& pass_of) {
    if (pass < passes) {
      const Slice s = slice(sent);
      const auto now = pass_of(pass);
      const int left = now.D - d;
      if (now.x.ptr) x.load(s.x, Cfg::ldd, d, now.rows, left, [&] { return now.x; });
      y.load(s.y, Cfg::ldd, d, now.rows, left, [&] { return now.y; });
      h.load(s.h, Cfg::ldm, int64_t(d) * now.M, left, now.M, [&] { return now.h; });
      ++sent;
      if ((d += Cfg::DS) >= now.D) {
        d = 0, ++pass;
        if (pass < passes) open(pass_of(pass));
      }
    }
    cp_async_commit();
  }
  template <class Pass>
  __device__ void open(const Pass& now) {
    x.open(now.x, now.D), y.open(now.y, now.D), h.open(now.h, now.M);
  }
  // The next slice, complete; the one after it is sent off.
  template <class PassOf>
  __device__ Slice next(int passes, PassOf&& pass_of) {
    cp_async_wait_for<0>();
    __syncthreads();
    const Slice s = slice(sent - 1);
    send(passes, pass_of);
    return s;
  }
};

// One pass of a ring.
struct Pass {
  Rows x, y, h;
  int D, rows, M;
};

// acc [16 x 8 NT] to rows i0 + .. of a head, columns d0 .. of D, times scale.
template <class E, int NT>
__device__ inline void store_rows(const Rows& dst, const float (*acc)[4], int i0, int rows, int d0, int D, float scale = 1.f) {
  const int64_t esize = sizeof(E) == 2 ? 2 : element_size(dst.dtype);
  const int i = i0 + frag_row(), d = d0 + frag_col();
  char* p = static_cast<char*>(const_cast<void*>(dst.ptr)) + (dst.at(i) + d) * esize;
  const int64_t down = 8 * dst.step * esize;
  const bool even = ((dst.base | dst.step) & 1) == 0 && D % 2 == 0 && (sizeof(E) == 2 || dst.dtype == DType::f32);
  if (even) {
#pragma unroll
    for (int h = 0; h < 2; ++h, p += down)
#pragma unroll
      for (int t = 0; t < NT; ++t)
        if (i + 8 * h < rows && d + t * 8 < D) store2<E>(reinterpret_cast<E*>(p) + t * 8, acc[t][2 * h] * scale, acc[t][2 * h + 1] * scale);
  } else {
    const DType type = sizeof(E) == 4 ? dst.dtype : std::is_same_v<E, bf16> ? DType::bf16 : DType::f16;
#pragma unroll
    for (int h = 0; h < 2; ++h, p += down)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (i + 8 * h < rows && d + t * 8 + e < D) store_as(p, t * 8 + e, type, acc[t][2 * h + e] * scale);
  }
}

// acc [16 x 8 NT] to rows i0 .. of a dense fp32 matrix [..][ld] of the workspace, ld even, no row or column missing.
template <int NT>
__device__ inline void store_dense(float* dst, int64_t ld, const float (*acc)[4], int i0) {
  float* p = dst + (i0 + frag_row()) * ld + frag_col();
#pragma unroll
  for (int h = 0; h < 2; ++h, p += 8 * ld)
#pragma unroll
    for (int t = 0; t < NT; ++t) *reinterpret_cast<float2*>(p + t * 8) = make_float2(acc[t][2 * h], acc[t][2 * h + 1]);
}

// acc [16 x 8 NT] times scale to a dense matrix of E, in 16 bit with what rounding drops in `low` (nullptr: dropped).
template <class E, int NT>
__device__ inline void store_triangle(E* dst, E* low, int ld, const float (*acc)[4], float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = (frag_row() + 8 * h) * ld + frag_col();
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      const float x = acc[t][2 * h] * scale, y = acc[t][2 * h + 1] * scale;
      store2<E>(dst + at + t * 8, x, y);
      if (sizeof(E) == 2 && low) store2<E>(low + at + t * 8, x - to_float(from_float<E>(x)), y - to_float(from_float<E>(y)));
    }
  }
}

template <bool exact>
__device__ inline float exp_of(float x) {
  return exact ? expf(x) : fast_exp2(x * 1.4426950408889634f);
}

// Softmax over the slots of each row; columns >= M get probability 0. Returns nothing but p, in place.
template <class Cfg>
__device__ inline void softmax_rows(float (&o1)[Cfg::MT][4], int M) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int t = 0; t < Cfg::MT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        if (t * 8 + frag_col() + (e & 1) >= M) o1[t][e] = -INFINITY;
        top = fmaxf(top, o1[t][e]);
      }
    top = quad_max(top);
#pragma unroll
    for (int t = 0; t < Cfg::MT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        o1[t][e] = exp_of<Cfg::fp32>(o1[t][e] - top);
        sum += o1[t][e];
      }
    const float inv = 1.f / quad_sum(sum);
#pragma unroll
    for (int t = 0; t < Cfg::MT; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) o1[t][e] *= inv;
  }
}

// sum_m y_im s_im of the warp's rows: the diagonal of contract().
template <class Cfg>
__device__ inline void diagonal_of(const Gates<Cfg>& gates, const float* S, const float (&y)[Cfg::MT][4], int warp, float (&d)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float s[Cfg::MT][2], sum = 0.f;
    gates.row_writes(warp * 16 + frag_row() + 8 * h, S, s);
#pragma unroll
    for (int t = 0; t < Cfg::MT; ++t) sum += y[t][2 * h] * s[t][0] + y[t][2 * h + 1] * s[t][1];
    d[h] = quad_sum(sum);
  }
}

// acc += d_i s_im: the diagonal of apply().
template <class Cfg>
__device__ inline void add_diagonal_writes(const Gates<Cfg>& gates, const float* S, float (&acc)[Cfg::MT][4], const float (&d)[2], int warp) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float s[Cfg::MT][2];
    gates.row_writes(warp * 16 + frag_row() + 8 * h, S, s);
#pragma unroll
    for (int t = 0; t < Cfg::MT; ++t) acc[t][2 * h] += d[h] * s[t][0], acc[t][2 * h + 1] += d[h] * s[t][1];
  }
}

}  // namespace gsa::cuda
