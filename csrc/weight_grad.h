// The weight gradient of one factor, as the kernels are told of it. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace structlayers {

// dy or x: a matrix of n rows and up to a * block * d features.
struct GradOperand {
  const void* data;
  int64_t stride;    // elements between rows (batch-first) or between features (batch-last)
  int64_t features;  // logical: columns from here on count as zeros and are not read
  int block;         // b for dy, c for x
  bool aligned;      // whether every 16-byte piece that the vector paths touch is aligned
};

// dw[i, l, j, k] = sum_n dy[n, (i*b + j)*d + l] * x[n, (i*c + k)*d + l]
struct WeightGrad {
  GradOperand dy, x;
  void* dw;        // (a, d, b, c), contiguous
  float* partial;  // (splits, a, d, b, c), or null: there is one split and dw is written at once
  int64_t n;
  int64_t rows_per_split;  // the host asks for splits; the launch rounds rows up to whole steps of the tile
  int splits;
  int a, d;
};

// The compiled tiles, by the number that structlayers/backends/weight_grad_tiles.py gives them.
enum WeightGradTileId : int {
  kGradSmallBlocks = 0,
  kGradRun1x16 = 1,  // d = 1, four neighbouring i at once
  kGradRun1x32 = 2,  // two in 16 bits
  kGradRun1x64 = 3,
  kGradRun1x128 = 4,
  kGradRun1x192 = 5,
  kGradRun1Wide = 6,    // 128 x 256
  kGradRun1Tall = 7,    // 256 x 128
  kGradRun1Short = 8,   // 64 x 256
  kGradRun1Narrow = 9,  // 256 x 64
  kGradRun2 = 10,
  kGradRun2x64 = 11,
  kGradRun4 = 12,
  kGradRun4x64 = 13,
  kGradRun4x32 = 14,
  kGradRun8 = 15,
  kGradRun8x32 = 16,
  kGradRun16 = 17,
  kGradRun16x32 = 18,
  kGradLast128 = 19,
  kGradLast64 = 20,
  kGradLast32 = 21,
  // On wgmma (weight_grad_hopper.cuh); kGradRun2, kGradRun4, kGradRun8 where that does not take the problem.
  kGradHopper2 = 22,
  kGradHopper4 = 23,
  kGradHopper8 = 24,
};

// Launches on `stream` on the current device, the sum over splits included. Returns an error of the launch;
// cudaErrorInvalidValue for an unknown tile.
cudaError_t launch_weight_grad_float32(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_weight_grad_float32_split(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_weight_grad_float16(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_weight_grad_bfloat16(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream);

}  // namespace structlayers
