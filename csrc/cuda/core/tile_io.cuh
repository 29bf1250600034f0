// Accumulators to memory, and what the products of a chunk leave for later kernels.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

// Shared memory of the kernels that work on the rows of one chunk of one query head (chunk_output, backward_queries): gates, S, and a ring of two stages,
// each with slices of the rows of two matrices x, y [C][DS] and of a state h [DS][MP]. While one is worked on the next one is on its way.
// Slow blocks need scratch between the passes: the stage that nothing is on its way to. Operands of exact arithmetic live in scratch while slices stream by, so
// there it has room of its own.
template <class Cfg>
struct RowsShared {
  using E = typename Cfg::E;
  static constexpr bool needs_S = !(Cfg::exact && Cfg::NB == 1);
  static constexpr int64_t xy = arena(Cfg::C * Cfg::ldd, sizeof(E)), slices = 2 * xy + arena(Cfg::DS * Cfg::ldm, sizeof(E));
  static constexpr int64_t scratch = arena(Cfg::NB * (Triangle<Cfg>::x_floats + Triangle<Cfg>::y_floats), 4);
  static constexpr int64_t stage = Cfg::exact || slices > scratch ? slices : scratch;
  static constexpr int64_t bytes = Gates<Cfg>::bytes + (needs_S ? arena(Cfg::C * Cfg::lds, 4) : 0) + 2 * stage + (Cfg::exact ? scratch : 0);
  static_assert(bytes <= (Cfg::small || Cfg::exact ? 99 : 113) * 1024);
};

