// What the chunk kernels share: which tokens a block works on, tiles in shared memory, and the gates of a chunk.
//
// Gates. A chunk of C tokens is cut into blocks of 16 rows. With a_t = exp(g_t), for row i of block I (start i0, end i1) and slot m:
//     U_i = a_{i0} ... a_i                 decay from the block's start            lambda_I = a_{i0} ... a_{i1} = U_{i1}
//     W_i = a_{i+1} ... a_{i1}             decay to the block's end
// so that for j in an earlier block J < I:  exp(G_i - G_j) = U_i lambda_{I-1} ... lambda_{J+1} W_j, all factors <= 1: nothing can overflow, and
// sums over J are Horner schemes in lambda over the tile S = s W. Inside one block exp(G_i - G_j) = W_j / W_i when lambda > smallest for every slot (a
// "fast" block: tensor cores, rows scaled by 1 / W_i); otherwise ("slow" block: strong gates, resets) the 16 x 16 products are done exactly in fp32
// from the a_t themselves, and rows are scaled by U_i. Decays are products of a_t, not exponentials of sums: their error does not grow with the exponent.
#pragma once
#include <type_traits>

#include "launch.cuh"
#include "mma.cuh"

namespace gsa::cuda {

// E: type of the tiles of inputs and states. Products with decays (S, p U) have fp32 tiles, in TF32 on the tensor cores when E has 16 bits: at 8 bits
// their rounding alone would put o, dq, dv and dg above the accuracy that the op promises. fp32 tiles are multiplied in TF32 where `tf32`, else exactly.
// MP: slots, padded. C: tokens per chunk. DS: columns of K or V in shared memory at a time.
template <class E_, int MP_, int C_, int DS_, bool tf32 = false>
struct Config {
  using E = E_;
  using A = std::conditional_t<tf32, Tf32Inputs, Arith<E>>;
  static constexpr int MP = MP_, C = C_, DS = DS_;
  static constexpr bool fp32 = sizeof(E) == 4, exact = fp32 && !tf32;
  using X = std::conditional_t<exact, Arith<float>, Tf32>;
  static constexpr int NB = C / 16;                       // row blocks = warps of the chunk kernels
  static constexpr int threads = NB * 32;
  static constexpr int MT = MP / 8, CT = C / 8, DT = DS / 8;
  static constexpr int pad = A::pad;
  static constexpr int ldm = MP + A::state_pad, ldd = DS + pad;     // row strides of [..][MP], [..][DS] tiles of E
  static constexpr int ldu = MP + 8;                      // of fp32 [..][MP] tiles read as accumulators
  static constexpr int lds = MP + 4, ldx = C + 4;         // of fp32 [..][MP], [..][C] tiles that X reads
  static constexpr int keys_split = exact || MP == 64 ? 1 : 2;  // warps of backward_keys that share 16 rows, each with its part of the columns
  static constexpr bool small = !exact && DS * sizeof(E) == 32; // shared memory below 99 KB at any price
  static constexpr int SC = exact ? MP : small ? 16 : 32;       // slots that a slow block's scratch holds at a time
  static constexpr int blocks_per_sm = exact ? 1 : MP == 64 ? 3 : MP == 128 ? 2 : 1;  // of the chunk kernels, that registers must allow
  static constexpr float smallest = exact ? 2.f : 1e-26f;       // exact: every block is "slow"
};

template <class Cfg>
constexpr DType tile_dtype() {
  return Cfg::fp32 ? DType::f32 : std::is_same_v<typename Cfg::E, bf16> ? DType::bf16 : DType::f16;
}

struct Sequence {                                         // of padding: no token
  int64_t n, begin, end, chunks, slot;                    // slot of its first chunk
  __device__ int64_t length() const { return end - begin; }
};

__device__ inline int64_t bound(const Params& p, int64_t n) {
  const int64_t x = p.cu_seqlens_64 ? static_cast<const int64_t*>(p.cu_seqlens)[n] : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return min(max(x, int64_t(0)), p.T);                    // contents are not trusted: no token outside the tensors is ever addressed
}

// The row that sequence n has in the states, or -1: padding, which has none.
template <class P>
__device__ inline int64_t state_row(const P& p, int64_t n) {
  if (!p.state_indices) return n;
  const int64_t row = p.indices_64 ? static_cast<const int64_t*>(p.state_indices)[n] : static_cast<const int32_t*>(p.state_indices)[n];
  return row >= 0 && row < p.P ? row : -1;
}

// pool = false: there is no pool, nothing is padding.
template <bool pool = true>
__device__ inline Sequence sequence(const Params& p, int64_t n, int C) {
  Sequence s;
  s.n = n;
  if (p.cu_seqlens) {
    s.begin = bound(p, n);
    s.end = max(bound(p, n + 1), s.begin);
  } else {
    s.begin = 0, s.end = p.T;
  }
  if constexpr (pool)
    if (state_row(p, n) < 0) s.end = s.begin;
  s.chunks = (s.length() + C - 1) / C;
  s.slot = boundary_slot(p.cu_seqlens != nullptr, s.begin, p.T, n, C);
  return s;
}

// The i-th of several segments of `chunks` chunks each, a sequence of its own.
__device__ inline Sequence part(Sequence s, int64_t i, int64_t chunks, int C) {
  s.slot += i * chunks;
  s.chunks = max(min(s.chunks - i * chunks, chunks), int64_t(0));
  s.begin += i * chunks * C;
  s.end = min(s.end, s.begin + chunks * C);
  return s;
}

// The chunk of a boundary slot. False for slots that belong to none.
struct Chunk {
  Sequence seq;
  int64_t index, slot;
  int length;                                             // tokens, 1 .. C
  int64_t first;                                          // position of its first token
  int step;                                               // +1, or -1 in reverse
  int64_t batch;
  __device__ int64_t token(int i) const { return first + i * step; }
  __device__ void select(const Params& p, int64_t c, int C) {
    index = c;
    slot = seq.slot + c;
    const int64_t left = seq.length() - c * C;
    length = static_cast<int>(left < C ? left : C);
    first = p.reverse ? seq.end - 1 - c * C : seq.begin + c * C;
    step = p.reverse ? -1 : 1;
    batch = p.cu_seqlens ? 0 : seq.n;
  }
};

// The i-th of a sequence, which may lie in shared memory: registers that hold it over a loop would be spilled.
__device__ inline Chunk chunk_of(const Params& p, const Sequence& s, int64_t i, int C) {
  Chunk c;
  c.seq = s;
  c.select(p, i, C);
  return c;
}

__device__ inline bool find_chunk(const Params& p, int64_t slot, int C, Chunk& c) {
  int64_t n;
  if (p.cu_seqlens) {
    int64_t lo = 0, hi = p.N;                             // the last n whose first slot is <= slot
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      if (first_slot(bound(p, mid), mid, C) <= slot) lo = mid;
      else hi = mid;
    }
    n = lo;
  } else {
    n = static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.T / C + 2);   // a block each: 31 bits
  }
  c.seq = sequence(p, n, C);
  const int64_t i = slot - c.seq.slot;
  if (i < 0 || i >= c.seq.chunks) return false;
  c.select(p, i, C);
  return true;
}

