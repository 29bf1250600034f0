// Of the CPU's kernels the emulated build has one instruction set: fp64 alone comes here.
#include "cpu/kernels.h"

namespace gsa::cpu {
const Kernels& avx2_kernels() { return baseline_kernels(); }
const Kernels& avx512_kernels() { return baseline_kernels(); }
}
