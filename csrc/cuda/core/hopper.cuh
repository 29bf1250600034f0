// Hopper (sm_90a): asynchronous warpgroup products (wgmma) over swizzled tiles in shared memory, barriers between warpgroups, and what the fused
// kernels of both directions share: the gates of a window of tokens and the first half of either pass.
//
// Tiles. 16-bit elements, 64 columns: row r is 128 bytes at 128 r, its eight 16-byte pieces permuted by r % 8 (SWIZZLE_128B), 1024-byte aligned. A matrix
// of D columns is D / 64 such tiles, one after the other. A tile is an operand as it lies ("kmajor": its columns are summed over) or transposed
// ("mnmajor": its rows are summed over).
//
// Windows. The products of a chunk are taken relative to a reference in the middle of its gates,
//     exp(G_i - G_j) = R_i (exp(ref - G_j)),      R_i = exp(G_i - ref),      S_j = s_j exp(ref - G_j),
// which is safe while the gates of no slot span more than `limit` over it: where i >= j the product is at most 1, what overflows elsewhere is not kept, and
// either factor leaves room for the numbers it goes with. A chunk in which they span more is cut into windows in which they do not; the first gate of a window
// counts for the state only, so that a window of one token always exists and a reset (-inf) is the first of its window. Tokens outside the window have
// R = S = 0: the walks do one window after the other over the same tiles of 64 tokens. One form for all gates, nothing is clamped. The parts do such a chunk
// as a whole, token by token: core/exact.cuh.
//
// Banks. 64 slots of a key/value head: M up to 128 is one or two. What depends on gates, and states, a bank has for itself; its windows are those of the head.
#pragma once
#include "../hopper.h"
#include "chunk.cuh"
#include "tile_io.cuh"

namespace gsa::cuda::hopper {

constexpr int kChunk = 64, kSlots = 64, kTile = 64 * 64;   // tokens, slots of a bank (padded); elements of a [64 x 64] tile
__host__ __device__ inline int banks_of(const Params& p) { return p.M > kSlots ? 2 : 1; }
constexpr int ldr = kSlots + 8;                            // row stride of R

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GSA_HOPPER 1
#else
#define GSA_HOPPER 0
#endif

__device__ inline uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A value that is in a register from here on: neither is its arithmetic done again wherever it is used, nor all that follows from it long before.
template <class T>
__device__ inline T* kept(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}
__device__ inline int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// In a register of its own. A copy that the compiler sees through it makes late, and waits for the products that x is handed to before it does.
__device__ inline float copy(float x) {
  float y;
  asm volatile("mov.b32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// How a kernel that launch_early launches begins, before it reads or writes any memory: the one before it has ended; the one after it may be brought.
__device__ inline void after_the_last_kernel() {
#if GSA_HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------------ barriers

__device__ inline void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}
__device__ inline void arrive(uint64_t* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory"); }
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}
// All `threads` threads that name this barrier.
__device__ inline void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Before a barrier. What this thread wrote to shared memory is seen by products that start after it, and what it reads there has been read before the copy engine, told by
// the barrier, overwrites it: an arrival by itself does not wait for loads whose values are used later (a place freed without this was seen to be overwritten first).
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// One arrival for each warp.
__device__ inline void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (lane_id() == 0) arrive(barrier);
}

// Bulk copies of whole tiles: to shared memory, counted by a barrier that is told how many bytes to expect; to memory, in groups of the thread.
__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
__device__ inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)), "l"(from), "r"(bytes),
               "r"(address(barrier))
               : "memory");
}
// In pieces: of larger ones compute-sanitizer's initcheck misses a part.
template <uint32_t bytes>
__device__ inline void bulk_store(void* to, const void* from) {
  constexpr uint32_t piece = 8192;
  static_assert(bytes % 16 == 0);
#pragma unroll
  for (uint32_t i = 0; i < bytes; i += piece)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(static_cast<char*>(to) + i), "r"(address(from) + i),
                 "r"(std::min(piece, bytes - i))
                 : "memory");
}
// As far as the L2.
__device__ inline void bulk_prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// Boxes of a tensor map: 64 columns of a head's tokens; 64 slots of 64 rows of states.
__device__ inline void load_box(void* to, const CUtensorMap& map, int column, int head, int token, int batch, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(address(to)), "l"(&map),
               "r"(column), "r"(head), "r"(token), "r"(batch), "r"(address(barrier))
               : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)), "l"(&map),
               "r"(column), "r"(row), "r"(address(barrier))
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// What the groups of this thread read may be overwritten.
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