__device__ inline int element_size(DType t) { return t == DType::f32 ? 4 : 2; }
__device__ inline float load_as_float(const void* p, int64_t i, DType t) {
  return t == DType::f32    ? static_cast<const float*>(p)[i]
         : t == DType::bf16 ? to_float(static_cast<const bf16*>(p)[i])
                            : to_float(static_cast<const half*>(p)[i]);
}
__device__ inline void store_as(void* p, int64_t i, DType t, float x) {
  if (t == DType::f32) static_cast<float*>(p)[i] = x;
  else if (t == DType::bf16) static_cast<bf16*>(p)[i] = from_float<bf16>(x);
  else static_cast<half*>(p)[i] = from_float<half>(x);
}

// f(states, typed): those of Params.
template <class Void, class F>
__device__ __forceinline__ void with_states(Void* states, DType t, F&& f) {
  using Narrow = std::conditional_t<std::is_const_v<Void>, const bf16, bf16>;
  using Wide = std::conditional_t<std::is_const_v<Void>, const float, float>;
  if (!states) return;
  if (t == DType::bf16) f(static_cast<Narrow*>(states));
  else f(static_cast<Wide*>(states));
}
template <class T>
__device__ inline void store_rounded(T& to, float x) {
  to = from_float<T>(x);
}

// o of tokens first, first + 1, ... (`count` of them, all if -1) of sequence n, if it is padding, for one query head: 0.
__device__ inline void zero_padding(const ForwardParams& p, int64_t n, int64_t q_head, int64_t first = 0, int64_t count = -1) {
  if (state_row(p, n) >= 0) return;
  const int64_t begin = p.cu_seqlens ? bound(p, n) : 0, end = p.cu_seqlens ? bound(p, n + 1) : p.T, batch = p.cu_seqlens ? 0 : n;
  const int64_t last = count < 0 ? end : min(end, begin + first + count);
  for (int64_t t = begin + max(first, int64_t(0)); t < last; ++t)
    for (int v = threadIdx.x; v < p.V; v += blockDim.x) store_as(p.o.ptr, batch * p.o.batch + t * p.o.token + q_head * p.o.head + v, p.o.dtype, 0.f);
}

