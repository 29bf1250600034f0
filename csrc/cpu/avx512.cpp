// The kernels for AVX512. Everything below the pragma is compiled for it; cpu.cpp calls it only on a CPU that has it.
#if defined(__x86_64__)
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#define GSA_LAMBDA __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))   // the pragma does not reach lambdas
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define GSA_AVX512 1
#define GSA_VECTOR_BYTES 64
#define GSA_VECTOR_REGISTERS 32

namespace gsa::cpu::avx512 {
#include "simd.h"
#include "tiles.h"
#include "chunk.h"
#include "recurrent.h"
#include "abc.h"
#include "table.h"
}  // namespace gsa::cpu::avx512

const gsa::cpu::Kernels& gsa::cpu::avx512_kernels() { return gsa::cpu::avx512::table; }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
