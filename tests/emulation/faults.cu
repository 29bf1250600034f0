// Small kernels, each right (fault == none) or with one fault of a kind that a GPU may hide: test_emulation.py wants each of them noticed.
#include <stdexcept>
#include <string>
#include <string_view>

#include "cuda/core/hopper.cuh"

namespace {

using namespace gsa::cuda;
using namespace gsa::cuda::hopper;

constexpr int kThreads = 128, kRounds = 8;

// o[i] = sum of x over all rounds, each time taken from the thread on the other side of the block.
template <bool barrier_between_rounds, bool barrier_in_rounds>
__global__ void exchange_kernel(const float* x, float* o) {
  __shared__ float shared[kThreads];
  float sum = 0.f;
  for (int round = 0; round < kRounds; ++round) {
    shared[threadIdx.x] = x[round * kThreads + threadIdx.x];
    if (barrier_in_rounds) __syncthreads();
    sum += shared[kThreads - 1 - threadIdx.x];
    if (barrier_between_rounds) __syncthreads();
  }
  o[threadIdx.x] = sum;
}
// The same within warps.
template <bool together>
__global__ void exchange_in_warps_kernel(const float* x, float* o) {
  __shared__ float shared[kThreads];
  float sum = 0.f;
  for (int round = 0; round < kRounds; ++round) {
    shared[threadIdx.x] = x[round * kThreads + threadIdx.x];
    if (together) __syncwarp();
    sum += shared[threadIdx.x ^ 31];
    __syncwarp();
  }
  o[threadIdx.x] = sum;
}

enum class Barrier { right, a_warp_short, from_two_places, two_counts, some_lanes };
template <Barrier kind>
__global__ void barrier_kernel(const float* x, float* o) {
  const int tid = threadIdx.x;
  if (kind == Barrier::a_warp_short && tid >= 96) return;
  if (kind == Barrier::from_two_places && tid % 2) {
    o[tid] = x[tid];
    sync(1, kThreads);
    return;
  }
  if (kind == Barrier::some_lanes && tid == 5) o[tid] = x[tid], __syncwarp();
  sync(1, kind == Barrier::two_counts && tid < 64 ? 64 : kThreads);
  o[tid] = x[tid];
}

enum class Copy {
  right,
  no_wait,
  no_barrier,
  into_what_is_read,
  ends_before_stores,
  store_source_written,
  barrier_not_initialised,
  arrival_too_many,
  odd_address
};
template <Copy kind>
__global__ void bulk_kernel(const float* x, float* o) {
  extern __shared__ __align__(1024) char memory[];
  float* tile = reinterpret_cast<float*>(memory);
  uint64_t* full = reinterpret_cast<uint64_t*>(memory + kThreads * 4);
  const int tid = threadIdx.x;
  if (tid == 0 && kind != Copy::barrier_not_initialised) init(full, 1);
  __syncthreads();
  for (int round = 0; round < kRounds; ++round) {
    if (tid == 0) {
      arrive_expecting(full, kThreads * 4);
      bulk_load(kind == Copy::odd_address ? tile + 1 : tile, x + round * kThreads, kThreads * 4, full);
      if (kind == Copy::arrival_too_many) arrive(full), arrive(full);
    }
    if (kind != Copy::no_wait) wait(full, round & 1);
    if (kind == Copy::no_wait) __syncwarp();
    const float y = tile[tid ^ 32];
    if (kind != Copy::into_what_is_read) __syncthreads();
    tile[tid] = 2 * y;
    if (kind != Copy::no_barrier) __syncthreads();
    if (tid == 0) {
      bulk_store<kThreads * 4>(o + round * kThreads, tile);
      bulk_commit();
      if (kind != Copy::store_source_written && (kind != Copy::ends_before_stores || round + 1 < kRounds)) bulk_wait();
    }
    if (kind == Copy::store_source_written) tile[tid] = -1.f;
    __syncthreads();
    if (kind == Copy::store_source_written && tid == 0) bulk_wait();
  }
}

// By cp.async: each thread reads what its neighbour has brought.
template <bool waits>
__global__ void copies_kernel(const float* x, float* o) {
  __shared__ __align__(16) float tile[kThreads * 4];
  const uint32_t to = address(tile + threadIdx.x * 4);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + threadIdx.x * 4) : "memory");
  cp_async_commit();
  if (waits) cp_async_wait_for<0>();
  __syncthreads();
  o[threadIdx.x] = tile[(threadIdx.x ^ 33) * 4];
}

enum class Products { right, no_wait, written_in_flight, tile_overwritten, ends_in_flight, beyond_memory };
// o = A A^T of a tile of ones: 64 everywhere.
template <Products kind>
__global__ void products_kernel(const float*, float* o) {
  extern __shared__ __align__(1024) char memory[];
  bf16* tile = reinterpret_cast<bf16*>(memory);
  for (int i = threadIdx.x; i < kTile; i += kThreads) tile[i] = from_float<bf16>(1.f);
  publish();
  __syncthreads();
  float c[8][4];
  products_begin();
  const bf16* b = kind == Products::beyond_memory ? tile + 1024 : tile;
  product<bf16, 4, 0, 0>(c, kmajor(tile), kmajor(b), false);
  products_commit();
  if (kind == Products::written_in_flight) c[3][1] = 0.f, hand_over(c);
  if (kind == Products::tile_overwritten) tile[threadIdx.x] = from_float<bf16>(0.f);
  if (kind != Products::no_wait && kind != Products::ends_in_flight) products_wait<0>();
  for (int t = 0; t < 8; ++t)
    for (int e = 0; e < 4; ++e) o[(t * 4 + e) * kThreads + threadIdx.x] = kind == Products::ends_in_flight ? 64.f : c[t][e];
  if (kind == Products::no_wait) products_wait<0>();
}