// Rows of one head: row i is at ptr + (base + i * step) elements.
struct Rows {
  const void* ptr;
  int64_t base, step;
  DType dtype;
  __device__ int64_t at(int i) const { return base + i * step; }
};
__device__ inline Rows rows_of(const View& x, const Chunk& c, int64_t head) {
  return {x.ptr, c.batch * x.batch + c.first * x.token + head * x.head, c.step * x.token, x.dtype};
}
template <class T>
__device__ inline Rows rows_of(const T* p, int64_t step, DType dtype) {
  return {p, 0, step, dtype};
}

__device__ inline void cp_async16(void* dst, const void* src, bool valid) {
  const uint32_t d = static_cast<uint32_t>(__cvta_generic_to_shared(dst));
  const int bytes = valid ? 16 : 0;                       // 0: the 16 bytes are zeroed
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(d), "l"(src), "r"(bytes) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void cp_async_wait_for() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}   // all but the last `pending` groups

// The general case of load_tile: any alignment, any type into fp32. Rare, so not inlined.
template <class E>
__device__ __noinline__ void load_tile_slowly(E* tile, int ld, Rows src, int ROWS, int COLS, int rows, int col, int cols, int tid, int threads) {
  for (int e = tid; e < ROWS * COLS; e += threads) {
    const int i = e / COLS, j = e % COLS;
    const bool valid = i < rows && col + j < cols;
    if constexpr (sizeof(E) == 2) tile[i * ld + j] = valid ? static_cast<const E*>(src.ptr)[src.at(i) + col + j] : from_float<E>(0.f);
    else tile[i * ld + j] = valid ? load_as_float(src.ptr, src.at(i) + col + j, src.dtype) : 0.f;
  }
}

// tile[ROWS][ld] = rows 0 .. rows-1, columns col .. col+COLS-1 of src, zero outside [rows) x [cols). Asynchronous where the addresses are
// multiples of 16 bytes (cp_async_wait_for and a barrier before use). THREADS take part, tid is this one's number among them.
template <int THREADS, class E, int ROWS, int COLS>
__device__ inline void load_tile(E* tile, int ld, const Rows& src, int rows, int col, int cols, int tid = threadIdx.x) {
  constexpr int width = 16 / sizeof(E), across = COLS / width;      // 16-byte pieces in a row
  const bool same = sizeof(E) == 2 || src.dtype == DType::f32;
  const bool wide = same && ((reinterpret_cast<uintptr_t>(src.ptr) | (src.base * sizeof(E)) | (src.step * sizeof(E)) | (cols * sizeof(E))) & 15) == 0;
  if (!wide) return load_tile_slowly<E>(tile, ld, src, ROWS, COLS, rows, col, cols, tid, THREADS);
  if constexpr (across <= THREADS) {
    constexpr int down = THREADS / across, steps = (ROWS + down - 1) / down;
    const int i0 = tid / across, j = tid % across * width;
    const char* from = static_cast<const char*>(src.ptr) + (src.at(i0) + col + j) * int64_t(sizeof(E));
    const int64_t stride = src.step * down * int64_t(sizeof(E));
    E* to = tile + i0 * ld + j;
    const int last = col + j < cols ? rows : 0;
#pragma unroll
    for (int s = 0; s < steps; ++s, from += stride) {
      if (ROWS % down == 0 || i0 + s * down < ROWS) {
        const bool valid = i0 + s * down < last;
        cp_async16(to + s * down * ld, valid ? from : static_cast<const char*>(src.ptr), valid);
      }
    }
  } else {
    for (int e = tid; e < ROWS * across; e += THREADS) {
      const int i = e / across, j = e % across * width;
      const bool valid = i < rows && col + j < cols;
      cp_async16(tile + i * ld + j, static_cast<const char*>(src.ptr) + (valid ? (src.at(i) + col + j) * int64_t(sizeof(E)) : 0), valid);
    }
  }
}

// The same for a matrix that is read a slice at a time: what does not change from slice to slice is worked out once.
template <int THREADS, class E, int ROWS, int COLS>
struct TileLoader {
  static constexpr int width = 16 / sizeof(E), across = COLS / width;
  static constexpr bool direct = across <= THREADS;
  static constexpr int down = direct ? THREADS / across : 1, steps = (ROWS + down - 1) / down;
  const char* from;                                       // this thread's first piece
  int64_t stride;                                         // bytes between its pieces
  bool wide;

