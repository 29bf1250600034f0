// What the CPU kernels share with their dispatcher: one table of entry points per instruction set, and the thread pool.
// Torch-free: the kernels are compiled once per instruction set (avx512.cpp, avx2.cpp, baseline.cpp) from the same headers.
#pragma once
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

// Runs body(context, items) on up to `threads` threads at once; each draws items until none is left.
void parallel(int64_t items, void (*body)(const void* context, Items&), const void* context);

}  // namespace gsa::cpu