template <int registers>
__device__ inline void give_registers() {
#if GSA_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
__device__ inline void take_registers() {
#if GSA_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// The sequence that is `rank`-th by length, for walks: packed sequences begin with the longest, so that none of them is alone in the end. Many, where finding it takes
// too long, begin with the first. By a whole block, before anything else; `found`: of shared memory.
[[maybe_unused]] __device__ inline int64_t longest_first(const Params& p, int64_t rank, int& found) {
  if (!p.cu_seqlens || p.N > 256) return rank;
  auto length = [&](int i) { return max(bound(p, i + 1) - bound(p, i), int64_t(0)); };
  if (const int i = threadIdx.x; i < p.N) {
    const int64_t own = length(i);
    int before = 0;
#pragma unroll 1
    for (int j = 0; j < static_cast<int>(p.N); ++j) {
      const int64_t other = length(j);
      before += other > own || (other == own && j < i);
    }
    if (before == rank) found = i;
  }
  __syncthreads();
  return found;
}

// ------------------------------------------------------------------------------------------------------------ products

struct Operand {
  uint64_t base;
  int group;                                               // 16-byte units from one run of four steps to the next (kmajor)
  bool transposed;
  __device__ uint64_t step(int k) const { return base + (transposed ? k * 128 : (k & 3) * 2 + (k >> 2) * group); }
};
__device__ inline uint64_t descriptor(const void* tile, int stride) {
  return ((address(tile) & 0x3ffffu) >> 4) | (static_cast<uint64_t>(stride >> 4) << 16) | (static_cast<uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}
// X[mn][k] = tiles[k / 64][mn][k % 64], each of `rows` rows.
__device__ inline Operand kmajor(const void* tiles, int rows = 64) { return {descriptor(tiles, 16), rows * 8, false}; }
// X[mn][k] = tiles[mn / 64][k][mn % 64].
__device__ inline Operand mnmajor(const void* tiles) { return {descriptor(tiles, kTile * 2), 0, true}; }

// acc[t][0..1]: row lane / 4 of the warp's 16, columns 8 t + 2 (lane % 4) + {0, 1}; acc[t][2..3]: row lane / 4 + 8. As in core/mma.cuh.
#define GSA_ACC4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define GSA_ACC32(c, i) \
  GSA_ACC4(c, i), GSA_ACC4(c, i + 1), GSA_ACC4(c, i + 2), GSA_ACC4(c, i + 3), GSA_ACC4(c, i + 4), GSA_ACC4(c, i + 5), GSA_ACC4(c, i + 6), GSA_ACC4(c, i + 7)
#define GSA_ACC8(c) GSA_ACC4(c, 0), GSA_ACC4(c, 1)
#define GSA_ACC16(c) GSA_ACC4(c, 0), GSA_ACC4(c, 1), GSA_ACC4(c, 2), GSA_ACC4(c, 3)
#define GSA_REGS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GSA_REGS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GSA_REGS32                                                                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define GSA_REGS64                                                                                                                                      \
  GSA_REGS32                                                                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63"
#define GSA_WGMMA_SS(shape, type, regs, a, b, d, ta, tb, ...)                                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " d ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" regs "}, " a ", " b \
               ", p, 1, 1, " ta ", " tb ";\n}" __VA_ARGS__)
#define GSA_WGMMA_RS(shape, type, regs, a, b, tb, ...) \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" regs "}, " a ", " b ", 1, 1, 1, " tb ";" __VA_ARGS__)

// acc (+)= A B, A from shared memory.
template <class E, int NT, int TA, int TB>
__device__ inline void wgmma(float (&c)[NT][4], uint64_t a, uint64_t b, int add) {
#if GSA_HOPPER
  if constexpr (NT == 2) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_SS("m64n16k16", "bf16", GSA_REGS8, "%8", "%9", "%10", "%11", "%12", : GSA_ACC8(c) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
    else GSA_WGMMA_SS("m64n16k16", "f16", GSA_REGS8, "%8", "%9", "%10", "%11", "%12", : GSA_ACC8(c) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  } else if constexpr (NT == 4) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_SS("m64n32k16", "bf16", GSA_REGS16, "%16", "%17", "%18", "%19", "%20", : GSA_ACC16(c) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
    else GSA_WGMMA_SS("m64n32k16", "f16", GSA_REGS16, "%16", "%17", "%18", "%19", "%20", : GSA_ACC16(c) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  } else if constexpr (NT == 8) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_SS("m64n64k16", "bf16", GSA_REGS32, "%32", "%33", "%34", "%35", "%36", : GSA_ACC32(c, 0) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
    else GSA_WGMMA_SS("m64n64k16", "f16", GSA_REGS32, "%32", "%33", "%34", "%35", "%36", : GSA_ACC32(c, 0) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  } else {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_SS("m64n128k16", "bf16", GSA_REGS64, "%64", "%65", "%66", "%67", "%68", : GSA_ACC32(c, 0), GSA_ACC32(c, 8) : "l"(a), "l"(b), "r"(add), "n"(TA),
                   "n"(TB));
    else
      GSA_WGMMA_SS("m64n128k16", "f16", GSA_REGS64, "%64", "%65", "%66", "%67", "%68", : GSA_ACC32(c, 0), GSA_ACC32(c, 8) : "l"(a), "l"(b), "r"(add), "n"(TA),
                   "n"(TB));
  }
#endif
}
// acc += A B, A from registers.
template <class E, int NT, int TB>
__device__ inline void wgmma(float (&c)[NT][4], const uint32_t (&a)[4], uint64_t b) {
#if GSA_HOPPER
  if constexpr (NT == 2) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_RS("m64n16k16", "bf16", GSA_REGS8, "{%8, %9, %10, %11}", "%12", "%13", : GSA_ACC8(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                   "n"(TB));
    else
      GSA_WGMMA_RS("m64n16k16", "f16", GSA_REGS8, "{%8, %9, %10, %11}", "%12", "%13", : GSA_ACC8(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                   "n"(TB));
  } else if constexpr (NT == 4) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_RS("m64n32k16", "bf16", GSA_REGS16, "{%16, %17, %18, %19}", "%20", "%21", : GSA_ACC16(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                   "n"(TB));
    else
      GSA_WGMMA_RS("m64n32k16", "f16", GSA_REGS16, "{%16, %17, %18, %19}", "%20", "%21", : GSA_ACC16(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                   "n"(TB));
  } else if constexpr (NT == 8) {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_RS("m64n64k16", "bf16", GSA_REGS32, "{%32, %33, %34, %35}", "%36", "%37", : GSA_ACC32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                   "l"(b), "n"(TB));
    else
      GSA_WGMMA_RS("m64n64k16", "f16", GSA_REGS32, "{%32, %33, %34, %35}", "%36", "%37", : GSA_ACC32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                   "n"(TB));
  } else {
    if constexpr (std::is_same_v<E, bf16>)
      GSA_WGMMA_RS("m64n128k16", "bf16", GSA_REGS64, "{%64, %65, %66, %67}", "%68", "%69", : GSA_ACC32(c, 0), GSA_ACC32(c, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]), "l"(b), "n"(TB));
    else
      GSA_WGMMA_RS("m64n128k16", "f16", GSA_REGS64, "{%64, %65, %66, %67}", "%68", "%69", : GSA_ACC32(c, 0), GSA_ACC32(c, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]), "l"(b), "n"(TB));
  }
#endif
}

// Accumulators change hands between this thread and the products in flight.
template <int NT>
__device__ inline void hand_over(float (&c)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t) asm volatile("" : GSA_ACC4(c, t)::"memory");
}
__device__ inline void products_begin() {
#if GSA_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void products_commit() {
#if GSA_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int pending>
__device__ inline void products_wait() {
#if GSA_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// Between products_begin and products_commit: c (+)= A B, STEPS x 16 summed over.
template <class E, int STEPS, int TA, int TB, int NT>
__device__ inline void product(float (&c)[NT][4], const Operand& a, const Operand& b, bool add) {
#pragma unroll
  for (int k = 0; k < STEPS; ++k) wgmma<E, NT, TA, TB>(c, a.step(k), b.step(k), add || k > 0);
}
template <class E, int TB, int NT, int KD>
__device__ inline void product(float (&c)[NT][4], const typename Arith<E>::template Op<KD>& a, const Operand& b) {
#pragma unroll
  for (int k = 0; k < KD / 16; ++k) wgmma<E, NT, TB>(c, a.r[k], b.step(k));
}

// ------------------------------------------------------------------------------------------------------------ tiles

template <class E>
__device__ inline E* at(E* tile, int r, int c) {
  return tile + r * 64 + (((c >> 3) ^ (r & 7)) << 3) + (c & 7);
}
// The same for many columns of one row: place(tile, r, c) ^ 16 t is 8 t columns on (c < 8). Byte addresses in shared memory.
template <class E>
__device__ inline uint32_t place(const E* tile, int r, int c) {
  return kept(static_cast<int>(address(tile) + r * 128 + ((r & 7) << 4) + c * 2));
}
// Columns from `column` (0, 32, 64 ..) on of a matrix of tiles, as an mnmajor operand.
template <class E>
__device__ inline const E* columns(const E* tiles, int column) {
  return tiles + column / 64 * kTile + column % 64;
}
// Of an fp32 tile [64][64] whose 8-byte accesses by accumulators have no conflicts.
__device__ inline int R_at(int row, int column) { return row * 64 + (column ^ ((row & 7) << 3)); }
// *p, or 0: a load and no branch.
__device__ inline void load_if(bool valid, const void* p, uint32_t& x) {
  asm volatile("{\n.reg .pred valid;\nsetp.ne.u32 valid, %2, 0;\nmov.u32 %0, 0;\n@valid ld.global.nc.b32 %0, [%1];\n}" : "=r"(x) : "l"(p), "r"(int(valid)));
}

// Two neighbouring elements of 16 bits in shared memory; `offset` bytes further on.
template <class E, int offset = 0>
__device__ inline float2 pair_at(uint32_t p) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(x) : "r"(p), "n"(offset) : "memory");
  return unpack<E>(x);
}
// The sum of a tile and of the one after it: a value in two parts.
template <class E>
__device__ inline float2 both_at(uint32_t p) {
  const float2 hi = pair_at<E>(p), lo = pair_at<E, kTile * 2>(p);
  return make_float2(hi.x + lo.x, hi.y + lo.y);
}

// 64 tokens of a head, D columns from `column` on, zero where the chunk has ended: 128 D bytes for the barrier. By one thread. eights: of a packed chunk that is
// not whole eight at a time, not one by one, where there are eight or none. In the kernels of backward but the scan it costs registers.
template <int D, bool eights = false, class E>
__device__ inline void bring_tokens(E* tiles, const TokenMap& map, const Params& p, const Chunk& c, int head, uint64_t* barrier, int column = 0) {
  const int first = static_cast<int>(c.first), batch = static_cast<int>(c.batch);
  if (!p.reverse && (c.length == kChunk || !p.cu_seqlens)) {  // what is not packed ends with the tensor
#pragma unroll
    for (int g = 0; g < D / 64; ++g) load_box(tiles + g * kTile, map.tokens, column + g * 64, head, first, batch, barrier);
  } else {
#pragma unroll 1
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (eights)
        if (!p.reverse && i % 8 == 0 && (c.length - i >= 8 || c.length <= i)) {
#pragma unroll
          for (int g = 0; g < D / 64; ++g)
            load_box(tiles + g * kTile + i * 64, map.eight, column + g * 64, head, i < c.length ? first + i : -8, batch, barrier);
          i += 7;
          continue;
        }
#pragma unroll
      for (int g = 0; g < D / 64; ++g)
        load_box(tiles + g * kTile + i * 64, map.token, column + g * 64, head, i < c.length ? first + i * c.step : -1, batch, barrier);
    }
  }
}
// The rows of a bank of a boundary state [D][M] from `row` on, zero from slot M on: 128 D bytes. By one thread.
template <int D, class E>
__device__ inline void bring_state(E* tile, const CUtensorMap& map, int64_t row, uint64_t* barrier, int bank = 0) {
#pragma unroll
  for (int g = 0; g < D / 64; ++g) load_box(tile + g * kTile, map, bank * kSlots, static_cast<int>(row) + g * 64, barrier);
}
// 64 tokens of a head, D columns, zero from `rows` on. Asynchronous.
template <int D, int THREADS, class E>
__device__ inline void load_tokens(E* tiles, const Rows& src, int rows, int tid) {
  constexpr int across = D / 8, down = THREADS / across;     // rows of one turn; a multiple of 8, so that the swizzle stays
  int r = kept(tid) / across;
  const int c = tid % across;
  uint32_t to = address(at(tiles + c / 8 * kTile, r, c % 8 * 8));
  const E* from = kept(static_cast<const E*>(src.ptr) + src.at(r) + c * 8);
#pragma unroll 4
  for (int k = 0; k < 64 / down; ++k, r += down, to += down * 128, from += down * src.step) {
    const int bytes = r < rows ? 16 : 0;                      // 0: nothing is read, zeros are written
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  }
}
// As far as the L2.
__device__ inline void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// A bank of a boundary state [D][M], zero from slot M on.
template <int D, int THREADS, class E>
__device__ inline void load_state(E* tile, const E* src, int M, int tid, int bank = 0) {
  constexpr int down = THREADS / 8;
  const int r = kept(tid) / 8, c = tid % 8 * 8, slot = bank * kSlots + c, bytes = slot < M ? 16 : 0;
  uint32_t to = address(at(tile, r, c));
  const E* from = kept(src + r * M + (slot < M ? slot : 0));
#pragma unroll 4
  for (int k = 0; k < D / down; ++k, to += down * 128, from += down * M)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
template <int D, class E>
__device__ inline void store_state(E* dst, const E* tile, int M, int tid, int bank = 0) {
  const int r = tid / 8, c = tid % 8 * 8, slot = bank * kSlots + c;
  if (slot >= M) return;
  const E* from = at(tile, r, c);
  E* to = dst + r * M + slot;
#pragma unroll 4
  for (int k = 0; k < D / 16; ++k, from += 1024, to += 16 * M) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

// An operand of 16 rows and 64 columns into rows of its warp.
__device__ inline void stmatrix4(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if GSA_HOPPER
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#endif
}
__device__ inline void stmatrix4_trans(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if GSA_HOPPER
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#endif
}
// columns: the first one, 0 or 32.
template <class E, class Op>
__device__ inline void store_operand(E* tile, const Op& x, int warp, int column = 0) {
  const uint32_t p = place(tile, warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4) ^ (column * 2);
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(x.r) / 16); ++k) stmatrix4(p ^ (k * 32), x.r[k][0], x.r[k][1], x.r[k][2], x.r[k][3]);
}
template <class E, int NT>
__device__ inline typename Arith<E>::template Op<NT * 8> operand(const float (&x)[NT][4]) {
  typename Arith<E>::template Op<NT * 8> r;
  Arith<E>::template from_acc<NT * 8>(r, x, nullptr, 0);
  return r;
}
template <class E, int NT>
__device__ inline typename Arith<E>::template Split<NT * 8> split(const float (&x)[NT][4]) {
  typename Arith<E>::template Split<NT * 8> r;
  Arith<E>::template from_acc_split<NT * 8>(r, x, nullptr, 0);
  return r;
}
// The warp's rows of a tile in two parts, the other one after it, times f_m: an operand.
template <class E>
__device__ inline typename Arith<E>::template Op<64> operand_times(const E* tile, const float* f, int warp) {
  typename Arith<E>::template Op<64> x;
  const uint32_t from = place(tile, warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t hi[4], lo[4];
    ldmatrix4<false>(hi, from ^ (k * 32)), ldmatrix4<false>(lo, (from ^ (k * 32)) + kTile * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<E>(hi[i]), b = unpack<E>(lo[i]), y = *reinterpret_cast<const float2*>(f + k * 16 + (i >> 1) * 8 + frag_col());
      x.r[k][i] = pack<E>((a.x + b.x) * y.x, (a.y + b.y) * y.y);
    }
  }
  return x;
}
// 8 NT columns, from `column` (a multiple of 16) on, of the warp's rows of a tile in two parts, the other one after it: their sums, as accumulators lie.
template <class E, int NT>
__device__ inline void get_both(float (&x)[NT][4], const E* tile, int column, int warp) {
  const uint32_t from = place(tile, warp * 16 + (lane_id() & 15), 0) ^ (lane_id() >> 4 << 4) ^ (column * 2);
#pragma unroll
  for (int t = 0; t < NT; t += 2) {
    uint32_t hi[4], lo[4];
    ldmatrix4<false>(hi, from ^ (t * 16)), ldmatrix4<false>(lo, (from ^ (t * 16)) + kTile * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack<E>(hi[i]), b = unpack<E>(lo[i]);
      float* const to = x[t + (i >> 1)] + 2 * (i & 1);
      to[0] = a.x + b.x, to[1] = a.y + b.y;
    }
  }
}
// A state in registers, rows = slots, columns = dimensions, into the tile [D][64] of its transpose.
template <class E, int NT>
__device__ inline void store_transposed(E* tile, const float (&h)[NT][4], int warp) {
  const int l = lane_id();
#pragma unroll
  for (int n = 0; n < NT; n += 2)
    stmatrix4_trans(at(tile, (n + (l >> 4)) * 8 + (l & 7), warp * 16 + ((l >> 3) & 1) * 8), pack<E>(h[n][0], h[n][1]), pack<E>(h[n][2], h[n][3]),
                    pack<E>(h[n + 1][0], h[n + 1][1]), pack<E>(h[n + 1][2], h[n + 1][3]));
}

// acc to rows begin .. end - 1 of a head, columns from d0 on.
template <class E, int NT>
__device__ inline void store_window(const Rows& dst, const float (&acc)[NT][4], int warp, int begin, int end, int d0 = 0) {
  const int i = warp * 16 + frag_row(), d = d0 + paired_column();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = i + 8 * h;
    E* p = kept(static_cast<E*>(const_cast<void*>(dst.ptr)) + dst.at(row) + d);
#pragma unroll
    for (int t = 0; t < NT; t += 2) {
      const uint2 v = pair_words(pack<E>(acc[t][2 * h], acc[t][2 * h + 1]), pack<E>(acc[t + 1][2 * h], acc[t + 1][2 * h + 1]));
      if (row >= begin && row < end) *reinterpret_cast<uint2*>(p + t * 8) = v;
    }
  }
}

template <int NT>
__device__ inline void scale_rows(float (&c)[NT][4], float top, float bottom) {
#pragma unroll
  for (int t = 0; t < NT; ++t) c[t][0] *= top, c[t][1] *= top, c[t][2] *= bottom, c[t][3] *= bottom;
}

// A state tensor Hk [K][M] (values: Hv [M][V]), rows = slots: f(an element of h, its place). Addresses are made as they are needed: there are no registers for all of them.
template <int NT, class F>
__device__ inline void each_of_state(float (&h)[NT][4], bool values, int D, int M, int warp, F&& f) {
  const int slot = warp * 16 + frag_row(), across = values ? 1 : M, down = values ? D : 1;
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    const int first = kept(slot * down + (t * 8 + frag_col()) * across);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (slot + (e >> 1) * 8 < M) f(h[t][e], first + (e & 1) * across + (e >> 1) * 8 * down);
  }
}
template <int NT, class T>
__device__ inline void load_registers(float (&h)[NT][4], const T* state, bool values, int D, int M, int warp) {
  zero(h);
  if (state) each_of_state(h, values, D, M, warp, [&](float& x, int i) { x = to_float(state[i]); });
}
template <int NT, class T>
__device__ inline void store_registers(T* state, float (&h)[NT][4], bool values, int D, int M, int warp) {
  each_of_state(h, values, D, M, warp, [&](float x, int i) { state[i] = from_float<T>(x); });
}

// ------------------------------------------------------------------------------------------------------------ gates

// A window of a chunk, as the products need it.
template <class E>
struct Window {
  E S[2][kTile];                                           // s_j exp(ref - G_j): rounded, and what rounding dropped
  float R[64 * ldr];                                       // exp(G_i - ref)
  float in[kSlots], out[kSlots];                           // exp(ref) on the state before the window; exp(G_end - ref)
  float start[kSlots];                                     // exp of the window's first gate
  int begin, end, last;                                    // tokens of the chunk; whether its last
  char pad[244];
};
static_assert(sizeof(Window<bf16>) % 1024 == 0);

// What hopper_gates.cu leaves for every chunk, key/value head and bank: its window. If it has several, S, in and out of the chunk as a whole, relative to its end, and no R.
template <class E>
struct GateImage {
  E S[2][kTile];
  float R[kTile];                                          // as accumulators lie: [column / 8][thread of a warpgroup][4]; for hopper_walk.cu at R_at
  float start[kSlots], in[kSlots], out[kSlots];
  int cut;                                                 // whether it has several
  int pad[31];
};
static_assert(sizeof(GateImage<bf16>) == kGateImage);
// With R at R_at.
template <class E>
struct PlainImage : GateImage<E> {};

// The 64 / ROWS warps that make them: thread (warp w, lane l) has ROWS tokens from ROWS w on, of slots 2 l and 2 l + 1. quick: windows that are whole chunks, which
// nearly all are, in a third of the instructions, and in a copy of the code.
template <class E, int ROWS, bool quick = false>
struct GateMaker {
  static constexpr int warps = 64 / ROWS;
  // In powers of two. bf16: R within 2^97 and 2^-79, more room below for Y, whose cotangents are small (a mean's, 2^-30 and less).
  static constexpr float limit = std::is_same_v<E, bf16> ? 176.f : 20.f, reference = std::is_same_v<E, bf16> ? 0.55f : 0.5f;
  float g[ROWS][2], s[ROWS][2];                            // log2 of the gates; write strengths
  struct Scratch {
    float total[warps][kSlots], first[kSlots], span[64];
  };
  Scratch& scratch;
  int warp, lane, barrier, bank;                           // barrier: of these warps

  __device__ GateMaker(Scratch& shared, int tid, int barrier, int bank = 0)
      : scratch(shared), warp(__shfl_sync(0xffffffffu, tid / 32, 0)), lane(tid % 32), barrier(barrier), bank(bank) {}

  // Gates and write strengths of 16 bits on their way, for a later load.
  struct Ahead {
    uint32_t g[ROWS], s[ROWS];
  };
  __device__ void fetch(Ahead& ahead, const Params& p, const Chunk& c, int64_t head) const {
    if (p.g.dtype != DType::f32) fetch(ahead.g, p, rows_of(p.g, c, head), c.length);
    if (p.s.ptr && p.s.dtype != DType::f32) fetch(ahead.s, p, rows_of(p.s, c, head), c.length);
  }
  __device__ void load(const Params& p, const Chunk& c, int64_t head, const Ahead* ahead = nullptr) {
    load(g, p, rows_of(p.g, c, head), c.length, ahead ? ahead->g : nullptr);
    if (p.s.ptr) {
      load(s, p, rows_of(p.s, c, head), c.length, ahead ? ahead->s : nullptr);
    } else {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) s[i][e] = one_minus_exp(g[i][e]);      // 0 where there is no token
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) g[i][e] = __fmul_rn(g[i][e], 1.4426950408889634f);  // as in make: never part of an fma, the same bits in every kernel
  }
  // As far as the L2: registers that wait for them would be spilled.
  __device__ void prefetch(const Params& p, const Chunk& c, int64_t head) const {
    for (int i = warp * 32 + lane; i < 2 * c.length; i += warps * 32)
      if (const Rows src = rows_of(i & 1 ? p.s : p.g, c, head); src.ptr)
        prefetch_line(static_cast<const char*>(src.ptr) + src.at(i >> 1) * element_size(src.dtype));
  }
  __device__ int slot() const { return bank * kSlots + 2 * lane; }
  __device__ int rows_here(const Params& p, int length) const { return slot() < p.M ? length - warp * ROWS : 0; }
  __device__ void fetch(uint32_t (&raw)[ROWS], const Params& p, const Rows& src, int length) const {
    const int rows = rows_here(p, length);
    const uint16_t* q = kept(static_cast<const uint16_t*>(src.ptr) + src.at(warp * ROWS) + slot());
#pragma unroll
    for (int i = 0; i < ROWS; ++i, q += src.step) load_if(i < rows, q, raw[i]);
  }
  __device__ void load(float (&x)[ROWS][2], const Params& p, const Rows& src, int length, const uint32_t* ahead) const {
    if (src.dtype == DType::f32) {
      const int rows = rows_here(p, length);
      const float* q = kept(static_cast<const float*>(src.ptr) + src.at(warp * ROWS) + slot());
#pragma unroll
      for (int i = 0; i < ROWS; ++i, q += src.step) {
        uint32_t a, b;
        load_if(i < rows, q, a), load_if(i < rows, q + 1, b);
        x[i][0] = __uint_as_float(a), x[i][1] = __uint_as_float(b);
      }
    } else {                                               // hopper_takes: of E
      uint32_t raw[ROWS];
      if (!ahead) fetch(raw, p, src, length);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const float2 v = unpack<E>(ahead ? ahead[i] : raw[i]);
        x[i][0] = v.x, x[i][1] = v.y;
      }
    }
  }
  // To the accuracy of 16-bit operands in two parts, without a branch: coupled_write in a third of the instructions.
  __device__ static float one_minus_exp(float g) {
    const float series = -g * fmaf(g, fmaf(g, fmaf(g, fmaf(g, 1.f / 120, 1.f / 24), 1.f / 6), 0.5f), 1.f);
    return g < -0.125f ? 1.f - fast_exp2(g * 1.4426950408889634f) : series;
  }
  __device__ void together() const { sync(barrier, warps * 32); }

  // Sums of the gates from `begin` (whose own gate does not count) on; all threads' totals in scratch.
  __device__ void sums(int begin, int end, float (&before)[2], float (&total)[2]) {
    together();                                            // scratch is free
    float run[2] = {0.f, 0.f};
    if (quick && begin == 0 && end == 64) {
      if (warp == 0) *reinterpret_cast<float2*>(scratch.first + 2 * lane) = make_float2(g[0][0], g[0][1]);
      if (warp > 0) run[0] = g[0][0], run[1] = g[0][1];
#pragma unroll
      for (int i = 1; i < ROWS; ++i) run[0] += g[i][0], run[1] += g[i][1];
    } else {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int t = warp * ROWS + i;
        if (t > begin && t < end) run[0] += g[i][0], run[1] += g[i][1];
        if (t == begin) *reinterpret_cast<float2*>(scratch.first + 2 * lane) = make_float2(g[i][0], g[i][1]);
      }
    }
    *reinterpret_cast<float2*>(&scratch.total[warp][2 * lane]) = make_float2(run[0], run[1]);
    together();
    before[0] = before[1] = total[0] = total[1] = 0.f;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float2 x = *reinterpret_cast<const float2*>(&scratch.total[w][2 * lane]);
      if (w < warp) before[0] += x.x, before[1] += x.y;
      total[0] += x.x, total[1] += x.y;
    }
  }

  // Whether a window with these sums is safe.
  __device__ bool safe(const float (&total)[2]) const {
    float top = fmaxf(-total[0], -total[1]);
    if (isnan(total[0]) || isnan(total[1])) top = INFINITY;
#pragma unroll
    for (int x = 16; x; x >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
    return top <= limit;
  }
  // Into scratch: the most that a gate of each token is below 0; with what is there already (`join`), of another bank.
  __device__ void spans(bool join = false) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const bool nan = __any_sync(0xffffffffu, isnan(g[i][0]) || isnan(g[i][1]));
      const float x = fmaxf(fmaxf(-g[i][0], -g[i][1]), 0.f);
      const float top = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
      float& span = scratch.span[warp * ROWS + i];
      if (lane == 0) span = nan ? NAN : join ? wider(span, top) : top;
    }
  }
  __device__ static float wider(float x, float y) { return isnan(x) || isnan(y) ? NAN : fmaxf(x, y); }
  // Bit t: a window starts at token t. The first NaN does, for the sake of what is before it; of those after it, whose rows are NaN anyway, nothing is spared.
  __device__ static uint64_t starts(int length, const float* span, const float* other) {
    uint64_t starts = 1;
    float sum = 0.f;
    bool seen = isnan(wider(span[0], other[0]));
    for (int t = 1; t < length && !seen; ++t) {
      const float here = wider(span[t], other[t]);
      sum += here;
      if (!(sum <= limit)) starts |= 1ull << t, sum = 0.f, seen = isnan(here);
    }
    return starts;
  }
  __device__ uint64_t cut(int length) {
    spans();
    together();
    return starts(length, scratch.span, scratch.span);
  }

  // g and s become R and S of the window; before, total: of sums(begin, end).
  __device__ void make(int begin, int end, const float (&before)[2], const float (&total)[2]) {
    float sum[2] = {fmaf(-reference, total[0], before[0]), fmaf(-reference, total[1], before[1])};
    if (quick && begin == 0 && end == 64) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (i > 0 || warp > 0) sum[e] += g[i][e];
          g[i][e] = fast_exp2(sum[e]), s[i][e] = __fmul_rn(s[i][e], fast_exp2(-sum[e]));
        }
      return;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int t = warp * ROWS + i;
      const bool inside = t >= begin && t < end;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (t > begin && inside) sum[e] += g[i][e];
        g[i][e] = inside ? fast_exp2(sum[e]) : 0.f;
        s[i][e] = inside ? __fmul_rn(s[i][e], fast_exp2(-sum[e])) : 0.f;
      }
    }
  }
  __device__ void store(Window<E>& w, const float (&total)[2]) const {
    float* R = w.R + warp * ROWS * ldr + 2 * lane;
    const uint32_t to = first_S(w.S[0]), piece = piece_S();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      *reinterpret_cast<float2*>(R + i * ldr) = make_float2(g[i][0], g[i][1]);
      store_S(to, piece, i);
    }
    if (warp == 0) store_edges(w.start, w.in, w.out, total);
  }
  // For hopper_walk.cu, what hopper_gates leaves for it; but S.
  __device__ void store_image(GateImage<E>& image, const float (&total)[2]) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) *reinterpret_cast<float2*>(image.R + R_at(warp * ROWS + i, 2 * lane)) = make_float2(g[i][0], g[i][1]);
    if (warp == 0) store_edges(image.start, image.in, image.out, total);
  }
  // S of row i, in two parts.
  __device__ uint32_t first_S(const E* S) const { return kept(static_cast<int>(address(S) + warp * ROWS * 128 + (lane & 3) * 4)); }
  __device__ uint32_t piece_S() const { return kept(((lane >> 2) ^ (warp * ROWS & 7)) << 4); }
  __device__ void store_S(uint32_t to, uint32_t piece, int i) const {
    uint32_t hi, lo;
    Arith<E>::split_pair(s[i][0], s[i][1], hi, lo);
    asm volatile("st.shared.b32 [%0], %1;\nst.shared.b32 [%0 + %3], %2;" ::"r"(to + i * 128 + (piece ^ ((i & 7) << 4))), "r"(hi), "r"(lo), "n"(kTile * 2)
                 : "memory");
  }
  // R (R_at) and S without the rest of a Window.
  __device__ void store_tiles(E* S, float* R) const {
    const uint32_t to = first_S(S), piece = piece_S();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      *reinterpret_cast<float2*>(R + R_at(warp * ROWS + i, 2 * lane)) = make_float2(g[i][0], g[i][1]);
      store_S(to, piece, i);
    }
  }
  // f(row, exp(G_{begin - 1} - G_row) of both slots), rows from `begin` on too; returns, to warp 0, exp(G_{begin - 1}), the first gate of the chunk included.
  template <class F>
  __device__ float2 to_end(int begin, F&& f) const {
    float run[2] = {0.f, 0.f}, later[2] = {0.f, 0.f};
    together();
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      if (warp * ROWS + i < begin) run[0] += g[i][0], run[1] += g[i][1];
    *reinterpret_cast<float2*>(&scratch.total[warp][2 * lane]) = make_float2(run[0], run[1]);
    together();
    for (int w = warps - 1; w > warp; --w) later[0] += scratch.total[w][2 * lane], later[1] += scratch.total[w][2 * lane + 1];
    const float2 all = make_float2(exp2f(later[0] + run[0]), exp2f(later[1] + run[1]));
#pragma unroll
    for (int i = ROWS - 1; i >= 0; --i) {
      f(i, fast_exp2(later[0]), fast_exp2(later[1]));
      if (warp * ROWS + i < begin) later[0] += g[i][0], later[1] += g[i][1];
    }
    return all;
  }
  __device__ void store_edges(float* start, float* in, float* out, const float (&total)[2]) const {
    const float2 first = *reinterpret_cast<const float2*>(scratch.first + 2 * lane);
    if (start) *reinterpret_cast<float2*>(start + 2 * lane) = make_float2(exp2f(first.x), exp2f(first.y));
    *reinterpret_cast<float2*>(in + 2 * lane) = make_float2(exp2f(fmaf(reference, total[0], first.x)), exp2f(fmaf(reference, total[1], first.y)));
    if (out) *reinterpret_cast<float2*>(out + 2 * lane) = make_float2(exp2f(fmaf(-reference, total[0], total[0])), exp2f(fmaf(-reference, total[1], total[1])));
  }
};

