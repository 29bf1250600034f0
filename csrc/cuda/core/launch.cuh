// Host side of every launch: errors become exceptions (RuntimeError in Python), large shared memory is asked for.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "../../params.h"

namespace gsa::cuda {

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("gsa_ext: ") + what + ": " + cudaGetErrorString(e));
}

// A GPU below sm_80 has none of the instructions the kernels are made of.
inline void require_device() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (major < 8)
    throw std::runtime_error("gsa_ext: the CUDA kernels need compute capability 8.0 or newer, found " + std::to_string(major) + "." + std::to_string(minor) +
                             "; built for " GSA_BUILT_ARCHS ". Use the CPU, or a newer GPU");
}

// Shared memory that a block can have on the current device, in bytes. GSA_SHARED_MEMORY=101376 in the environment makes a large GPU take the
// configurations of a small one, so that they can be tested there.
inline int shared_memory() {
  if (const char* forced = std::getenv("GSA_SHARED_MEMORY")) return std::atoi(forced);
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Which of the chunk kernels run: GSA_KERNELS=portable, =hopper (walks, where there is one), =segments (walks of several segments of a sequence), =parts (for
// Hopper, never a walk; the scans over chunks in one kernel) or =few (the same, the scans as for few heads: hopper_few.cu) in the environment, for tests and measurements; else
// whichever is the fastest.
enum class Kernels { automatic, portable, hopper, segments, parts, few };
inline Kernels wanted_kernels() {
  const char* name = std::getenv("GSA_KERNELS");
  const std::string_view x = name ? name : "";
  for (const auto& [kernels, called] : {std::pair(Kernels::portable, "portable"), std::pair(Kernels::hopper, "hopper"),
                                        std::pair(Kernels::segments, "segments"), std::pair(Kernels::parts, "parts"), std::pair(Kernels::few, "few")})
    if (x == called) return kernels;
  return Kernels::automatic;
}

// Multiprocessors of the current device, if it runs code for sm_90a and this build has any; else 0.
inline int hopper_multiprocessors() {
  if (std::string_view(GSA_BUILT_ARCHS).find("9.0a") == std::string_view::npos) return 0;
  int device = 0, major = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return major == 9 ? count : 0;
}

inline void check_launch(cudaError_t e, const char* name) {
  if (e == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(std::string("gsa_ext: ") + name +
                             ": this build has no kernels for this GPU (built for " GSA_BUILT_ARCHS
                             "); reinstall with TORCH_CUDA_ARCH_LIST set to its compute capability");
  check(e, name);
}

template <class Kernel>
bool prepare_launch(const char* name, Kernel kernel, int64_t blocks, int64_t shared) {
  if (blocks <= 0) return false;
  if (blocks > 2147483647LL) throw std::runtime_error(std::string("gsa_ext: ") + name + ": more than 2^31 - 1 blocks of work; split the batch");
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  return true;
}

template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, int64_t blocks, int threads, int64_t shared, void* stream, const Args&... args) {
  if (!prepare_launch(name, kernel, blocks, shared)) return;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check_launch(cudaGetLastError(), name);
}

// The same for a kernel that begins with after_the_last_kernel() (core/hopper.cuh): its blocks may be on their way to the multiprocessors while the kernel before it ends.
template <class Kernel, class... Args>
void launch_early(const char* name, Kernel kernel, int64_t blocks, int threads, int64_t shared, void* stream, const Args&... args) {
#ifdef __CUDACC__
  if (!prepare_launch(name, kernel, blocks, shared)) return;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks), config.blockDim = threads, config.dynamicSmemBytes = shared,
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early, config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, args...), name);
#else
  launch(name, kernel, blocks, threads, shared, stream, args...);
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gsa::cuda