// One pass of a ring: columns 0 .. D - 1 of `rows` rows of x and y, rows 0 .. D - 1 of h, which has M columns. x.ptr == nullptr: pass without x.
struct Pass {
  Rows x, y, h;
  int D, rows, M;
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
    char* s = Cfg::exact ? base + 2 * Shared::stage : stage(sent);
    return reinterpret_cast<float*>(s) + warp * Triangle<Cfg>::x_floats;
  }
  __device__ float* y_scratch(int warp) const { return x_scratch(0) + Cfg::NB * Triangle<Cfg>::x_floats + warp * Triangle<Cfg>::y_floats; }

  // Sends off the next slice, if there is one. pass_of(i): the Pass number i.
  template <class PassOf>
  __device__ void send(int passes, PassOf&& pass_of) {
    if (pass < passes) {
      const Slice s = slice(sent);
      const Pass now = pass_of(pass);
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
  __device__ void open(const Pass& now) { x.open(now.x, now.D), y.open(now.y, now.D), h.open(now.h, now.M); }
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

// Two words of a row, of tiles t and t + 1, to 8 bytes side by side: an even lane gets both of tile t, an odd lane both of tile t + 1, so that the four
// lanes of a row write one whole sector at a time. The words go to column paired_column() of the 16.
__device__ inline uint2 pair_words(uint32_t first, uint32_t second) {
  const bool odd = lane_id() & 1;
  const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  return odd ? make_uint2(got, second) : make_uint2(first, got);
}
__device__ inline int paired_column() { return (lane_id() & 1) * 6 + frag_col(); }

// acc [16 x 8 NT] times scale to a matrix of 16-bit E in memory, `down` elements from row to row, rows and columns below `rows`, `cols` (a multiple of 4);
// everything aligned to 8 bytes.
template <class E, int NT>
__device__ inline void store_paired(E* dst, int64_t down, const float (*acc)[4], int rows, int cols, float scale = 1.f) {
  static_assert(NT % 2 == 0);
  const int i = frag_row(), d = paired_column();
  E* p = dst + i * down + d;
#pragma unroll
  for (int h = 0; h < 2; ++h, p += 8 * down)
#pragma unroll
    for (int t = 0; t < NT; t += 2) {
      const uint2 v = pair_words(pack<E>(acc[t][2 * h] * scale, acc[t][2 * h + 1] * scale), pack<E>(acc[t + 1][2 * h] * scale, acc[t + 1][2 * h + 1] * scale));
      if (i + 8 * h < rows && d + t * 8 < cols) *reinterpret_cast<uint2*>(p + t * 8) = v;
    }
}

// The general case of store_rows: any alignment.
template <class E, int NT>
__device__ inline void store_elements(Rows dst, const float (*acc)[4], int i0, int rows, int d0, int D, float scale) {
  const DType type = sizeof(E) == 4 ? dst.dtype : std::is_same_v<E, bf16> ? DType::bf16 : DType::f16;
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + frag_row() + 8 * (e >> 1), d = d0 + frag_col() + t * 8 + (e & 1);
      if (i < rows && d < D) store_as(const_cast<void*>(dst.ptr), dst.at(i) + d, type, acc[t][e] * scale);
    }
}

template <class E, int NT>
__device__ __noinline__ void store_rows_slowly(Rows dst, const float (*acc)[4], int i0, int rows, int d0, int D, float scale) {
  store_elements<E, NT>(dst, acc, i0, rows, d0, D, scale);
}

// acc [16 x 8 NT] to rows i0 + .. of a head, columns d0 .. of D, times scale. paired: whole sectors, for a few registers more.
template <class E, int NT, bool paired = true>
__device__ inline void store_rows(const Rows& dst, const float (*acc)[4], int i0, int rows, int d0, int D, float scale = 1.f) {
  const auto all = reinterpret_cast<uintptr_t>(dst.ptr) / sizeof(E) | dst.base | dst.step | D;
  if constexpr (sizeof(E) == 2 && paired) {
    if ((all & 3) == 0) return store_paired<E, NT>(static_cast<E*>(const_cast<void*>(dst.ptr)) + dst.at(i0) + d0, dst.step, acc, rows - i0, D - d0, scale);
  } else if ((sizeof(E) == 2 || dst.dtype == DType::f32) && (all & 1) == 0) {
    const int i = i0 + frag_row(), d = d0 + frag_col();
    E* p = static_cast<E*>(const_cast<void*>(dst.ptr)) + dst.at(i) + d;
#pragma unroll
    for (int h = 0; h < 2; ++h, p += 8 * dst.step)
#pragma unroll
      for (int t = 0; t < NT; ++t)
        if (i + 8 * h < rows && d + t * 8 < D) store2<E>(p + t * 8, acc[t][2 * h] * scale, acc[t][2 * h + 1] * scale);
    return;
  }
  if constexpr (paired) {
    float copy[NT][4];
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) copy[t][e] = acc[t][e];
    store_rows_slowly<E, NT>(dst, copy, i0, rows, d0, D, scale);
  } else {
    store_elements<E, NT>(dst, acc, i0, rows, d0, D, scale);
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

// acc [16 x 8 NT] to rows 0 .. 15 of a dense matrix of E in the workspace, nothing missing.
template <class E, int NT>
__device__ inline void store_tile(E* dst, int64_t ld, const float (*acc)[4], float scale) {
  if constexpr (sizeof(E) == 2) {
    store_paired<E, NT>(dst, ld, acc, 16, 8 * NT, scale);
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int t = 0; t < NT; ++t) store2<E>(dst + (frag_row() + 8 * h) * ld + frag_col() + t * 8, acc[t][2 * h] * scale, acc[t][2 * h + 1] * scale);
  }
}

// A lower-triangular [C x C] in the workspace: its blocks of 16 x 16 on and below the diagonal, row after row of them, each dense.
template <class Cfg>
struct Packed {
  static constexpr int blocks = Cfg::NB * (Cfg::NB + 1) / 2;
  static constexpr int64_t elements = blocks * 256;
  __device__ static int block(int I, int J) { return I * (I + 1) / 2 + J; }

  // The warp's 16 rows, times scale; in 16 bit what rounding drops goes to `low` (nullptr: is dropped).
  template <class E>
  __device__ static void store(E* dst, E* low, const float (&acc)[Cfg::CT][4], int warp, float scale = 1.f) {
#pragma unroll
    for (int J = 0; J < Cfg::NB; ++J)
      if (J <= warp) {
        const int at = block(warp, J) * 256;
        store_tile<E, 2>(dst + at, 16, acc + 2 * J, scale);
        if (sizeof(E) == 2 && low) {
          float rest[2][4];
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) rest[t][e] = acc[2 * J + t][e] * scale - to_float(from_float<E>(acc[2 * J + t][e] * scale));
          store_tile<E, 2>(low + at, 16, rest, 1.f);
        }
      }
  }
  // Sends off all of it to tile [C][ld]; what is above the diagonal's blocks stays as it is.
  template <int THREADS, class E>
  __device__ static void load(E* tile, int ld, const E* src) {
    constexpr int width = 16 / sizeof(E), across = 16 / width, pieces = 16 * across;
#pragma unroll
    for (int e = threadIdx.x; e < blocks * pieces; e += THREADS) {
      const int b = e / pieces, I = (b >= 1) + (b >= 3) + (b >= 6), J = b - I * (I + 1) / 2, i = e % pieces / across, j = e % across * width;
      cp_async16(tile + (I * 16 + i) * ld + J * 16 + j, src + e * width, true);
    }
  }
  // Sends off its 16 rows I to tile [16][ld].
  template <int THREADS>
  __device__ static void load_rows(float* tile, int ld, const float* src, int I) {
    src += block(I, 0) * 256;
    if constexpr (THREADS % 64 == 0) {                    // a block of 16 x 16 for every 64 threads
      const int e = threadIdx.x % 64, first = threadIdx.x / 64;
      src += first * 256 + e * 4, tile += e / 4 * ld + first * 16 + e % 4 * 4;
#pragma unroll
      for (int J = 0; J < Cfg::NB; J += THREADS / 64)
        if (J + first <= I) cp_async16(tile + J * 16, src + J * 256, true);
      return;
    }
    for (int e = threadIdx.x; e < (I + 1) * 64; e += THREADS) cp_async16(tile + e % 64 / 4 * ld + e / 64 * 16 + e % 4 * 4, src + e * 4, true);
  }
};

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
        o1[t][e] = exp_of<Cfg::exact>(o1[t][e] - top);
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