  __device__ void open(const Rows& src, int cols) {
    from = static_cast<const char*>(src.ptr) + (src.at(threadIdx.x / across) + threadIdx.x % across * width) * int64_t(sizeof(E));
    stride = src.step * down * int64_t(sizeof(E));
    wide = direct && (sizeof(E) == 2 || src.dtype == DType::f32) &&
           ((reinterpret_cast<uintptr_t>(src.ptr) | (src.base * sizeof(E)) | (src.step * sizeof(E)) | (cols * sizeof(E))) & 15) == 0;
  }
  // tile = `rows` rows and `cols` columns (the rest zero) from `offset` elements behind where src starts; src() is only asked for when they are not aligned.
  template <class Src>
  __device__ void load(E* tile, int ld, int64_t offset, int rows, int cols, Src&& src) const {
    if (wide) {
      const int i = threadIdx.x / across, j = threadIdx.x % across * width, left = j < cols ? rows - i : 0;
      const char* p = from + offset * int64_t(sizeof(E));
      E* to = tile + i * ld + j;
#pragma unroll
      for (int s = 0; s < steps; ++s, p += stride)
        if (ROWS % down == 0 || i + s * down < ROWS) cp_async16(to + s * down * ld, p, s * down < left);
    } else {
      Rows r = src();
      r.base += offset;
      if constexpr (direct) load_tile_slowly<E>(tile, ld, r, ROWS, COLS, rows, 0, cols, threadIdx.x, THREADS);
      else load_tile<THREADS, E, ROWS, COLS>(tile, ld, r, rows, 0, cols);
    }
  }
};

// rows x COLS elements, dense in memory, all of them valid.
template <int THREADS, int COLS, class E>
__device__ inline void load_matrix(E* tile, int ld, const E* src, int rows) {
  constexpr int width = 16 / sizeof(E), across = COLS / width;
#pragma unroll 8
  for (int e = threadIdx.x; e < rows * across; e += THREADS) cp_async16(tile + e / across * ld + e % across * width, src + e * width, true);
}

// 1 - exp(g) without cancellation.
__device__ inline float coupled_write(float g) {
  if (g < -0.25f) return 1.f - expf(g);
  return -g * fmaf(g, fmaf(g, fmaf(g, fmaf(g, fmaf(g, fmaf(g, 1.f / 5040, 1.f / 720), 1.f / 120), 1.f / 24), 1.f / 6), 0.5f), 1.f);
}

// N elements `first + i step`, i < n, on their way to registers (0 beyond n), and later as floats: between the two, other loads can be sent off.
template <int N>
struct Gather {
  uint32_t raw[N];
  __device__ void load(const void* ptr, DType t, int64_t first, int64_t step, int n) {
    if (t == DType::f32) {
      const uint32_t* p = static_cast<const uint32_t*>(ptr) + first;
#pragma unroll
      for (int i = 0; i < N; ++i, p += step) raw[i] = i < n ? *p : 0u;
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(ptr) + first;
#pragma unroll
      for (int i = 0; i < N; ++i, p += step) raw[i] = i < n ? *p : 0u;
    }
  }
  __device__ void get(DType t, float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = __uint_as_float(t == DType::f32    ? raw[i]
                             : t == DType::bf16 ? raw[i] << 16
                                                : __float_as_uint(__half2float(__ushort_as_half(static_cast<unsigned short>(raw[i])))));
  }
};
template <int N>
__device__ inline void gather(float (&x)[N], const void* ptr, DType t, int64_t first, int64_t step, int n) {
  Gather<N> g;
  g.load(ptr, t, first, step, n);
  g.get(t, x);
}
// Four neighbouring elements of row i from column m on, those below n (0 beyond): on their way to registers, and later as floats.
struct Four {
  uint32_t raw[4];                                        // of 16 bits two in each, in the first two
  __device__ void load(const Rows& src, int i, int m, int n) {
    const int64_t at = src.at(i) + m;
    const int size = src.dtype == DType::f32 ? 4 : 2;
    const char* p = static_cast<const char*>(src.ptr) + at * size;
    if (n >= 4 && (reinterpret_cast<uintptr_t>(p) & (4 * size - 1)) == 0) {
      if (size == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        raw[0] = v.x, raw[1] = v.y;
      }
    } else {
      Gather<4> g;
      g.load(src.ptr, src.dtype, at, 1, n);
#pragma unroll
      for (int k = 0; k < 4; ++k) raw[k] = g.raw[k];
      if (size == 2) raw[0] |= raw[1] << 16, raw[1] = raw[2] | raw[3] << 16;
    }
  }
  __device__ void get(DType t, float (&x)[4]) const {
    if (t == DType::f32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = __uint_as_float(raw[k]);
    } else {
      const float2 a = t == DType::bf16 ? unpack<bf16>(raw[0]) : unpack<half>(raw[0]), b = t == DType::bf16 ? unpack<bf16>(raw[1]) : unpack<half>(raw[1]);
      x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
    }
  }
};
__device__ inline float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ inline float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// exp(g) by a polynomial. A state is the product of thousands of these: the small bias of ex2.approx, which expf has too, would add up.
__device__ inline float exp_to_the_last_digit(float g) {
  if (!(g >= -87.f)) return isnan(g) ? g : 0.f;
  const float n = rintf(fminf(g, 89.f) * 1.4426950408889634f);
  const float r = fmaf(-n, -2.12194440e-4f, fmaf(-n, 0.693359375f, g));              // g - n ln 2, |r| <= 0.35
  float e = fmaf(r, 1.f / 5040, 1.f / 720);
  e = fmaf(r, e, 1.f / 120), e = fmaf(r, e, 1.f / 24), e = fmaf(r, e, 1.f / 6), e = fmaf(r, e, 0.5f), e = fmaf(r, e, 1.f), e = fmaf(r, e, 1.f);
  return e * __int_as_float((static_cast<int>(n) + 127) << 23);
}

