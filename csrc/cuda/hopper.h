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

// The forward walk. boundary: the states before each chunk are written there; nullptr: not kept. p.o.ptr == nullptr: states only. cut: [N, H], only sequences and
// heads where it is not 0 (of states); nullptr: all.
void hopper_forward(const ForwardParams& p, void* boundary, const int* cut = nullptr);

// What depends on the gates alone: a GateImage (core/hopper.cuh) for each chunk and key/value head.
int64_t hopper_gates_bytes(const Params& p);
void hopper_gates(const Params& p, void* images);
// After hopper_gates: cut [N, H], whether any chunk has several windows; the boundary states (nullptr: not made), and with them the final states. The sequences and
// heads that are cut are walked, o and all; p.o.ptr == nullptr: states only.
void hopper_states(const ForwardParams& p, const void* images, void* boundary, int* cut);

// After hopper_states: o of the others.
void hopper_output(const ForwardParams& p, const void* boundary, const void* images, const int* cut);

int64_t hopper_backward_workspace(const Params& p);
void hopper_backward(const BackwardParams& p);

// Where hopper_fuses, in one kernel after the forward walk.
void hopper_fused(const BackwardParams& p, const void* boundary);

// Else in parts, after hopper_gates and hopper_states, in this order. hopper_windows does what hopper_cotangents and hopper_keys leave: sequences and heads with
// a chunk of several windows. The workspace is what the parts leave for each other (Backward, core/hopper.cuh).
struct BackwardWorkspace {
  void *gates, *saved, *E0;
  float* edge;
  int* cut;
};
void hopper_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_cotangents(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_keys(const BackwardParams& p, const BackwardWorkspace& w);
void hopper_windows(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);

}  // namespace gsa::cuda
