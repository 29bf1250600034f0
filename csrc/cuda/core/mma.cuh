// Products of a warp's 16 rows: acc[16 x 8 NT] += A[16 x KD] B, with B in shared memory as [KD][n] (nn) or [n][KD] (nt).
//
// Accumulators are laid out as mma.sync's C fragment: acc[t][0..1] is row lane / 4, columns 8 t + 2 (lane % 4) + {0, 1}; acc[t][2..3] is row lane / 4 + 8.
// Arith<bf16> and Arith<half> run on the tensor cores (m16n8k16, fp32 accumulation), Arith<float> on the fp32 pipe, in the same layout. Tf32 runs fp32
// tiles on the tensor cores (m16n8k8): their operands keep 11 bits where a bf16 keeps 8. TileOp: an operand that from_tile makes, Op: any other.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gsa::cuda {

using bf16 = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline half from_float<half>(float x) { return __float2half_rn(x); }

template <class T> __device__ inline uint32_t pack(float x, float y);
template <> __device__ inline uint32_t pack<bf16>(float x, float y) {
  const __nv_bfloat162 r = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&r);
}
template <> __device__ inline uint32_t pack<half>(float x, float y) {
  const half2 r = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&r);
}

// Two neighbouring elements of a row-major matrix in memory.
template <class T> __device__ inline void store2(T* p, float x, float y) { *reinterpret_cast<uint32_t*>(p) = pack<T>(x, y); }
template <> __device__ inline void store2<float>(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }

__device__ inline int lane_id() { return threadIdx.x & 31; }
__device__ inline int frag_row() { return lane_id() >> 2; }
__device__ inline int frag_col() { return (lane_id() & 3) * 2; }

// Four 8 x 8 matrices from shared memory; p: an address there, or a pointer.
template <bool transpose>
__device__ inline void ldmatrix4(uint32_t (&r)[4], uint32_t p) {
  if constexpr (transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
  else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}
template <bool transpose>
__device__ inline void ldmatrix4(uint32_t (&r)[4], const void* p) {
  ldmatrix4<transpose>(r, static_cast<uint32_t>(__cvta_generic_to_shared(p)));
}

template <class T>
__device__ inline float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<T, bf16>) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
  else return __half22float2(*reinterpret_cast<const half2*>(&x));
}

template <class T>
__device__ inline void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma16816<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma16816<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class E>
struct Arith {
  template <int KD>
  struct Op {
    uint32_t r[KD / 16][4];
    __device__ Op<16> block(int j) const {            // columns 16 j .. 16 j + 15; j must be a compile-time constant after unrolling
      Op<16> b;
#pragma unroll
      for (int i = 0; i < 4; ++i) b.r[0][i] = r[j][i];
      return b;
    }
  };
  template <int KD>
  using TileOp = Op<KD>;
  static constexpr int pad = 8, state_pad = 8;        // row padding of tiles that ldmatrix reads: 16 bytes, no bank conflicts