// Gates and write strengths of a chunk in global memory. Outside the chunk and the slots a = 1 and s = 0, which changes nothing.
struct GateReader {
  Rows s, g;
  int length, M;
  __device__ GateReader(const Params& p, const Chunk& c, int64_t head) : s(rows_of(p.s, c, head)), g(rows_of(p.g, c, head)), length(c.length), M(p.M) {}
  __device__ static float decay(float g) { return exp_to_the_last_digit(g); }
  __device__ static bool forgets(float g) { return g < -87.f; }   // decay(g) is 0

  __device__ float gate(int i, int m) const { return i < length && m < M ? decay(load_as_float(g.ptr, g.at(i) + m, g.dtype)) : 1.f; }
  __device__ float write(int i, int m) const {
    if (i >= length || m >= M) return 0.f;
    return s.ptr ? load_as_float(s.ptr, s.at(i) + m, s.dtype) : coupled_write(load_as_float(g.ptr, g.at(i) + m, g.dtype));
  }
  // Rows i0 .. i0 + 15 of slot m: sent off by load_, made by the other.
  __device__ void load_gates16(int i0, int m, Gather<16>& a) const { a.load(g.ptr, g.dtype, g.at(i0) + m, g.step, m < M ? length - i0 : 0); }
  __device__ void gates16(const Gather<16>& raw, float (&a)[16]) const {
    raw.get(g.dtype, a);
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i] = decay(a[i]);
  }
  __device__ void load_writes16(int i0, int m, Gather<16>& w) const {
    if (s.ptr) w.load(s.ptr, s.dtype, s.at(i0) + m, s.step, m < M ? length - i0 : 0);
    else load_gates16(i0, m, w);
  }
  __device__ void writes16(const Gather<16>& raw, float (&w)[16]) const {
    raw.get(s.ptr ? s.dtype : g.dtype, w);
    if (!s.ptr)
#pragma unroll
      for (int i = 0; i < 16; ++i) w[i] = coupled_write(w[i]);
  }
};

// Shared memory, handed out front to back.
struct Arena {
  char* p;
  template <class T>
  __device__ T* take(int64_t n) {
    T* r = reinterpret_cast<T*>(p);
    p += (n * sizeof(T) + 15) / 16 * 16;
    return r;
  }
};
constexpr int64_t arena(int64_t n, int64_t size) { return (n * size + 15) / 16 * 16; }

// s_i of row i in the columns of this thread's accumulators: w[t][e] belongs to slot 8 t + 2 (lane % 4) + e.
template <int MT>
__device__ inline void row_writes(const GateReader& reader, int i, float (&w)[MT][2]) {
  const bool coupled = !reader.s.ptr;
  const int64_t first = coupled ? reader.g.at(i) : reader.s.at(i);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float x[MT];
    const int m = frag_col() + e;
    gather(x, coupled ? reader.g.ptr : reader.s.ptr, coupled ? reader.g.dtype : reader.s.dtype, first + m, 8, i < reader.length ? (reader.M - m + 7) / 8 : 0);
#pragma unroll
    for (int t = 0; t < MT; ++t) w[t][e] = coupled ? coupled_write(x[t]) : x[t];
  }
}

// What the products of a chunk need of its gates, made once per key/value head by chunk_gates (core/scan.cuh): a tile of floats in the workspace.
//   R [C][MP]: the scale of its rows (fast block: 1 / W_i, slow block: U_i);  S [C][MP] = s_j W_j;  lambda [NB][MP];  after [NB][MP]: the product of the later
//   lambda;  slow [NB];
//   in exact arithmetic, where every block is slow, also the a and s of every token.
template <class Cfg>
struct GateTile {
  static constexpr int64_t R = 0, S = Cfg::C * Cfg::MP, lambda = 2 * S, after = lambda + Cfg::NB * Cfg::MP, slow = after + Cfg::NB * Cfg::MP, a = slow + 4,
                           s = a + S;
  static constexpr int64_t floats = Cfg::exact ? s + S : a;
  static_assert(Cfg::NB <= 4);
};