// Segments of a sequence begin with what is left of the tokens before them, and end with cotangents from those after them. What has been multiplied with less than
// 2^-kForgotten on the way counts as nothing.
constexpr int kForgotten = 64;
// How many chunks of a part, from its last one back (from_end) or from its first one on, the gates leave anything of at that end, in any slot: all, or as many as it
// takes until every slot's gates come to less. By all threads of a block; `sums`: of shared memory, a row a warp.
template <class E, bool from_end, int WARPS>
__device__ inline int remembered_chunks(const Params& p, const Sequence& part, int64_t head, float (&sums)[WARPS][kSlots]) {
  const int chunks = static_cast<int>(part.chunks), warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), slot = 2 * lane_id();
  float run[2] = {0.f, 0.f};
#pragma unroll 1
  for (int first = 0; first < chunks; first += WARPS) {
    if (first + warp < chunks) {
      const int i = first + warp;
      const Chunk c = chunk_of(p, part, from_end ? chunks - 1 - i : i, kChunk);
      const Rows g = rows_of(p.g, c, head);
      const bool wide = g.dtype == DType::f32;
      const char* from = kept(static_cast<const char*>(g.ptr) + (g.at(0) + slot) * (wide ? 4 : 2));
      const int64_t step = g.step * (wide ? 4 : 2);
      const int rows = slot < p.M ? c.length : 0;
      float sum[2] = {0.f, 0.f};
#pragma unroll 1
      for (int t = 0; t < kChunk; t += 16) {
        uint32_t x[16], y[16];
#pragma unroll
        for (int k = 0; k < 16; ++k, from += step) {
          load_if(t + k < rows, from, x[k]);
          if (wide) load_if(t + k < rows, from + 4, y[k]);
        }
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          const float2 g = wide ? make_float2(__uint_as_float(x[k]), __uint_as_float(y[k])) : unpack<E>(x[k]);
          sum[0] += g.x, sum[1] += g.y;
        }
      }
      *reinterpret_cast<float2*>(&sums[warp][slot]) = make_float2(sum[0] * 1.4426950408889634f, sum[1] * 1.4426950408889634f);
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < WARPS && first + w < chunks; ++w) {
      const float2 x = *reinterpret_cast<const float2*>(&sums[w][slot]);
      run[0] += x.x, run[1] += x.y;
      if (__all_sync(0xffffffffu, slot >= p.M || (run[0] <= -kForgotten && run[1] <= -kForgotten))) return first + w + 1;
    }
    // At this rate the part is over before: no need to look at the rest.
    const int seen = min(first + WARPS, chunks);
    const float enough = -static_cast<float>(kForgotten) * seen / chunks;
    if (!__all_sync(0xffffffffu, slot >= p.M || (run[0] <= enough && run[1] <= enough))) return chunks;
    __syncthreads();  // sums are done with
  }
  return chunks;
}

