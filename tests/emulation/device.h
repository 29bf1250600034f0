// What the CUDA sources see when they are compiled for the CPU: CUDA's keywords, built-in variables and functions, and the instructions that build.py puts in
// the place of asm statements (its table INSTRUCTIONS). All of it ends in runtime.cpp. Included before anything else.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef __align__
#undef __noinline__
#define __align__(n) alignas(n)
#define __noinline__
#define __shared__ emulation_shared                        // build.py makes declarations of it
#define __CUDA_ARCH_FEAT_SM90_ALL 1

#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

extern dim3 blockDim, gridDim;                             // (also names of members in CUDA's own structures, hence no macros)

namespace emulation {

struct Warp;
struct Block;
// A CUDA thread.
struct Fiber {
  uint3 thread{};
  int index = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
};
struct Block {
  uint3 index{};
  char* shared = nullptr;                                  // its window of shared memory, 256 KB, aligned to as much
  int rank = 0;                                            // in its cluster
};
extern Fiber* self;                                        // who runs

// The kernel in question is at fault: ends the launch with an exception (std::runtime_error on the host side).
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ------------------------------------------------------------------------------------------------------------ launches

void run(const void* kernel, void (*body)(void*), void* arguments, dim3 grid, dim3 block, int64_t shared_bytes, dim3 cluster);

template <class... P, class... A>
void start(dim3 grid, dim3 block, int64_t shared_bytes, dim3 cluster, void (*kernel)(P...), const A&... a) {
  auto call = [&] { kernel(a...); };
  run(reinterpret_cast<const void*>(kernel), [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call, grid, block, shared_bytes, cluster);
}
// kernel<<<grid, block, shared_bytes, stream>>>(a...)
struct Launch {
  dim3 grid, block;
  int64_t shared_bytes;
  Launch(dim3 grid, dim3 block, int64_t shared_bytes = 0, cudaStream_t = nullptr) : grid(grid), block(block), shared_bytes(shared_bytes) {}
  template <class... P, class... A>
  void of(void (*kernel)(P...), const A&... a) const {
    start(grid, block, shared_bytes, dim3(1), kernel, a...);
  }
};
template <class... P, class... A>
cudaError_t start(const cudaLaunchConfig_t* c, void (*kernel)(P...), const A&... a) {
  dim3 cluster(1);
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) continue;  // a kernel ends before the next one begins
    if (c->attrs[i].id != cudaLaunchAttributeClusterDimension) fail("a launch attribute that is not emulated: %d", int(c->attrs[i].id));
    cluster = dim3(c->attrs[i].val.clusterDim.x, c->attrs[i].val.clusterDim.y, c->attrs[i].val.clusterDim.z);
  }
  start(c->gridDim, c->blockDim, int64_t(c->dynamicSmemBytes), cluster, kernel, a...);
  return cudaSuccess;
}

// An H200.
inline cudaError_t get_device(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t get_attribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: fail("a device attribute that is not emulated: %d", int(what));
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t occupancy(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------ shared memory

void* dynamic_shared(int64_t alignment);
void* static_shared(const void* key, int64_t bytes, int64_t alignment);   // the same for all threads of a block that bring the same key
uint32_t address_of(const void* p);                        // in the block's window
void* at(uint32_t address, uint32_t bytes);
inline void load_two(float* a, float* b, uint32_t address) {
  const float* const from = static_cast<const float*>(at(address, 8));
  *a = from[0], *b = from[1];
}
inline void add_four(float4* to, float x, float y, float z, float w) { to->x += x, to->y += y, to->z += z, to->w += w; }

// ------------------------------------------------------------------------------------------------------------ warps and blocks

// Lanes of `mask` meet; the last one calls f with what each brought. aligned: one instruction for all of them, at one place in the code; else nullptr.
using Meeting = void (*)(void* const (&brought)[32], uint32_t mask);
void meet(uint32_t mask, Meeting f, void* mine, const void* aligned = nullptr);

void sync(int id, int threads);
void sync_all();
int sync_or(int value);
inline void syncwarp(uint32_t mask = ~0u) {
  meet(mask, [](void* const(&)[32], uint32_t) {}, nullptr);
}

template <class T>
T shuffle(uint32_t mask, T x, int from) {
  struct Mine {
    T x, got;
    int from;
  } mine{x, x, from & 31};
  meet(
      mask,
      [](void* const(&brought)[32], uint32_t mask) {
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) {
            auto* own = static_cast<Mine*>(brought[l]);
            if (!(mask >> own->from & 1)) fail("a shuffle from lane %d, which does not take part", own->from);
            own->got = static_cast<Mine*>(brought[own->from])->x;
          }
      },
      &mine);
  return mine.got;
}
uint32_t ballot(uint32_t mask, bool x);
template <class T>
T reduce_max(uint32_t mask, T x) {
  meet(
      mask,
      [](void* const(&brought)[32], uint32_t mask) {
        T top = *static_cast<T*>(brought[std::countr_zero(mask)]);
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) top = *static_cast<T*>(brought[l]) > top ? *static_cast<T*>(brought[l]) : top;
        for (int l = 0; l < 32; ++l)
          if (mask >> l & 1) *static_cast<T*>(brought[l]) = top;
      },
      &x);
  return x;
}