// The tile in shared memory.
template <class Cfg>
struct Gates {
  static constexpr int C = Cfg::C, MP = Cfg::MP, NB = Cfg::NB, ldu = Cfg::ldu;
  float* R;                                               // [C][ldu]
  float* lambda;
  int* slow;
  float *a, *s;                                           // [C][MP], exact arithmetic only
  const float* tile;
  GateReader reader;

  static constexpr int64_t bytes = arena(C * ldu, 4) + arena(NB * MP, 4) + arena(4, 4) + (Cfg::exact ? 2 * arena(C * MP, 4) : 0);

  __device__ Gates(Arena& arena, const Params& p, const Chunk& c, int64_t head, const float* tiles)
      : tile(tiles + (c.slot * p.H + head) * GateTile<Cfg>::floats), reader(p, c, head) {
    R = arena.take<float>(C * ldu);
    lambda = arena.take<float>(NB * MP);
    slow = arena.take<int>(4);
    a = Cfg::exact ? arena.take<float>(C * MP) : nullptr;
    s = Cfg::exact ? arena.take<float>(C * MP) : nullptr;
  }
  // All THREADS of the block send off their share (cp_async_commit, wait and barrier are the caller's).
  template <int THREADS>
  __device__ void load() const {
    using T = GateTile<Cfg>;
    load_matrix<THREADS, MP>(lambda, MP, tile + T::lambda, NB);
    if (threadIdx.x == 0) cp_async16(slow, tile + T::slow, true);
    if constexpr (Cfg::exact) load_matrix<THREADS, MP>(a, MP, tile + T::a, C), load_matrix<THREADS, MP>(s, MP, tile + T::s, C);
  }
  template <int THREADS>
  __device__ void load_R() const {
    load_matrix<THREADS, MP>(R, ldu, tile + GateTile<Cfg>::R, C);
  }
  template <int THREADS>
  __device__ void load_S(float* S, int lds) const {
    load_matrix<THREADS, MP>(S, lds, tile + GateTile<Cfg>::S, C);
  }

  __device__ float gate(int i, int m) const {
    if constexpr (Cfg::exact) return a[i * MP + m];
    else return reader.gate(i, m);
  }
  __device__ float write(int i, int m) const {
    if constexpr (Cfg::exact) return s[i * MP + m];
    else return reader.write(i, m);
  }
  __device__ static float operand(float x) { return Cfg::exact ? x : round_tf32(x); }

 public:
  // s_i of row i as above, without going to memory where S [C][lds] (s_j W_j) is at hand.
  __device__ void row_writes(int i, const float* S, float (&w)[Cfg::MT][2]) const {
    if constexpr (Cfg::exact) {
#pragma unroll
      for (int t = 0; t < Cfg::MT; ++t) w[t][0] = s[i * MP + t * 8 + frag_col()], w[t][1] = s[i * MP + t * 8 + frag_col() + 1];
    } else if (!slow[i / 16]) {
      const float *x = S + i * Cfg::lds + frag_col(), *y = R + i * ldu + frag_col();
#pragma unroll
      for (int t = 0; t < Cfg::MT; ++t) {
        const float2 a = *reinterpret_cast<const float2*>(x + t * 8), b = *reinterpret_cast<const float2*>(y + t * 8);
        w[t][0] = a.x * b.x, w[t][1] = a.y * b.y;
      }
    } else {
      float exact[Cfg::MT][2];
      exact_row_writes(reader, i, exact);
#pragma unroll
      for (int t = 0; t < Cfg::MT; ++t) w[t][0] = exact[t][0], w[t][1] = exact[t][1];
    }
  }

 private:
  static __device__ __noinline__ void exact_row_writes(GateReader reader, int i, float (&w)[Cfg::MT][2]) { gsa::cuda::row_writes<Cfg::MT>(reader, i, w); }
};

// The lower triangle of a chunk, rows of block I = this warp's, in Horner form. X [16 x C] strictly lower, y [16 x MP].
template <class Cfg>
struct Triangle {
  static constexpr int NB = Cfg::NB, MP = Cfg::MP, MT = Cfg::MT, CT = Cfg::CT;
  using A = typename Cfg::X;
  using OpX = typename A::template Op<Cfg::C>;
  using OpY = typename A::template Op<MP>;
  const Gates<Cfg>& gates;
  const float* S;                                         // s_j W_j, [C][lds]
  float* x_scratch;                                       // the warp's [16][Cfg::ldx or 20]
  float* y_scratch;                                       // the warp's [16][ldy]
  int warp;
  static constexpr int ldx = 20;                          // of the in-block 16 x 16 of X
  static constexpr int ldy = Cfg::SC + 8;
  static constexpr int64_t x_floats = Cfg::exact ? 16 * (Cfg::ldx > ldx ? Cfg::ldx : ldx) : 16 * ldx, y_floats = 16 * ldy;

