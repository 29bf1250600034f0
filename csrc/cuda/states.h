// The boundary states of a forward pass, which the chunk kernels of both directions start from.
#pragma once
#include "../params.h"

namespace gsa::cuda {

struct States {
  void* boundary;       // [slots, H, K + V, M], q's dtype or fp32: before each chunk
  const float* decay;   // [slots, H, MP]: exp(G_end) of each chunk
  const float* gate_tiles;   // [slots, H] GateTile (core/chunk.cuh)
};

int64_t states_workspace(const Params& p);

// Uses the first states_workspace(p) bytes of p.workspace. recompute = false: p.boundary holds the states already, only what depends on the gates alone is made.
States forward_states(const Params& p, void* hkT, void* hvT, bool recompute);

}  // namespace gsa::cuda