  template <int KD>
  __device__ static void from_tile(Op<KD>& a, const E* tile, int ld) {          // A[i][k] = tile[i * ld + k]
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 16; ++k) ldmatrix4<false>(a.r[k], tile + (l & 15) * ld + k * 16 + (l >> 4) * 8);
  }
  template <int KD>
  __device__ static void from_tile_t(Op<KD>& a, const E* tile, int ld) {        // A[i][k] = tile[k * ld + i]
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 16; ++k) ldmatrix4<true>(a.r[k], tile + (k * 16 + (l & 7) + (l >> 4) * 8) * ld + ((l >> 3) & 1) * 8);
  }
  template <int KD>
  __device__ static void from_acc(Op<KD>& a, const float (&acc)[KD / 8][4], float*, int) {
#pragma unroll
    for (int k = 0; k < KD / 16; ++k) {
      a.r[k][0] = pack<E>(acc[2 * k][0], acc[2 * k][1]);
      a.r[k][1] = pack<E>(acc[2 * k][2], acc[2 * k][3]);
      a.r[k][2] = pack<E>(acc[2 * k + 1][0], acc[2 * k + 1][1]);
      a.r[k][3] = pack<E>(acc[2 * k + 1][2], acc[2 * k + 1][3]);
    }
  }
  // An fp32 operand as the sum of two 16-bit ones: 16 bits and more of it take part, for twice the products.
  template <int KD>
  struct Split {
    Op<KD> hi, lo;
    __device__ Split<16> block(int j) const { return {hi.block(j), lo.block(j)}; }
  };
  template <int KD>
  __device__ static void from_acc_split(Split<KD>& a, const float (&acc)[KD / 8][4], float*, int) {
#pragma unroll
    for (int k = 0; k < KD / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) split_pair(acc[2 * k + (i >> 1)][(i & 1) * 2], acc[2 * k + (i >> 1)][(i & 1) * 2 + 1], a.hi.r[k][i], a.lo.r[k][i]);
  }
  __device__ static void split_pair(float x, float y, uint32_t& hi, uint32_t& lo) {
    hi = pack<E>(x, y);
    const float2 rounded = unpack<E>(hi);                // of the pair: a conversion of one alone is many times slower
    lo = pack<E>(x - rounded.x, y - rounded.y);
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const Split<KD>& a, const E* b, int ld) {
    static_assert(NT % 2 == 0);
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 16; ++k)
#pragma unroll
      for (int t = 0; t < NT; t += 2) {
        uint32_t f[4];
        ldmatrix4<true>(f, b + (k * 16 + (l & 15)) * ld + t * 8 + (l >> 4) * 8);
        mma16816<E>(acc[t], a.hi.r[k], f[0], f[1]);
        mma16816<E>(acc[t + 1], a.hi.r[k], f[2], f[3]);
        mma16816<E>(acc[t], a.lo.r[k], f[0], f[1]);
        mma16816<E>(acc[t + 1], a.lo.r[k], f[2], f[3]);
      }
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const Op<KD>& a, const E* b, int ld) {   // B[k][n] = b[k * ld + n]
    static_assert(NT % 2 == 0);
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 16; ++k)
#pragma unroll
      for (int t = 0; t < NT; t += 2) {
        uint32_t f[4];
        ldmatrix4<true>(f, b + (k * 16 + (l & 15)) * ld + t * 8 + (l >> 4) * 8);
        mma16816<E>(acc[t], a.r[k], f[0], f[1]);
        mma16816<E>(acc[t + 1], a.r[k], f[2], f[3]);
      }
  }
  template <int NT, int KD>
  __device__ static void mma_nt(float (*acc)[4], const Op<KD>& a, const E* b, int ld) {   // B[k][n] = b[n * ld + k]
    static_assert(NT % 2 == 0);
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 16; ++k)
#pragma unroll
      for (int t = 0; t < NT; t += 2) {
        uint32_t f[4];
        ldmatrix4<false>(f, b + (t * 8 + (l & 7) + (l >> 4) * 8) * ld + k * 16 + ((l >> 3) & 1) * 8);
        mma16816<E>(acc[t], a.r[k], f[0], f[1]);
        mma16816<E>(acc[t + 1], a.r[k], f[2], f[3]);
      }
  }
};

template <>
struct Arith<float> {
  template <int KD>
  struct Op {
    const float* p;
    int row, col;                                      // strides: A[i][k] = p[i * row + k * col]
    __device__ Op<16> block(int j) const { return {p + j * 16 * col, row, col}; }
  };
  template <int KD>
  using TileOp = Op<KD>;
  static constexpr int pad = 4, state_pad = 4;

  template <int KD>
  __device__ static void from_tile(Op<KD>& a, const float* tile, int ld) {
    a = {tile, ld, 1};
  }
  template <int KD>
  __device__ static void from_input(Op<KD>& a, const float* tile, int ld) {
    a = {tile, ld, 1};
  }
  template <int KD>
  __device__ static void from_tile_t(Op<KD>& a, const float* tile, int ld) {
    a = {tile, 1, ld};
  }
  // scratch: the warp's own [16][ld] floats, alive as long as the operand.
  template <int KD>
  __device__ static void from_acc(Op<KD>& a, const float (&acc)[KD / 8][4], float* scratch, int ld) {
    __syncwarp();
#pragma unroll
    for (int t = 0; t < KD / 8; ++t) {
      float* p = scratch + frag_row() * ld + t * 8 + frag_col();
      p[0] = acc[t][0], p[1] = acc[t][1], p[8 * ld] = acc[t][2], p[8 * ld + 1] = acc[t][3];
    }
    __syncwarp();
    a = {scratch, ld, 1};
  }
  template <int KD>
  using Split = Op<KD>;                                // nothing to split
  template <int KD>
  __device__ static void from_acc_split(Op<KD>& a, const float (&acc)[KD / 8][4], float* scratch, int ld) {
    from_acc<KD>(a, acc, scratch, ld);
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    fma_loop<NT, KD>(acc, a, b + frag_col(), ld, 1);
  }
  template <int NT, int KD>
  __device__ static void mma_nt(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    fma_loop<NT, KD>(acc, a, b + frag_col() * ld, 1, ld);
  }

