// Standard headers of the kernels, and the macros of an instruction set. Included before any target is switched on, so that
// nothing of the standard library is compiled for more than the baseline.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"

#define GSA_INLINE inline __attribute__((always_inline))