// What leads from the state before a chunk to that before its token `begin`:  H <- decay H + sum_{j < begin} x_j S_j.
template <class E>
struct Advance {
  E* S;                                                    // s_j exp(G_{begin - 1} - G_j), a tile
  float* decay;                                            // [kSlots]
  template <int ROWS>
  __device__ void write(const GateMaker<E, ROWS>& gates, int begin) const {
    const int m = 2 * gates.lane;
    const float2 all = gates.to_end(begin, [&](int i, float x, float y) {
      *reinterpret_cast<uint32_t*>(at(S, gates.warp * ROWS + i, m)) = gates.warp * ROWS + i < begin ? pack<E>(gates.s[i][0] * x, gates.s[i][1] * y) : 0u;
    });
    if (gates.warp == 0) decay[m] = all.x, decay[m + 1] = all.y;
  }
  // 16 dimensions of H [D][64] from d on, with the tokens B; by a warp. Rare: mma.sync, so that no warpgroup's registers are planned around it.
  __device__ void apply(E* H, const E* B, int d) const {
    const int l = lane_id();
    float x[8][4];
    zero(x);
#pragma unroll 1
    for (int j = 0; j < 64; j += 16) {
      uint32_t a[4];
      ldmatrix4<true>(a, at(const_cast<E*>(B) + d / 64 * kTile, j + (l & 7) + (l >> 4) * 8, d % 64 + ((l >> 3) & 1) * 8));
#pragma unroll
      for (int t = 0; t < 8; t += 2) {
        uint32_t b[4];
        ldmatrix4<true>(b, at(S, j + (l & 15), t * 8 + (l >> 4) * 8));
        mma16816<E>(x[t], a, b[0], b[1]), mma16816<E>(x[t + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int slot = t * 8 + frag_col();
        uint32_t* to = reinterpret_cast<uint32_t*>(at(H, d + frag_row() + 8 * h, slot));
        const float2 before = unpack<E>(*to), f = *reinterpret_cast<const float2*>(decay + slot);
        *to = pack<E>(before.x * f.x + x[t][2 * h], before.y * f.y + x[t][2 * h + 1]);
      }
  }
};

// ------------------------------------------------------------------------------------------------------------ the first half of either pass

// Keeps x[i, j] with i - j >= least (lower), or j - i >= least.
template <bool lower, int least>
__device__ inline void keep(float (&x)[8][4], int warp) {
  const int i = warp * 16 + frag_row() - frag_col();
#pragma unroll
  for (int t = 0; t < 8; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int j = t * 8 + (e & 1) - (e >> 1) * 8;          // i - j of this element is i - j
      if (lower ? i - j < least : j - i < least) x[t][e] = 0.f;
    }
}

// R of 8 NT slots, from `column` (a multiple of 16) on, from a tile that R_at addresses.
template <int NT>
__device__ inline void get_R(float (&R)[NT][4], const float* tile, int row, int column) {
  const uint32_t from = kept(static_cast<int>(address(tile) + R_at(row, column + frag_col()) * 4));
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(R[t][2 * h]), "=f"(R[t][2 * h + 1]) : "r"((from ^ (t * 32)) + h * 8 * 256) : "memory");
}

// x[i, m] *= R_i
template <class E>
__device__ inline void scale_by_R(float (&x)[8][4], const Window<E>& w, int warp) {
  const float* R = w.R + (warp * 16 + frag_row()) * ldr + frag_col();
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float2 x0 = *reinterpret_cast<const float2*>(R + t * 8), x1 = *reinterpret_cast<const float2*>(R + 8 * ldr + t * 8);
    x[t][0] *= x0.x, x[t][1] *= x0.y, x[t][2] *= x1.x, x[t][3] *= x1.y;
  }
}
template <class E>
__device__ inline void scale_by_R(float (&x)[8][4], const GateImage<E>& w, int) {
  const float4* R = reinterpret_cast<const float4*>(w.R) + threadIdx.x % 128;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float4 y = R[t * 128];
    x[t][0] *= y.x, x[t][1] *= y.y, x[t][2] *= y.z, x[t][3] *= y.w;
  }
}
template <class E>
__device__ inline void scale_by_R(float (&x)[8][4], const PlainImage<E>& w, int warp) {
  float R[8][4];
  get_R(R, w.R, warp * 16 + frag_row(), 0);
#pragma unroll
  for (int t = 0; t < 8; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[t][e] *= R[t][e];
}
// x[i, m] *= f_m
template <int NT>
__device__ inline void scale_columns(float (&x)[NT][4], const float* f) {
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    const float2 y = *reinterpret_cast<const float2*>(f + t * 8 + frag_col());
    x[t][0] *= y.x, x[t][1] *= y.y, x[t][2] *= y.x, x[t][3] *= y.y;
  }
}

