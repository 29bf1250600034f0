// Accumulators to memory, and what the products of a chunk leave for later kernels.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

// Shared memory of the kernels that work on the rows of one chunk of one query head (chunk_output, backward_queries).
template <class Cfg>
struct RowsShared {
  using E = typename Cfg::E;
  static constexpr bool needs_S = !(Cfg::fp32 && Cfg::NB == 1);
  static constexpr int64_t slices = 2 * arena(Cfg::C * Cfg::ldd, sizeof(E)) + arena(Cfg::DS * Cfg::ldm, sizeof(E));
  static constexpr int64_t y_scratch = arena(Cfg::NB * Triangle<Cfg>::y_floats, 4);
  // fp32 operands live in the scratch while slices stream by; in 16 bit they live in registers, and slices and scratch share their room.
  static constexpr int64_t region = Cfg::fp32 ? slices + y_scratch : (slices > y_scratch ? slices : y_scratch);
  static constexpr int64_t bytes = Gates<Cfg>::bytes + (needs_S ? arena(Cfg::C * Cfg::lds, 4) : 0) + arena(Cfg::NB * Triangle<Cfg>::x_floats, 4) + region;
  static_assert(bytes <= 101376, "99 KB is what every GPU from sm_80 on has");
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
