// The CPU backend's front door: picks the kernels of the best instruction set this machine has, and lends them torch's threads.
//
// Workspace and boundary states are not used on the CPU: scratch belongs to a thread and is reused from cache, and recomputing a
// state costs less than fetching it from memory. So checkpoint_level cannot change a bit.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace gsa::cpu {
namespace {

// ATEN_CPU_CAPABILITY (torch's own switch: default, avx2, avx512) is honoured, so that one setting tests every path.
const Kernels& choose() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = wish ? wish : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && limit != "default";
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && limit != "avx2";
  if (avx512) return avx512_kernels();
  if (avx2) return avx2_kernels();
#endif
  return baseline_kernels();
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace

void parallel(int64_t items, void (*body)(const void*, Items&), const void* context) {
  if (items <= 0) return;
  Items queue(items);
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  if (threads == 1) return body(context, queue);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context, queue); });
}

// Cutting costs work: all but one of the pieces are walked twice, for what they hand on and for what comes out of them. It pays once a sequence
// is nearly two threads' share of the whole; then every thread wants some pieces, none of them tiny.
Pieces cut(const Params& p, int64_t unit) {
  constexpr int64_t SHORTEST = 64;   // tokens
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads(), shortest = (SHORTEST + unit - 1) / unit;
  int64_t all = 0;                   // threads * length / all: how many threads' share one head of a sequence is
  for (int64_t n = 0; n < p.N; ++n) all += sequence(p, n).length * p.H;
  const auto units_of = [&](int64_t length) { return (length + unit - 1) / unit; };
  const auto units_each = [&](int64_t length) {
    const int64_t units = units_of(length);
    if (threads == 1 || length == 0 || 4 * threads * length < 7 * all) return units;
    const int64_t count = 2 * ((threads * length + all - 1) / all) + 1, each = std::max((units + count - 1) / count, shortest);
    return 2 * each < units ? each : units;   // two pieces would wait for each other
  };
  Pieces pieces;
  pieces.list.reserve(p.N);
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t length = sequence(p, n).length, units = units_of(length), each = units_each(length);
    if (each == units) continue;
    const int64_t count = (units + each - 1) / each;
    for (int64_t i = 0; i < count; ++i)
      pieces.list.push_back(
          {n, i * each * unit, std::min(length, (i + 1) * each * unit), pieces.units + i * each, std::min(each, units - i * each), int32_t(i), int32_t(count)});
    pieces.units += units;
  }
  pieces.split = int64_t(pieces.list.size());
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t length = sequence(p, n).length, units = units_of(length);
    if (units_each(length) != units) continue;
    pieces.list.push_back({n, 0, length, 0, units, 0, 1});
    pieces.longest = std::max(pieces.longest, length);
  }
  return pieces;
}

bool keeps_gates(const Params&) { return false; }
int64_t forward_workspace(const Params&) { return 0; }
int64_t backward_workspace(const Params&) { return 0; }
int64_t recurrent_workspace(const Params&) { return 0; }

void chunk_forward(const ForwardParams& p) { kernels().chunk_forward(p); }
void chunk_backward(const BackwardParams& p) { kernels().chunk_backward(p); }
void recurrent_forward(const ForwardParams& p) { kernels().recurrent_forward(p); }
void step(const StepParams& p) { kernels().step(p); }
void abc_gates(const AbcParams& p) { kernels().abc_gates(p); }
void abc_gates_backward(const AbcParams& p) { kernels().abc_gates_backward(p); }

}  // namespace gsa::cpu