// x[i, i] of rows lane / 4 and lane / 4 + 8.
__device__ inline void diagonal_of(float (&d)[2], const float (&x)[8][4], int warp) {
  const int r = frag_row(), lane = 4 * r + (r >> 1);
  float top = 0.f, bottom = 0.f;
#pragma unroll
  for (int J = 0; J < 4; ++J)
    if (J == warp) { top = (r & 1) ? x[2 * J][1] : x[2 * J][0], bottom = (r & 1) ? x[2 * J + 1][3] : x[2 * J + 1][2]; }
  d[0] = __shfl_sync(0xffffffffu, top, lane), d[1] = __shfl_sync(0xffffffffu, bottom, lane);
}

struct Nothing {
  __device__ void operator()() const {}
};

// o[i, m] = exp(ref) (a H) + X S, X = tril(a b^T): times R, o1 / scale from (q, k, Hk), dp from (d_o, v, Hv). All slots, or 32: H, S, in from the first one on.
// diagonal false: X strictly lower, and the diagonal of a b^T apart, of rows lane / 4 and lane / 4 + 8. states(): when H is needed, a little later than a and b.
template <class E, int D, bool diagonal, int NT, class States = Nothing>
__device__ __forceinline__ void scores(float (&o)[NT][4], float (&d)[2], const E* a, const E* b, const E* H, const E* S, const float* in, int warp,
                                       float* diagonals = nullptr, States&& states = {}) {
  float x[8][4];
  hand_over(x);
  hand_over(o);
  products_begin();
  product<E, D / 16, 0, 0>(x, kmajor(a), kmajor(b), false);
  products_commit();
  states();
  product<E, D / 16, 0, 1>(o, kmajor(a), mnmajor(H), false);
  products_commit();
  products_wait<1>();
  hand_over(x);
  if constexpr (!diagonal) {
    diagonal_of(d, x, warp);
    if (diagonals && (lane_id() & 3) == 0) diagonals[warp * 16 + frag_row()] = d[0], diagonals[warp * 16 + frag_row() + 8] = d[1];
  }
  keep<true, diagonal ? 0 : 1>(x, warp);
  const auto X = split<E>(x);
  products_wait<0>();
  hand_over(o);
  scale_columns(o, in);
  hand_over(o);
  products_begin();
  product<E, 1>(o, X.hi, mnmajor(S));
  product<E, 1>(o, X.lo, mnmajor(S));
  product<E, 1>(o, X.hi, mnmajor(S + kTile));
  products_commit();
  products_wait<0>();
  hand_over(o);
}