void cluster_arrive();
void cluster_wait();
uint32_t mapa(uint32_t address, uint32_t rank);
void store_async(uint32_t to, uint32_t value, uint32_t barrier);   // both of the cluster's
void store_four_async(uint32_t to, float a, float b, float c, float d, uint32_t barrier);

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_there(uint32_t barrier);              // one of the cluster's
void mbarrier_expect(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);

// ------------------------------------------------------------------------------------------------------------ asynchronous copies

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void bulk_store(void* to, uint32_t from, uint32_t bytes);
// Boxes of a tensor map, that encode() has made, with 128-byte rows whose pieces are permuted.
void tensor_load(uint32_t to, const CUtensorMap* map, std::initializer_list<int> at, uint32_t barrier);
void tensor_store(const CUtensorMap* map, std::initializer_list<int> at, uint32_t from);
cudaError_t driver_function(const char* name, void** function, cudaDriverEntryPointQueryResult* result);
void bulk_commit();
void bulk_wait(bool only_read);
void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t read);
void copy_commit();
void copy_wait(int pending);

// ------------------------------------------------------------------------------------------------------------ matrices

void load_matrix(bool transposed, uint32_t* r, const uint32_t* last, uint32_t from);
void store_matrix(bool transposed, uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
enum Kind { kBf16, kF16, kTf32 };
// c .. last: the accumulators of a thread, which have to be neighbours in memory.
void mma(Kind kind, float* c, const float* last, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
void wgmma_ss(Kind kind, int n, float* c, const float* last, uint64_t a, uint64_t b, int add, bool a_transposed, bool b_transposed);
void wgmma_rs(Kind kind, int n, float* c, const float* last, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool b_transposed);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

// ------------------------------------------------------------------------------------------------------------ arithmetic

inline uint32_t to_tf32(float x) { return (std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u; }
inline float exp2_ftz(float x) {
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float fast_divide(float x, float y) { return x / y; }
inline float rounded(float x) {                            // no part of an fma
  asm("" : "+x"(x));
  return x;
}

}  // namespace emulation

#define threadIdx (::emulation::self->thread)
#define blockIdx (::emulation::self->block->index)
#define __syncthreads() ::emulation::sync_all()
#define __syncthreads_or(x) ::emulation::sync_or(x)
#define __syncwarp(...) ::emulation::syncwarp(__VA_ARGS__)
#define __shfl_sync(mask, x, from) ::emulation::shuffle(mask, x, from)
#define __shfl_xor_sync(mask, x, other) ::emulation::shuffle(mask, x, ::emulation::self->lane ^ (other))
#define __ballot_sync(mask, x) ::emulation::ballot(mask, x)
#define __any_sync(mask, x) (::emulation::ballot(mask, x) != 0)
#define __all_sync(mask, x) (::emulation::ballot(mask, !(x)) == 0)
#define __reduce_max_sync(mask, x) ::emulation::reduce_max(mask, x)
#define __cvta_generic_to_shared(p) ::emulation::address_of(p)
#define __fdividef(x, y) ::emulation::fast_divide(x, y)
#define __frcp_rn(x) (1.f / (x))
#define __log2f(x) ::log2f(x)
#define __fadd_rn(x, y) ::emulation::rounded((x) + (y))
#define __fmul_rn(x, y) ::emulation::rounded((x) * (y))
#define __ffs(x) __builtin_ffs(x)
#define __ffsll(x) __builtin_ffsll(x)
#define __clzll(x) ((x) ? __builtin_clzll(x) : 64)
#define __uint_as_float(x) std::bit_cast<float>(static_cast<uint32_t>(x))
#define __float_as_uint(x) std::bit_cast<uint32_t>(static_cast<float>(x))
#define __int_as_float(x) std::bit_cast<float>(static_cast<int32_t>(x))
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
using std::isnan;
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

#define cudaGetDevice ::emulation::get_device
#define cudaSetDevice(device) cudaSuccess
#define cudaGetDriverEntryPointByVersion(name, function, version, flags, result) ::emulation::driver_function(name, function, result)
#define cudaDeviceGetAttribute ::emulation::get_attribute
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor ::emulation::occupancy
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaMemsetAsync(to, value, size, stream) (std::memset(to, value, size), static_cast<void>(stream), cudaSuccess)
#define cudaGetErrorString(error) "an error"
#define cudaLaunchKernelEx ::emulation::start
