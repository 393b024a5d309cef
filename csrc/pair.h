// Two chainable factors in one kernel, as the kernel is told of them. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace structlayers {

// y = activation(x (left right)^T + bias), a chainable pair whose right factor has d = 1. For each group i it is, with
// t in shared memory,
//   t[n, l, k] = sum_m right[i*alpha + s, rho*delta + l, m] * x[n, (i*alpha + s)*c + m]      k = s*rank + rho
//   y[n, (i*b + j)*delta + l] = activation(sum_k left[i, l, j, k] * t[n, l, k] + bias)
struct Pair {
  const void* x;
  const void* left;   // (groups, delta, b, alpha*rank), contiguous
  const void* right;  // (groups*alpha, 1, delta*rank, c), contiguous
  const void* bias;   // out_features, or null
  void* y;
  int64_t n, x_stride, y_stride, in_features, out_features;
  int groups, alpha, delta, rank, b, c;
  int activation;
  bool y_aligned;
};

// Whether pair_registers.cuh takes the pair: layers of 4 blocks, link ranks that leave room for t, a y that the copy engine can write.
inline bool pair_fits_registers(const Pair& p) {
  const bool rank = p.rank == 16 || p.rank == 24 || p.rank == 32 || p.rank == 48 || p.rank == 64;
  const bool whole_x = p.in_features == int64_t{p.groups} * p.alpha * p.c || p.c % 64 == 0;
  const bool whole_y = p.y_aligned && p.b * p.delta % 8 == 0 && (p.groups == 1 || p.out_features == int64_t{p.groups} * p.b * p.delta);
  return p.alpha == 4 && p.delta == 4 && rank && whole_x && whole_y && reinterpret_cast<uintptr_t>(p.bias) % 4 == 0;
}

// Launches on `stream` on the current device; `tile` is 0, 1 + 256 * parts for pair_registers.cuh, or cluster + 256 * (Rows1 / 32) + 65536 * (Rows2 / 32)
// of pair.cuh. Returns an error of the launch; cudaErrorInvalidValue where no tile takes the pair.
cudaError_t launch_pair_float16(const Pair& p, int tile, cudaStream_t stream);
cudaError_t launch_pair_bfloat16(const Pair& p, int tile, cudaStream_t stream);

// Likewise, by pair_registers.cuh, which takes the pair, in at most so many parts of the j.
cudaError_t launch_pair_registers_float16(const Pair& p, int parts, cudaStream_t stream);
cudaError_t launch_pair_registers_bfloat16(const Pair& p, int parts, cudaStream_t stream);

}  // namespace structlayers