 private:
  template <int NT, int KD>
  __device__ static void fma_loop(float (*acc)[4], const Op<KD>& a, const float* b, int bk, int bn) {
    // Partial sums over 32 products each: the error of a long sum in one accumulator would show beside a pairwise one.
    const float* a0 = a.p + frag_row() * a.row;
    const float* a1 = a0 + 8 * a.row;
    constexpr int KB = KD < 32 ? KD : 32, TB = NT < 4 ? NT : 4;
#pragma unroll
    for (int t0 = 0; t0 < NT; t0 += TB)
      for (int k0 = 0; k0 < KD; k0 += KB) {
        float part[TB][4] = {};
#pragma unroll 4
        for (int k = k0; k < k0 + KB; ++k) {
          const float x = a0[k * a.col], y = a1[k * a.col];
#pragma unroll
          for (int t = 0; t < TB; ++t) {
            const float u = b[k * bk + (t0 + t) * 8 * bn], w = b[k * bk + ((t0 + t) * 8 + 1) * bn];
            part[t][0] = fmaf(x, u, part[t][0]);
            part[t][1] = fmaf(x, w, part[t][1]);
            part[t][2] = fmaf(y, u, part[t][2]);
            part[t][3] = fmaf(y, w, part[t][3]);
          }
        }
#pragma unroll
        for (int t = 0; t < TB; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[t0 + t][i] += part[t][i];
      }
  }
};

// To the nearest TF32 value, which the unit takes as it is.
__device__ inline float to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return __uint_as_float(r);
}
// For the unit only, which drops the last 13 bits: adds half of what they can hold (0.35 to 0.7 of the last place kept, 0.5 on average). One instruction
// where cvt.rna.tf32 is four. Not idempotent: once for each operand.
__device__ inline float round_tf32(float x) { return fmaf(x, 0.3466f / 1024, x); }
__device__ inline void mma1688(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)),
                 "r"(__float_as_uint(b1)));
}

// fp32 tiles on the tensor cores. The k index inside a group of 8 is permuted (position t holds k = 2 t, position t + 4 holds 2 t + 1), the same in A and
// B, so that an accumulator is an operand as it stands. Tiles hold values that round_tf32 has prepared.
struct Tf32 {
  template <int KD>
  struct Op {
    float r[KD / 8][4];
    __device__ Op<16> block(int j) const {
      Op<16> b;
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) b.r[k][i] = r[2 * j + k][i];
      return b;
    }
  };
  template <int KD>
  __device__ static void from_acc(Op<KD>& a, const float (&acc)[KD / 8][4], float*, int) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
      a.r[k][0] = round_tf32(acc[k][0]), a.r[k][1] = round_tf32(acc[k][2]), a.r[k][2] = round_tf32(acc[k][1]), a.r[k][3] = round_tf32(acc[k][3]);
  }
  template <int KD>
  __device__ static void from_tile(Op<KD>& a, const float* tile, int ld) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k) {
      const float2 x = *reinterpret_cast<const float2*>(tile + frag_row() * ld + k * 8 + frag_col());
      const float2 y = *reinterpret_cast<const float2*>(tile + (frag_row() + 8) * ld + k * 8 + frag_col());
      a.r[k][0] = x.x, a.r[k][1] = y.x, a.r[k][2] = x.y, a.r[k][3] = y.y;
    }
  }
  // Of inputs as they are. 16-bit values are exact, others are rounded here, as in from_tile_t.
  template <int KD>
  __device__ static void from_input(Op<KD>& a, const float* tile, int ld) {
    from_tile<KD>(a, tile, ld);
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] = round_tf32(a.r[k][i]);
  }
  template <int KD, class E>
  __device__ static void from_input(Op<KD>& a, const E* tile, int ld) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const E* p = tile + (frag_row() + 8 * h) * ld + k * 8 + frag_col();
        a.r[k][h] = to_float(p[0]), a.r[k][2 + h] = to_float(p[1]);
      }
  }
  template <int KD>
  __device__ static void from_tile_t(Op<KD>& a, const float* tile, int ld) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] = round_tf32(tile[(k * 8 + frag_col() + (i >> 1)) * ld + frag_row() + (i & 1) * 8]);
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    const float* p = b + frag_col() * ld + frag_row();
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int t = 0; t < NT; ++t) mma1688(acc[t], a.r[k], p[k * 8 * ld + t * 8], p[(k * 8 + 1) * ld + t * 8]);
  }
  template <int NT, int KD>
  __device__ static void mma_nt(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    const float* p = b + frag_row() * ld + frag_col();
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const float2 f = *reinterpret_cast<const float2*>(p + t * 8 * ld + k * 8);
        mma1688(acc[t], a.r[k], f.x, f.y);
      }
  }
};

