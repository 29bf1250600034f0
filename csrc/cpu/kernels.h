// What the CPU kernels share with their dispatcher: one table of entry points per instruction set, and the thread pool.
// Torch-free: the kernels are compiled once per instruction set (avx512.cpp, avx2.cpp, baseline.cpp) from the same headers.
#pragma once
#include <cstdint>
#include <vector>

#include "../params.h"

namespace gsa::cpu {

struct Kernels {
  void (*chunk_forward)(const ForwardParams&);
  void (*chunk_backward)(const BackwardParams&);
  void (*recurrent_forward)(const ForwardParams&);
  void (*step)(const StepParams&);
  void (*abc_gates)(const AbcParams&);
  void (*abc_gates_backward)(const AbcParams&);
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// A counter that threads draw work items from: items are independent, so who takes which never changes a result.
class Items {
 public:
  explicit Items(int64_t count) : count_(count) {}
  bool next(int64_t& item) {
    item = __atomic_fetch_add(&taken_, 1, __ATOMIC_RELAXED);
    return item < count_;
  }

 private:
  int64_t count_, taken_ = 0;
};

// The row that sequence n has in the states, or -1: padding, which has none.
template <class P> inline __attribute__((always_inline)) int64_t state_row(const P& p, int64_t n) {
  if (!p.state_indices) return n;
  return p.indices_64 ? static_cast<const int64_t*>(p.state_indices)[n] : int64_t(static_cast<const int32_t*>(p.state_indices)[n]);
}

// The tokens of sequence n, those of cu_seqlens where there is one; of padding, none.
struct Sequence {
  int64_t batch, begin, length;
};
template <class P> inline __attribute__((always_inline)) Sequence all_tokens(const P& p, int64_t n) {
  if (!p.cu_seqlens) return {n, 0, p.T};
  const auto bound = [&](int64_t i) __attribute__((always_inline)) {
    return p.cu_seqlens_64 ? static_cast<const int64_t*>(p.cu_seqlens)[i] : int64_t(static_cast<const int32_t*>(p.cu_seqlens)[i]);
  };
  return {0, bound(n), bound(n + 1) - bound(n)};
}
template <class P> inline __attribute__((always_inline)) Sequence sequence(const P& p, int64_t n) {
  const Sequence s = all_tokens(p, n);
  return {s.batch, s.begin, state_row(p, n) < 0 ? 0 : s.length};
}

// A sequence, or one of the pieces of a sequence that several threads share: its tokens begin .. end - 1 in the order they are visited.
struct Piece {
  int64_t n, begin, end;
  int64_t unit, units;     // the units it consists of, counted over all sequences that are split
  int32_t index, count;    // which of how many pieces of its sequence
  bool split() const { return count > 1; }
  bool first() const { return index == 0; }
  bool last() const { return index + 1 == count; }
};
struct Pieces {
  std::vector<Piece> list;     // first the pieces of split sequences, one sequence after the other, then the sequences that are not split
  int64_t split = 0;           // number of the former
  int64_t units = 0;           // in them
  int64_t longest = 0;         // tokens of the longest of the latter
};

// Cuts sequences that would keep one thread busy long after the others have finished, at multiples of `unit` tokens. Depends on the shape, the
// lengths and the number of threads alone, so results are the same from run to run; where sequences and heads are enough for all threads
// nothing is cut, and results do not depend on the number of threads either.
Pieces cut(const Params& p, int64_t unit);

// Runs body(context, items) on up to as many threads at once as torch has; each draws items until none is left.
void parallel(int64_t items, void (*body)(const void* context, Items&), const void* context);

}  // namespace gsa::cpu
