// The kernels for Hopper, beside the portable ones.
#pragma once
#include "../params.h"

namespace gsa::cuda {

// Whether they take this call: sm_90a, 16-bit inputs, K = V = 64 or 128, M a multiple of 8 up to 64, rows on 16-byte boundaries, and sequences times query
// heads enough for the GPU. Forward and backward of a call answer alike.
bool hopper_takes(const Params& p);

// boundary: the states before each chunk are written there, as the portable kernels do; nullptr: not kept. p.o.ptr == nullptr: states only.
void hopper_forward(const ForwardParams& p, void* boundary);

int64_t hopper_backward_workspace(const Params& p);
void hopper_backward(const BackwardParams& p);

}  // namespace gsa::cuda
