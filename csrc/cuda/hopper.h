// The kernels for Hopper, beside the portable ones.
#pragma once
#include "../params.h"

namespace gsa::cuda {

// Whether they take this call: sm_90a, 16-bit inputs, K = V = 64 or 128, M a multiple of 8 up to 64, rows on 16-byte boundaries.
bool hopper_takes(const Params& p);
// Whether the forward walk, a block of which does a whole sequence, does: enough sequences times query heads for the GPU.
bool hopper_walks(const Params& p);
// Whether the backward walk (hopper_fused) does, too: each query head has keys and values of its own.
inline bool hopper_fuses(const Params& p) { return p.HQ == p.H && hopper_walks(p); }

// The forward walk. boundary: the states before each chunk are written there; nullptr: not kept. p.o.ptr == nullptr: states only. images: of hopper_gates, which
// take less time than making the same gates for every query head; with them `cut`, room for [N, H] numbers. nullptr: made here.
void hopper_forward(const ForwardParams& p, void* boundary, const void* images = nullptr, int* cut = nullptr);

// What depends on the gates alone: a GateImage (core/hopper.cuh) for each chunk and key/value head.
int64_t hopper_gates_bytes(const Params& p);
void hopper_gates(const Params& p, void* images);
// After hopper_gates: the boundary states, and the final states that p asks for.
void hopper_states(const ForwardParams& p, const void* images, void* boundary);
// After hopper_states: o.
void hopper_output(const ForwardParams& p, const void* boundary, const void* images);

int64_t hopper_backward_workspace(const Params& p);
void hopper_backward(const BackwardParams& p);

// Where hopper_fuses, in one kernel after the forward walk.
void hopper_fused(const BackwardParams& p, const void* boundary);

// Else in parts, after hopper_gates and hopper_states, in this order. hopper_windows does what hopper_keys leaves: chunks of several windows. The workspace is what
// the parts leave for each other (Backward, core/hopper.cuh).
struct BackwardWorkspace {
  void *gates, *saved, *E0;
  float* edge;
};
void hopper_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_cotangents(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_keys(const BackwardParams& p, const BackwardWorkspace& w);
void hopper_windows(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);

}  // namespace gsa::cuda