  // acc <- (acc decayed to the block's start + sum over earlier blocks) decayed to its rows, + in-block part:
  //   out[i, m] = sum_{j < i} X_ij s_jm exp(G_i - G_j) + exp(G_i) acc_in[i, m].
  __device__ void apply(float (&acc)[MT][4], const float (&x)[CT][4]) const {
    const bool slow = gates.slow[warp];
    if constexpr (!Cfg::exact) {                          // where operands are in registers x itself need not be kept there
      if (slow) store_own_block(x);
    }
    OpX op;
    A::template from_acc<Cfg::C>(op, x, x_scratch, Cfg::ldx);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J < warp || (J == warp && !slow)) {
        decay(acc, J);
        A::template mma_nn<MT, 16>(acc, op.block(J), S + J * 16 * Cfg::lds, Cfg::lds);
      }
    scale_rows(acc);
    if (!slow) return;
    if constexpr (Cfg::exact) {
      __syncwarp();
      store_own_block(x);
    }
    __syncwarp();
#pragma unroll
    for (int m0 = 0; m0 < MP; m0 += Cfg::SC) {
      const Gates<Cfg> copy = gates;                      // so that the address of `gates` itself is never taken
      apply_block(copy, x_scratch, y_scratch, warp, m0);
#pragma unroll
      for (int t = 0; t < Cfg::SC / 8; ++t) {
        const float* z = y_scratch + frag_row() * ldy + t * 8 + frag_col();
        float (&a)[4] = acc[m0 / 8 + t];
        a[0] += z[0], a[1] += z[1], a[2] += z[8 * ldy], a[3] += z[8 * ldy + 1];
      }
      __syncwarp();
    }
  }

  // x[i, j] = sum_m y_im s_jm exp(G_i - G_j) for j < i (zero elsewhere); y <- y exp(G_i), decayed from the chunk's start.
  __device__ void contract(float (&x)[CT][4], float (&y)[MT][4]) const {
    zero(x);
    const bool slow = gates.slow[warp];
    if (slow) contract_exactly(x, y);
    scale_rows(y);
#pragma unroll
    for (int J = NB - 1; J >= 0; --J) {
      if (J > warp || (J == warp && slow)) continue;
      OpY op;
      A::template from_acc<MP>(op, y, y_scratch, ldy);
      A::template mma_nt<2, MP>(x + 2 * J, op, S + J * 16 * Cfg::lds, Cfg::lds);
      if (J == warp) strictly_lower(x, J);
      decay(y, J);
    }
  }

  __device__ static void strictly_lower(float (&x)[CT][4], int J) {
    const int r = frag_row(), c = frag_col();
    if (c >= r) x[2 * J][0] = 0.f;
    if (c + 1 >= r) x[2 * J][1] = 0.f;
    if (c + 8 >= r) x[2 * J + 1][0] = 0.f;                // upper right 8 x 8
    if (c + 9 >= r) x[2 * J + 1][1] = 0.f;
    if (c + 8 >= r + 8) x[2 * J + 1][2] = 0.f;
    if (c + 9 >= r + 8) x[2 * J + 1][3] = 0.f;
  }
  // Takes the diagonal of the warp's own block out: d[0] for row lane / 4, d[1] for row lane / 4 + 8; what is left is strictly lower.
  __device__ void split_diagonal(float (&x)[CT][4], float (&d)[2]) const {
    const int r = frag_row(), lane = 4 * r + (r >> 1);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J == warp) {
        d[0] = __shfl_sync(0xffffffffu, (r & 1) ? x[2 * J][1] : x[2 * J][0], lane);
        d[1] = __shfl_sync(0xffffffffu, (r & 1) ? x[2 * J + 1][3] : x[2 * J + 1][2], lane);
        strictly_lower(x, J);
      }
  }
  __device__ void add_diagonal(float (&x)[CT][4], const float (&d)[2]) const {
    const int r = frag_row(), c = frag_col();
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J == warp) {
        if (c == r) x[2 * J][0] = d[0], x[2 * J + 1][2] = d[1];
        if (c + 1 == r) x[2 * J][1] = d[0], x[2 * J + 1][3] = d[1];
      }
  }

 private:
  __device__ void decay(float (&acc)[MT][4], int J) const {
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      const float2 l = *reinterpret_cast<const float2*>(gates.lambda + J * MP + t * 8 + frag_col());
      acc[t][0] *= l.x, acc[t][1] *= l.y, acc[t][2] *= l.x, acc[t][3] *= l.y;
    }
  }
  __device__ void scale_rows(float (&acc)[MT][4]) const {
    const float* u = gates.R + (warp * 16 + frag_row()) * Cfg::ldu + frag_col();
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      const float2 p = *reinterpret_cast<const float2*>(u + t * 8), q = *reinterpret_cast<const float2*>(u + 8 * Cfg::ldu + t * 8);
      acc[t][0] *= p.x, acc[t][1] *= p.y, acc[t][2] *= q.x, acc[t][3] *= q.y;
    }
  }
  __device__ void store_own_block(const float (&x)[CT][4]) const {
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J == warp) store_block(x, J);
  }
  __device__ void store_block(const float (&x)[CT][4], int J) const {
    float* p = x_scratch + frag_row() * ldx + frag_col();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      p[h * 8] = x[2 * J + h][0], p[h * 8 + 1] = x[2 * J + h][1];
      p[8 * ldx + h * 8] = x[2 * J + h][2], p[8 * ldx + h * 8 + 1] = x[2 * J + h][3];
    }
  }
  __device__ void contract_exactly(float (&x)[CT][4], const float (&y)[MT][4]) const {
#pragma unroll
    for (int m0 = 0; m0 < MP; m0 += Cfg::SC) {
      __syncwarp();
#pragma unroll
      for (int t = 0; t < Cfg::SC / 8; ++t) {
        float* p = y_scratch + frag_row() * ldy + t * 8 + frag_col();
        const float (&v)[4] = y[m0 / 8 + t];
        p[0] = v[0], p[1] = v[1], p[8 * ldy] = v[2], p[8 * ldy + 1] = v[3];
      }
      __syncwarp();
      const Gates<Cfg> copy = gates;
      contract_block(copy, x_scratch, y_scratch, warp, m0);
    }
    const float* p = x_scratch + frag_row() * ldx + frag_col();
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J == warp)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[2 * J + h][0] = p[h * 8], x[2 * J + h][1] = p[h * 8 + 1];
          x[2 * J + h][2] = p[8 * ldx + h * 8], x[2 * J + h][3] = p[8 * ldx + h * 8 + 1];
        }
    __syncwarp();
  }

  // Slow blocks only, so not inlined: in-block products from X or y in scratch to scratch.
  // z[i][m] = sum_{j < i} X_ij s_jm a_{j+1} ... a_i: Horner in the row index, z <- z a_j + X_ij s_j for j < i, then z a_i.
  static __device__ __noinline__ void apply_block(const Gates<Cfg>& gates, const float* x, float* z_out, int warp, int m0) {
    for (int m = lane_id(); m < Cfg::SC; m += 32) {
      float z[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) z[i] = 0.f;
      for (int j = 0; j < 16; ++j) {
        const float a = gates.gate(warp * 16 + j, m0 + m), s = gates.write(warp * 16 + j, m0 + m);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (j <= i) z[i] *= a;
          if (j < i) z[i] = fmaf(x[i * ldx + j], s, z[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) z_out[i * ldy + m] = z[i];
    }
    __syncwarp();
  }
  // x[i][j] = sum_m y_im s_jm a_{j+1} ... a_i: lane l has row l % 16 and half of the slots; for each slot f = y_i a_i a_{i-1} ... walks down the rows.
  static __device__ __noinline__ void contract_block(const Gates<Cfg>& gates, float* x, const float* y, int warp, int m0) {
    const int i = lane_id() & 15, side = lane_id() >> 4;
    float z[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) z[j] = 0.f;
    for (int m = side; m < Cfg::SC; m += 2) {
      float a[16], s[16], f = 0.f;
      const float v = y[i * ldy + m];
#pragma unroll
      for (int j = 0; j < 16; ++j) a[j] = gates.gate(warp * 16 + j, m0 + m), s[j] = gates.write(warp * 16 + j, m0 + m);
#pragma unroll
      for (int j = 15; j >= 0; --j) {
        if (j < i) z[j] = fmaf(f, s[j], z[j]);
        if (j == i) f = v;
        f *= a[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) z[j] += __shfl_xor_sync(0xffffffffu, z[j], 16);
    __syncwarp();
    if (side == 0)
#pragma unroll
      for (int j = 0; j < 16; ++j) x[i * ldx + j] = (m0 ? x[i * ldx + j] : 0.f) + (j < i ? z[j] : 0.f);
    __syncwarp();
  }
};

}  // namespace gsa::cuda
