// The kernels for Hopper, beside the portable ones.
#pragma once
#include <cuda.h>

#include "../params.h"

namespace gsa::cuda {

// What the copy engine is told of a tensor [B, T, heads, D] of 16 bits: it brings 64 columns of a head, of 64 tokens, of eight or of one. Beyond the tensor is nothing
// but zeros.
struct TokenMap {
  CUtensorMap tokens, eight, token;
};
struct InputMaps {
  TokenMap q, k, v, d_o;
};
InputMaps input_maps(const Params& p);
InputMaps input_maps(const BackwardParams& p);
// And of the boundary states: 64 slots of 64 rows.
CUtensorMap boundary_map(const Params& p, const void* boundary);

// Whether they take this call: sm_90a, 16-bit inputs, K = V = 64 or 128 and M a multiple of 8 up to 128, or K = V = 256 or 512 and M up to 64, rows on 16-byte
// boundaries, nothing expanded.
bool hopper_takes(const Params& p);
// Of what they take: heads of more than 128 dimensions, which never walk and whose chunks are streamed over (hopper_wide_*.cu).
inline bool hopper_wide(const Params& p) { return p.K > 128; }
// A walk: a block does a sequence and query head, or with few of them one of several segments. What the states are at the beginning of each but the first
// is found by scans of `chunks` chunks each, beside each other, of which each segment has `scans` (hopper_starts.cu), and their cotangents at the end of each but the
// last in the same way, segments undivided (hopper_ends.cu).
struct Segments {
  int count = 0, scans = 1, chunks = 0;  // count: of each sequence; 0: it does not walk
  __host__ __device__ int before() const { return (count - 1) * scans; }  // the last segment
  __host__ __device__ int length() const { return scans * chunks; }
  Segments undivided() const { return {count, 1, length()}; }
};
// One bank of slots; sequences, not packed where there are groups, for enough blocks.
Segments hopper_segments(const Params& p);
inline bool hopper_walks(const Params& p) { return hopper_segments(p).count > 0; }
// Whether the backward walk (hopper_walk) does, too: each query head has keys and values of its own.
inline bool hopper_fuses(const Params& p) { return p.HQ == p.H && hopper_walks(p); }

// boundary: the states before each chunk are written there; nullptr: not kept. p.o.ptr == nullptr: states only. images: of hopper_gates, which take less time than
// making the same gates for every query head; with them `cut`, room for [N, segments, H] numbers. nullptr: made here. starts: of hopper_starts, where there are several
// segments. started: [N, H, 2] zeros, if several blocks start from a state of a pool that one of them writes anew. plain: what images are, as in hopper_gates.
void hopper_forward(const ForwardParams& p, void* boundary, const void* images, int* cut, const float* starts, int* started, bool plain = false);
// The states at the beginning of each segment but the first, in room for hopper_starts_floats.
void hopper_starts(const Params& p, float* starts);
__host__ __device__ inline int64_t start_floats(const Params& p) { return int64_t(p.K + p.V) * p.M + 64; }  // of a scan: Hk, Hv, and the decays of all slots
inline int64_t hopper_starts_floats(const Params& p) {
  const Segments s = hopper_segments(p);
  return s.count > 1 ? p.N * s.before() * p.H * start_floats(p) : 0;
}

// The same without o where each query head has keys and values of its own: the boundary states, and images as hopper_gates makes them for hopper_walk.
void hopper_forward_states(const ForwardParams& p, void* boundary, void* images, const float* starts);

// What depends on the gates alone: a GateImage (core/hopper.cuh) for each chunk, key/value head and bank.
int64_t hopper_gates_bytes(const Params& p);
// plain: R as hopper_walk reads it. only, some: BackwardWorkspace's.
void hopper_gates(const Params& p, void* images, bool plain = false, const int* only = nullptr, const int* some = nullptr);
// After hopper_gates: the boundary states, and the final states that p asks for. products: room for hopper_products_bytes where hopper_few, else nullptr.
void hopper_states(const ForwardParams& p, const void* images, void* boundary, float* products, bool keys_only = false);
// After hopper_states: o.
void hopper_output(const ForwardParams& p, const void* boundary, const void* images);
// Where hopper_wide, after the keys' half of hopper_states; room: hopper_wide_scores_bytes.
void hopper_wide_output(const ForwardParams& p, const void* boundary, const void* images, void* room);
int64_t hopper_wide_scores_bytes(const Params& p);

// Whether the scans over the chunks (hopper_states, hopper_cotangents) are hopper_few.cu's: few sequences and heads, each with many chunks. Asked for a whole call,
// forward or backward: the two ways' states differ in their last bits.
bool hopper_few(const Params& p);
int64_t hopper_products_bytes(const Params& p);
// Parts of a sequence that scan_kernel goes through beside each other, and the chunks of each, where sequences and heads are few: where hopper_few, and in reverse.
// A part begins as many chunks early as the gates leave anything of, with zeros. A head where that is more than half of a part is left to the first part's blocks;
// where hopper_few, to its kernels.
int64_t hopper_scan_blocks(const Params& p);  // of scan_kernel, in one part
constexpr int kScanPartsAtMost = 32;
struct ScanParts {
  int count = 1, chunks = 0;
  int* far = nullptr;  // [N, H, banks]: whether it is left to them
  float* last = nullptr;  // the states at the end, as ScanEnds: pass_kernel puts them where they belong, in a pool where the first part's come from
};
ScanParts hopper_scan_parts(const Params& p);

int64_t hopper_backward_workspace(const Params& p);
void hopper_backward(const BackwardParams& p);

// Where hopper_fuses, in one kernel after hopper_gates and the states. Sequences and heads that have a chunk of several windows are left out, and noted in `cut`, room
// for [N, H] numbers; hopper_fused does those, or where there are several segments the parts.
void hopper_walk(const BackwardParams& p, const void* boundary, const void* images, int* cut, const float* ends);
void hopper_fused(const BackwardParams& p, const void* boundary, const int* cut);
// The cotangents of the states at the end of each segment but the last, in room for hopper_starts_floats. `cut`: what hopper_walk
// will note, and behind the [N, H] numbers whether any is set (known before the walk: two lines there cost it a tenth of its time).
void hopper_ends(const BackwardParams& p, const void* boundary, const void* images, float* ends, int* cut);
void hopper_join_ends(const Params& p, float* ends, int* cut);

// Else in parts, after hopper_gates and hopper_states, in this order. The workspace is what the parts leave for each other (Backward, core/hopper.cuh).
struct BackwardWorkspace {
  void *gates, *saved, *E0;
  float *edge, *products;  // products: as in hopper_states
  void* factors = nullptr;  // Backward's, where the gates are kept
  const int* only = nullptr;  // [N, H] numbers: nothing is done for those with a 0
  const int* some = nullptr;  // whether any of `only` is set: if not, blocks end before they have looked for their chunk
};
int hopper_query_heads(const Params& p);  // that a block of hopper_queries has: of so many e is one
void hopper_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_cotangents(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_keys(const BackwardParams& p, const BackwardWorkspace& w);
// Where hopper_wide, around the same scan: dq is made by the last part.
void hopper_wide_queries(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);
void hopper_wide_keys(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w);

// What hopper_states and, in reverse, hopper_cotangents are where there is room for products. Where the states begin and end: [N, H, K, M] and [N, H, M, V],
// nullptr: zero; not wanted.
struct ScanEnds {
  const void* first[2];
  void* last[2];
  bool broadcast;
};
void hopper_scan_few(const BackwardParams& p, bool reverse, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w);
void hopper_scan(const BackwardParams& p, bool reverse, const ScanEnds& ends, void* boundary, const BackwardWorkspace& w, int sides, const ScanParts& parts);

}  // namespace gsa::cuda
