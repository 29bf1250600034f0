// Heads of 256 and 512 dimensions: the end of hopper.h's backward, as a walk.
#pragma once
#include "hopper.h"

namespace gsa::cuda {

// With sequences and heads enough hopper_cotangents and hopper_wide_keys are one walk; E0 is then room for what it leaves of each chunk, no E, no edge.
bool hopper_wide_walks(const Params& p);
int64_t hopper_wide_walk_bytes(const Params& p);
void hopper_wide_walk(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);

}  // namespace gsa::cuda