// exp(c x) of a row over its sum, slots >= M nothing.
__device__ inline void softmax(float (&x)[8][4], float c, int M) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = t * 8 < M ? x[t][e] * c : -INFINITY, top = fmaxf(top, x[t][e]);
    top = quad_max(top);
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] = fast_exp2(x[t][e] - top), sum += x[t][e];
    const float inv = 1.f / quad_sum(sum);
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) x[t][e] *= inv;
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// What hopper_queries.cu leaves for every chunk, query head and bank. Of a chunk of several windows Y is relative to nothing: without R.
template <class E>
struct Saved {
  E Y[2][2][kTile];  // [keys, values][rounded, what rounding dropped]: tiles as products read them. The second of the keys for the scan alone (exact_dH)
  float e[kTile];  // o1 Yk + dp Yv (Yk as it is here) without the diagonal, as accumulators lie: [column / 8][thread of a warpgroup][4]. The first of
                   // hopper_query_heads has their sum
};
// The same for heads of more than 128 dimensions, where hopper_wide_queries.cu has done more of it. Of a chunk of several windows Y is relative to the chunk's beginning.
template <class E>
struct WideSaved {
  E Y[2][2][kTile];  // [keys, values][rounded, what rounding dropped]
  E A[4][kTile];  // tril(Yv S^T) in two parts; tril(Yk S^T); Yk exp(ref)
  float T[kTile];  // e - S inner, as accumulators lie
  float U[kTile];  // (inner + diagonal of (B A^T) Y) / R: ds without what comes from after the chunk
};
// Whether the cotangents of the keys' states want both parts of Yk: where they are a gradient themselves. Those of k, s and g do not tell the difference.
__device__ inline bool exact_dH(const BackwardParams& p) { return p.dhk0 != nullptr; }
// The workspace of backward (hopper.h), typed. Counted in boundary slots.
template <class E>
struct Backward {
  Saved<E>* saved;  // [slots][query heads][banks]
  GateImage<E>* gates;  // [slots][heads][banks]
  E* E0;  // [slots][heads][banks][keys, values, what rounding dropped of the values][D / 64] tiles [slot][dimension]
  float* edge;  // [slots][heads][banks][keys, values][D / 64][64]: exp(G_end) <H, dH>, in parts
  GateImage<E>* factors;  // in the place of R, of a chunk of several windows: exp(G), [token][slot]. The gates, unless these have to stay as they are
  const int *only, *some;
  explicit Backward(const BackwardWorkspace& w)
      : saved(static_cast<Saved<E>*>(w.saved)),
        gates(static_cast<GateImage<E>*>(w.gates)),
        E0(static_cast<E*>(w.E0)),
        edge(w.edge),
        factors(w.factors ? static_cast<GateImage<E>*>(w.factors) : gates),
        only(w.only),
        some(w.some) {}
  // Whether another kernel does all, or this one.
  __device__ bool all_elsewhere() const { return some && !*some; }
  __device__ bool elsewhere(const Params& p, int64_t n, int head) const { return only && !only[n * p.H + head]; }
};

