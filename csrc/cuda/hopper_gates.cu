// Chunked forward and backward for Hopper (sm_90a): what of a chunk depends on its gates alone (GateImage, core/hopper.cuh), made once for all kernels that need
// it. One block for each chunk and key/value head. A chunk that has to be cut into several windows only says so.
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256;

template <class E>
struct GatesShared {
  E S[2][kTile];
  float R[kTile];
  typename GateMaker<E, 8>::Scratch scratch;
};

template <class E>
__global__ __launch_bounds__(kThreads, 4) void gates_kernel(const __grid_constant__ Params p, GateImage<E>* images) {
#if GSA_HOPPER
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<GatesShared<E>*>(memory);
  const int head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, kChunk, c)) return;
  GateImage<E>& image = images[c.slot * p.H + head];
  GateMaker<E, 8> gates(m.scratch, threadIdx.x, 1);
  gates.load(p, c, head);
  float before[2], total[2];
  gates.sums(0, c.length, before, total);
  const bool cut = !gates.safe(total) && gates.cut(c.length) != 1;
  if (threadIdx.x == 0) image.cut = cut;
  if (cut) return;
  if (gates.warp == 0) gates.store_edges(image.start, image.in, image.out, total);
  gates.make(0, c.length, before, total);
  gates.store_tiles(m.S[0], m.R);
  publish();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(image.S, m.S, sizeof(image.S));
    bulk_commit();
  }
  const int tid = threadIdx.x % 128, row = tid / 32 * 16 + frag_row(), half = threadIdx.x / 128;
#pragma unroll
  for (int t = half * 4; t < half * 4 + 4; ++t) {
    const int column = t * 8 + frag_col();
    const float2 top = *reinterpret_cast<const float2*>(m.R + R_at(row, column)), bottom = *reinterpret_cast<const float2*>(m.R + R_at(row + 8, column));
    reinterpret_cast<float4*>(image.R)[t * 128 + tid] = make_float4(top.x, top.y, bottom.x, bottom.y);
  }
  if (threadIdx.x == 0) bulk_wait();
#endif
}

}  // namespace

void hopper_gates(const Params& p, void* images) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  auto run = [&]<class E>(E) {
    launch("hopper_gates", gates_kernel<E>, slots * p.H, kThreads, sizeof(GatesShared<E>), p.stream, p, static_cast<GateImage<E>*>(images));
  };
  p.q.dtype == DType::bf16 ? run(bf16()) : run(half());
}

int64_t hopper_gates_bytes(const Params& p) {
  return boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H * static_cast<int64_t>(sizeof(GateImage<half>));
}

}  // namespace gsa::cuda
