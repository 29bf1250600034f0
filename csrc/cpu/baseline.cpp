// The kernels in plain vector extensions, for whatever the compiler targets by default (SSE2 on x86-64, NEON on AArch64).
#include "isa.h"

#define GSA_VECTOR_BYTES 16
#define GSA_VECTOR_REGISTERS 16

namespace gsa::cpu::baseline {
#include "simd.h"
#include "tiles.h"
#include "chunk.h"
#include "recurrent.h"
#include "abc.h"
#include "table.h"
}  // namespace gsa::cpu::baseline

const gsa::cpu::Kernels& gsa::cpu::baseline_kernels() { return gsa::cpu::baseline::table; }