// Of products of fp32 inputs, where TF32 is allowed: Arith's functions on fp32 tiles as they are. Of what B loses half is added to A beforehand, beside A's own
// half: one instruction for each of A's elements and none for B's, of which there are many times more.
struct Tf32Inputs {
  template <int KD>
  using Op = Tf32::Op<KD>;
  template <int KD>
  using Split = Op<KD>;                                // 11 bits are enough
  // What from_tile makes: k as it is, so that ldmatrix reads it, and B beside it.
  template <int KD>
  struct TileOp {
    float r[KD / 8][4];
  };
  static constexpr int pad = 4, state_pad = 8;         // tiles of states are B of both orders of k
  __device__ static float both(float x) { return fmaf(x, 2 * 0.3466f / 1024, x); }

  template <int KD>
  __device__ static void from_tile(TileOp<KD>& a, const float* tile, int ld) {
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 8; ++k) {
      uint32_t x[4];
      ldmatrix4<false>(x, tile + (l & 15) * ld + k * 8 + (l >> 4) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] = both(__uint_as_float(x[i]));
    }
  }
  template <int KD>
  __device__ static void from_tile_t(Op<KD>& a, const float* tile, int ld) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] = both(tile[(k * 8 + frag_col() + (i >> 1)) * ld + frag_row() + (i & 1) * 8]);
  }
  template <int KD>
  __device__ static void from_acc(Op<KD>& a, const float (&acc)[KD / 8][4], float*, int) {
#pragma unroll
    for (int k = 0; k < KD / 8; ++k) a.r[k][0] = both(acc[k][0]), a.r[k][1] = both(acc[k][2]), a.r[k][2] = both(acc[k][1]), a.r[k][3] = both(acc[k][3]);
  }
  template <int KD>
  __device__ static void from_acc_split(Op<KD>& a, const float (&acc)[KD / 8][4], float*, int) {
    from_acc<KD>(a, acc, nullptr, 0);
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const TileOp<KD>& a, const float* b, int ld) {
    const float* p = b + (lane_id() & 3) * ld + frag_row();
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int t = 0; t < NT; ++t) mma1688(acc[t], a.r[k], p[k * 8 * ld + t * 8], p[(k * 8 + 4) * ld + t * 8]);
  }
  template <int NT, int KD>
  __device__ static void mma_nt(float (*acc)[4], const TileOp<KD>& a, const float* b, int ld) {
    static_assert(NT % 2 == 0);
    const int l = lane_id();
#pragma unroll
    for (int k = 0; k < KD / 8; ++k)
#pragma unroll
      for (int t = 0; t < NT; t += 2) {
        uint32_t f[4];
        ldmatrix4<false>(f, b + (t * 8 + (l & 7) + (l >> 4) * 8) * ld + k * 8 + ((l >> 3) & 1) * 4);
        mma1688(acc[t], a.r[k], __uint_as_float(f[0]), __uint_as_float(f[1]));
        mma1688(acc[t + 1], a.r[k], __uint_as_float(f[2]), __uint_as_float(f[3]));
      }
  }
  template <int NT, int KD>
  __device__ static void mma_nn(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    Tf32::mma_nn<NT, KD>(acc, a, b, ld);
  }
  template <int NT, int KD>
  __device__ static void mma_nt(float (*acc)[4], const Op<KD>& a, const float* b, int ld) {
    Tf32::mma_nt<NT, KD>(acc, a, b, ld);
  }
};

template <int NT>
__device__ inline void zero(float (&acc)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0.f;
}

// Sum and maximum over a row of accumulators: the four lanes of a quad hold it.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace gsa::cuda
