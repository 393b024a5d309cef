// Chainable factors multiplied into one, as the kernel is told of them. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace structlayers {

constexpr int kMostMergedFactors = 16, kMostMergeRuns = 4;

struct MergeFactor {
  const void* w;  // (a, d, b, c), contiguous
  int a, b, c, d;
};

// factors[0] ... factors[count - 1], in written order, every neighbours a chainable pair. The product has the pattern
// (A, B, C, D) = (a_0, b_0 d_0 / D, a_last c_last / A, d_last).
struct MergeRun {
  MergeFactor factors[kMostMergedFactors];
  int count;
  void* out;  // (A, D, B, C), contiguous
};

// Several products at once: a launch costs more than the arithmetic.
struct MergeRuns {
  MergeRun runs[kMostMergeRuns];
  int count;
};

// Launches on `stream` on the current device. Returns an error of the launch; cudaErrorInvalidValue where a row of the
// product has more than 4096 elements.
template <typename T>
cudaError_t launch_merge(const MergeRuns& runs, cudaStream_t stream);

}  // namespace structlayers