// A tile Y of a chunk of several windows becomes relative to the chunk's beginning. By a block of 128 threads; `factors`: of Backward.
template <class E>
[[maybe_unused]] __device__ __noinline__ void from_the_beginning(E (&Y)[2][kTile], bool two, const float* factors, int64_t tokens) {
  const int i = threadIdx.x / 2;
  if (i < tokens)  // zero behind
    for (int slot = threadIdx.x % 2 * 32, last = slot + 32; slot < last; slot += 2) {
      uint32_t &hi = *reinterpret_cast<uint32_t*>(at(Y[0], i, slot)), &lo = *reinterpret_cast<uint32_t*>(at(Y[1], i, slot));
      const float2 a = unpack<E>(hi), f = *reinterpret_cast<const float2*>(factors + i * kSlots + slot);
      if (!two) {
        hi = pack<E>(a.x * f.x, a.y * f.y);
        continue;
      }
      const float2 b = unpack<E>(lo);
      Arith<E>::split_pair((a.x + b.x) * f.x, (a.y + b.y) * f.y, hi, lo);
    }
  publish();
  sync(1, 128);
}

// Two neighbouring elements of a gradient, in its type: E, or fp32 for gates that are.
template <class E>
__device__ inline void store_pair(const View& v, int64_t i, float x, float y) {
  if (v.dtype == DType::f32) *reinterpret_cast<float2*>(static_cast<float*>(v.ptr) + i) = make_float2(x, y);
  else *reinterpret_cast<uint32_t*>(static_cast<E*>(v.ptr) + i) = pack<E>(x, y);
}