enum class Cluster { right, nobody_waits, sends_at_once, ends_early };
// Two blocks send each other x.
template <Cluster kind>
__global__ void cluster_kernel(const float* x, float* o) {
  __shared__ float got[kThreads];
  __shared__ uint64_t arrived;
  const int rank = blockIdx.x & 1, tid = threadIdx.x;
  if (kind == Cluster::ends_early && rank == 1) return;
  if (tid == 0) init(&arrived, 1), arrive_expecting(&arrived, kThreads * 4);
  __syncthreads();
  if (kind != Cluster::sends_at_once) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
  asm volatile(
      "{\n.reg .b32 data, barrier;\n"
      "mapa.shared::cluster.u32 data, %0, %3;\n"
      "mapa.shared::cluster.u32 barrier, %1, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [data], %2, [barrier];\n}" ::"r"(address(got + tid)),
      "r"(address(&arrived)), "r"(__float_as_uint(x[blockIdx.x * kThreads + tid])), "r"(rank ^ 1)
      : "memory");
  if (kind != Cluster::nobody_waits) wait(&arrived, 0);
  o[blockIdx.x * kThreads + tid] = got[tid];
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Past the end of o: for AddressSanitizer.
__global__ void beyond_kernel(const float* x, float* o) { o[kRounds * kThreads * 4 + threadIdx.x] = x[threadIdx.x]; }

void pair(void (*kernel)(const float*, float*), const float* x, float* o) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(4), config.blockDim = dim3(kThreads), config.attrs = &cluster, config.numAttrs = 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, x, o), "pair");
}

void launch_one(std::string_view name, const float* x, float* o) {
  auto one = [&](void (*kernel)(const float*, float*), int64_t shared = 0) { launch("one", kernel, 1, kThreads, shared, nullptr, x, o); };
  const int64_t bulk = kThreads * 4 + 8, tile = kTile * 2;
  if (name == "exchange") one(exchange_kernel<true, true>);
  else if (name == "exchange: no barrier before reading") one(exchange_kernel<true, false>);
  else if (name == "exchange: no barrier before writing again") one(exchange_kernel<false, true>);
  else if (name == "exchange in warps") one(exchange_in_warps_kernel<true>);
  else if (name == "exchange in warps: no __syncwarp") one(exchange_in_warps_kernel<false>);
  else if (name == "barrier") one(barrier_kernel<Barrier::right>);
  else if (name == "barrier: a warp short") one(barrier_kernel<Barrier::a_warp_short>);
  else if (name == "barrier: from two places") one(barrier_kernel<Barrier::from_two_places>);
  else if (name == "barrier: two counts") one(barrier_kernel<Barrier::two_counts>);
  else if (name == "barrier: some lanes") one(barrier_kernel<Barrier::some_lanes>);
  else if (name == "bulk") one(bulk_kernel<Copy::right>, bulk);
  else if (name == "bulk: no wait") one(bulk_kernel<Copy::no_wait>, bulk);
  else if (name == "bulk: no barrier before the store") one(bulk_kernel<Copy::no_barrier>, bulk);
  else if (name == "bulk: written while others read") one(bulk_kernel<Copy::into_what_is_read>, bulk);
  else if (name == "bulk: ends before its stores") one(bulk_kernel<Copy::ends_before_stores>, bulk);
  else if (name == "bulk: what is stored is written") one(bulk_kernel<Copy::store_source_written>, bulk);
  else if (name == "bulk: an mbarrier that is not initialised") one(bulk_kernel<Copy::barrier_not_initialised>, bulk);
  else if (name == "bulk: an arrival too many") one(bulk_kernel<Copy::arrival_too_many>, bulk);
  else if (name == "bulk: an odd address") one(bulk_kernel<Copy::odd_address>, bulk);
  else if (name == "bulk: beyond its memory") one(bulk_kernel<Copy::right>, bulk - 8);
  else if (name == "copies") one(copies_kernel<true>);
  else if (name == "copies: no wait") one(copies_kernel<false>);
  else if (name == "products") one(products_kernel<Products::right>, tile);
  else if (name == "products: no wait") one(products_kernel<Products::no_wait>, tile);
  else if (name == "products: accumulators written in flight") one(products_kernel<Products::written_in_flight>, tile);
  else if (name == "products: operand written in flight") one(products_kernel<Products::tile_overwritten>, tile);
  else if (name == "products: ends in flight") one(products_kernel<Products::ends_in_flight>, tile);
  else if (name == "products: beyond its memory") one(products_kernel<Products::beyond_memory>, tile);
  else if (name == "cluster") pair(cluster_kernel<Cluster::right>, x, o);
  else if (name == "cluster: nobody waits") pair(cluster_kernel<Cluster::nobody_waits>, x, o);
  else if (name == "cluster: sends before everybody is there") pair(cluster_kernel<Cluster::sends_at_once>, x, o);
  else if (name == "cluster: one ends early") pair(cluster_kernel<Cluster::ends_early>, x, o);
  else if (name == "beyond the end of a tensor") one(beyond_kernel);
  else throw std::runtime_error("no such kernel");
}

}  // namespace

// x, o: [kRounds * kThreads * 4]. What is reported, or nothing.
extern "C" __attribute__((visibility("default"))) const char* gsa_emulation_fault(const char* name, const float* x, float* o) {
  static std::string said;
  said.clear();
  try {
    launch_one(name, x, o);
  } catch (const std::exception& e) { said = e.what(); }
  return said.c_str();
}
