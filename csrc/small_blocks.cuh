// Product with a factor of tiny blocks (c <= 16), by plain multiply-adds: a tensor-core tile would be mostly padding.
//
// Contract: product.h, both layouts. Index map: a thread owns one block (i, l) and Rows rows n: it holds their c inputs in
// registers and computes the b outputs one j after the other. Batch-first: neighbouring threads take neighbouring (i, l);
// batch-last: neighbouring n. Shared memory: none. Preconditions (host): c <= 16.
// Source: new.
#pragma once

#include "tile.cuh"

namespace structlayers {

template <typename T, int C, bool BatchLast>
__global__ void __launch_bounds__(256) small_blocks_kernel(const __grid_constant__ Product p) {
  constexpr int Rows = 4;
  const int64_t blocks = static_cast<int64_t>(p.a) * p.d;
  const int64_t groups = BatchLast ? (p.n + Rows * 32 - 1) / (Rows * 32) * 32 : (p.n + Rows - 1) / Rows;
  const int64_t work = blocks * groups;
  const T* x = static_cast<const T*>(p.x);
  const T* w = static_cast<const T*>(p.w);
  T* y = static_cast<T*>(p.y);
  for (int64_t id = blockIdx.x * int64_t{256} + threadIdx.x; id < work; id += int64_t{gridDim.x} * 256) {
    const int64_t block = BatchLast ? id / groups : id % blocks, group = BatchLast ? id % groups : id / blocks;
    const int64_t i = block / p.d, l = block % p.d;
    // Rows of one thread: neighbours, or 32 apart so that a warp reads whole lines.
    const int64_t n0 = BatchLast ? group / 32 * (Rows * 32) + group % 32 : group * Rows;
    constexpr int NStep = BatchLast ? 32 : 1;
    float inputs[Rows][C];
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const int64_t feature = (i * p.c + k) * p.d + l;
      const bool inside = k < p.c && feature < p.in_features;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int64_t n = n0 + r * NStep;
        inputs[r][k] = inside && n < p.n ? to_float(x[BatchLast ? feature * p.x_stride + n : n * p.x_stride + feature]) : 0.f;
      }
    }
    for (int j = 0; j < p.b; ++j) {
      const int64_t feature = (i * p.b + j) * p.d + l;
      if (feature >= p.out_features) break;
      float sum[Rows] = {};
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const float weight = k < p.c ? to_float(w[(block * p.b + j) * p.c + k]) : 0.f;
#pragma unroll
        for (int r = 0; r < Rows; ++r) sum[r] = fmaf(weight, inputs[r][k], sum[r]);
      }
      const float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[feature]) : 0.f;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int64_t n = n0 + r * NStep;
        if (n < p.n) {
          y[BatchLast ? feature * p.y_stride + n : n * p.y_stride + feature] = from_float<T>(activate(sum[r] + bias, p.activation));
        }
      }
    }
  }
}

}  // namespace structlayers