// <H, dH> of rows lane / 4 and lane / 4 + 8 of a warp's 16 slots: H a tile [dimension][slot], dH with slots as rows.
template <class E, int NT>
__device__ inline void state_products(float (&sum)[2], const E* H, const float (&dH)[NT][4], int warp) {
  const int l = lane_id();
  const uint32_t H_row = place(H, (l & 7) + (l >> 4) * 8, 0) ^ ((warp * 2 + ((l >> 3) & 1)) * 16);
  sum[0] = sum[1] = 0.f;
#pragma unroll
  for (int t = 0; t < NT; t += 2) {
    uint32_t h[4];
    ldmatrix4<true>(h, H_row + t * 1024);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float2 e = unpack<E>(h[x]);
      const float (&g)[4] = dH[t + (x >> 1)];
      sum[x & 1] += e.x * g[(x & 1) * 2] + e.y * g[(x & 1) * 2 + 1];
    }
  }
  sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
}

// Accumulators for the same thread of another warpgroup, or for later; by THREADS threads, which nothing that others put comes between.
template <int NT, int THREADS = 128>
__device__ inline void put(float* to, const float (&x)[NT][4], int tid) {
#pragma unroll
  for (int t = 0; t < NT; ++t) reinterpret_cast<float4*>(to)[t * THREADS + tid] = make_float4(x[t][0], x[t][1], x[t][2], x[t][3]);
}

template <int NT, int THREADS = 128>
__device__ inline void get(float (&x)[NT][4], const float* from, int tid) {
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    const float4 y = reinterpret_cast<const float4*>(from)[t * THREADS + tid];
    x[t][0] = y.x, x[t][1] = y.y, x[t][2] = y.z, x[t][3] = y.w;
  }
}

// Ones where u >= t (upper) or u < t, row t of the warp's 16: an operand.
template <class E, bool upper>
__device__ inline typename Arith<E>::template Op<64> triangle_of_ones(int warp) {
  typename Arith<E>::template Op<64> a;
  const uint32_t one = pack<E>(1.f, 1.f), low = one & 0xffffu;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int d = (i >> 1) * 8 - (i & 1) * 8 + frag_col() - frag_row();  // u - t on the diagonal block
    const uint32_t both = d >= 0 ? one : d == -1 ? one & ~low : 0u;
#pragma unroll
    for (int k = 0; k < 4; ++k) a.r[k][i] = k == warp ? (upper ? both : both ^ one) : (k > warp) == upper ? one : 0u;
  }
  return a;
}

// The types and sizes that the kernels are made for (hopper_takes); those up to 128 dimensions, and those of more (hopper_wide).
template <class F>
void select_wide(const Params& p, F&& f) {
  if (p.q.dtype == DType::bf16) p.K == 512 ? f.template operator()<bf16, 512>() : f.template operator()<bf16, 256>();
  else p.K == 512 ? f.template operator()<half, 512>() : f.template operator()<half, 256>();
}
template <class F>
void select_hopper(const Params& p, F&& f) {
  if (p.q.dtype == DType::bf16) p.K == 128 ? f.template operator()<bf16, 128>() : f.template operator()<bf16, 64>();
  else p.K == 128 ? f.template operator()<half, 128>() : f.template operator()<half, 64>();
}
template <class F>
void select_banks(const Params& p, F&& f) {
  select_hopper(p, [&]<class E, int D>() { banks_of(p) == 1 ? f.template operator()<E, D, 1>() : f.template operator()<E, D, 2>(); });
}

}  // namespace gsa::cuda::hopper
