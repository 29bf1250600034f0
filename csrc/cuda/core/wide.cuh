// Hopper (sm_90a), heads of 256 and 512 dimensions: what hopper_wide_*.cu share. A block has a chunk and streams over slices of 64 dimensions, which one thread sends
// for two steps ahead; what is summed over all dimensions stays in registers.
#pragma once
#include "exact.cuh"

namespace gsa::cuda::hopper {

constexpr int kWideThreads = 256;

// Blocks by time, then sequence: what a scan over the chunks touched last is in the L2 still, and comes first. The slot of the i-th.
[[maybe_unused]] __device__ inline int64_t slot_by_time(const Params& p, uint32_t i, bool last_first) {
  if (p.cu_seqlens) return i;
  const uint32_t each = static_cast<uint32_t>(p.T / kChunk + 2), count = static_cast<uint32_t>(p.N), chunk = i / count;
  return int64_t(i % count) * each + (last_first ? each - 1 - chunk : chunk);
}
// The stages of a stream, by turns. Of each: what is in it has arrived; every thread is done with it (not one of each warp for the others: racecheck would not see that).
struct Stream {
  static constexpr int stages = 3;
  uint64_t full[stages], free[stages];
  __device__ void init() {
    for (int i = 0; i < stages; ++i) hopper::init(full + i, 1), hopper::init(free + i, kWideThreads);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // By one thread: f(stage, barrier) sends for so many bytes.
  template <class F>
  __device__ void send(int step, uint32_t bytes, F&& f) {
    const int stage = step % stages;
    if (step >= stages) wait(free + stage, (step / stages - 1) & 1);
    arrive_expecting(full + stage, bytes);
    f(stage, full + stage);
  }
  __device__ int arrived(int step) {
    wait(full + step % stages, step / stages & 1);
    return step % stages;
  }
  __device__ void done(int step) { arrive(free + step % stages); }
};

// The warp's 16 rows of a tile as an operand, and of its transpose.
template <class E>
__device__ inline void load_operand(typename Arith<E>::template Op<64>& x, const E* tile, int warp) {
  const uint32_t from = place(tile, warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4<false>(x.r[k], from ^ (k * 32));
}
template <class E>
__device__ inline void load_transposed(typename Arith<E>::template Op<64>& x, const E* tile, int warp) {
  const int l = lane_id();
  const uint32_t from = place(tile, (l & 7) + (l >> 4) * 8, 0) ^ ((warp * 2 + ((l >> 3) & 1)) * 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4<true>(x.r[k], from + k * 16 * 128);
}

// Columns from `column` on: keeps x[i, j] with i - j >= least.
template <int least>
__device__ inline void keep_lower(float (&x)[4][4], int warp, int column) {
  const int i = warp * 16 + frag_row() - frag_col() - column;
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i - (t * 8 + (e & 1) - (e >> 1) * 8) < least) x[t][e] = 0.f;
}

}  // namespace gsa::cuda::hopper
