// What a block does that has one chunk after the other, so that what it needs for the next is on its way while it is at the last of this one (two banks: one
// block on a multiprocessor, and nothing else would work there meanwhile).
#pragma once
#include "hopper.cuh"

namespace gsa::cuda::hopper {

// A chunk and key/value head, and the first of some of its query heads; a number < 0: there is none.
struct Unit {
  Chunk chunk;
  int head, first_head, number;
};
// heads: of a unit. Whether there is something to do.
__device__ inline bool find_unit(const Params& p, int number, int heads, Unit& u) {
  const int r = p.HQ / p.H, turns = r / heads;
  u.number = number, u.head = number / turns % p.H, u.first_head = u.head * r + number % turns * heads;
  return find_chunk(p, number / turns / p.H, kChunk, u.chunk);
}

// Adds one; what was there.
__device__ inline int count(int* p) {
  int x;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(x) : "r"(address(p)), "r"(1) : "memory");
  return x;
}

}  // namespace gsa::cuda::hopper
