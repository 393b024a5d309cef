// From the number of a tile of the weight gradient to its launch. Included once per element type.
#pragma once

#include <limits>

#include "device.h"
#include "launch_weight_grad_hopper.cuh"
#include "weight_grad.cuh"

namespace structlayers {
namespace {

int64_t grad_ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows of a split, in whole steps of a tile.
int64_t rows_per_split(const WeightGrad& p, int64_t rows) { return grad_ceil_div(grad_ceil_div(p.n, p.splits), rows) * rows; }

template <auto Kernel>
cudaError_t start_grad(int shared_bytes, int threads, int64_t ctas, const WeightGrad& p, cudaStream_t stream) {
  if (ctas > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(shared_bytes); error != cudaSuccess) return error;
  Kernel<<<static_cast<unsigned>(ctas), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename Tile>
cudaError_t start_grad_tile(WeightGrad p, cudaStream_t stream) {
  p.rows_per_split = rows_per_split(p, Tile::Rows);
  const int64_t tiles = grad_ceil_div(p.a, Tile::TI) * grad_ceil_div(p.d, Tile::DL) * grad_ceil_div(p.dy.block, Tile::TJ) *
                        grad_ceil_div(p.x.block, Tile::TK);
  return start_grad<weight_grad_kernel<Tile>>(Tile::SharedBytes, Tile::Threads, tiles * p.splits, p, stream);
}

template <typename T, bool Last>
cudaError_t start_grad_small(WeightGrad p, cudaStream_t stream) {
  const int largest = p.dy.block > p.x.block ? p.dy.block : p.x.block;
  p.rows_per_split = rows_per_split(p, 32);
  const int64_t ctas = grad_ceil_div(static_cast<int64_t>(p.a) * p.d, Last ? 8 : 32) * p.splits;
  if (largest <= 2) return start_grad<weight_grad_small_kernel<T, 2, Last>>(0, 256, ctas, p, stream);
  if (largest <= 4) return start_grad<weight_grad_small_kernel<T, 4, Last>>(0, 256, ctas, p, stream);
  return cudaErrorInvalidValue;
}

template <typename T, int V, int Parts>
cudaError_t start_grad_sum_of(const WeightGrad& p, int64_t elements, cudaStream_t stream) {
  const unsigned ctas = static_cast<unsigned>(grad_ceil_div(elements, 256 / Parts * V));
  weight_grad_sum_kernel<T, V, Parts><<<ctas, 256, 0, stream>>>(p.partial, static_cast<T*>(p.dw), elements, p.splits);
  return cudaGetLastError();
}

template <typename T>
cudaError_t start_grad_sum(const WeightGrad& p, cudaStream_t stream) {
  const int64_t elements = static_cast<int64_t>(p.a) * p.d * p.dy.block * p.x.block;
  if (elements % 4 != 0) return start_grad_sum_of<T, 1, 8>(p, elements, stream);
  return p.splits <= 8 ? start_grad_sum_of<T, 4, 1>(p, elements, stream) : start_grad_sum_of<T, 4, 8>(p, elements, stream);
}

// Type, split into two TF32, batch-last, l, then warps along i, j, k, n, warp tile j x k, rows of a warp and step, stages.
template <typename T>
cudaError_t start_grad_16bit(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream) {
  if (tile == kGradSmallBlocks) return batch_last ? start_grad_small<T, true>(p, stream) : start_grad_small<T, false>(p, stream);
  if (batch_last != (tile == kGradLast128 || tile == kGradLast64 || tile == kGradLast32)) return cudaErrorInvalidValue;
  if (tile == kGradHopper2 || tile == kGradHopper4 || tile == kGradHopper8) {
    bool taken = false;
    const cudaError_t error = start_grad_hopper_of<T>(p, tile, stream, taken);
    if (taken) return error;
    tile = tile == kGradHopper2 ? kGradRun2 : tile == kGradHopper4 ? kGradRun4 : kGradRun8;
  }
  switch (tile) {
    case kGradRun1x16: return start_grad_tile<WeightGradTile<T, false, false, 1, 4, 1, 1, 2, 16, 16, 64, 5>>(p, stream);
    case kGradRun1x32: return start_grad_tile<WeightGradTile<T, false, false, 1, 2, 1, 1, 4, 32, 32, 32, 5>>(p, stream);
    case kGradRun1x64: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 1, 1, 8, 64, 64, 16, 5>>(p, stream);
    case kGradRun1x128: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 2, 2, 2, 64, 64, 32, 5>>(p, stream);
    case kGradRun1x192: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 3, 4, 1, 64, 48, 48, 5>>(p, stream);
    case kGradRun1Wide: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 2, 4, 1, 64, 64, 64, 4>>(p, stream);
    case kGradRun1Tall: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 4, 2, 1, 64, 64, 64, 4>>(p, stream);
    case kGradRun1Short: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 1, 4, 2, 64, 64, 32, 5>>(p, stream);
    case kGradRun1Narrow: return start_grad_tile<WeightGradTile<T, false, false, 1, 1, 4, 1, 2, 64, 64, 32, 5>>(p, stream);
    case kGradRun2: return start_grad_tile<WeightGradTile<T, false, false, 2, 1, 2, 4, 1, 64, 32, 32, 5>>(p, stream);
    case kGradRun2x64: return start_grad_tile<WeightGradTile<T, false, false, 2, 1, 1, 2, 4, 64, 32, 16, 5>>(p, stream);
    case kGradRun4: return start_grad_tile<WeightGradTile<T, false, false, 4, 1, 4, 2, 1, 32, 32, 32, 4>>(p, stream);
    case kGradRun4x64: return start_grad_tile<WeightGradTile<T, false, false, 4, 1, 2, 2, 2, 32, 32, 16, 5>>(p, stream);
    case kGradRun4x32: return start_grad_tile<WeightGradTile<T, false, false, 4, 1, 1, 1, 8, 32, 32, 16, 3>>(p, stream);
    case kGradRun8: return start_grad_tile<WeightGradTile<T, false, false, 8, 1, 2, 4, 1, 32, 16, 16, 5>>(p, stream);
    case kGradRun8x32: return start_grad_tile<WeightGradTile<T, false, false, 8, 1, 1, 2, 4, 32, 16, 16, 3>>(p, stream);
    case kGradRun16: return start_grad_tile<WeightGradTile<T, false, false, 16, 1, 2, 2, 1, 32, 16, 16, 4>>(p, stream);
    case kGradRun16x32: return start_grad_tile<WeightGradTile<T, false, false, 16, 1, 1, 2, 2, 32, 16, 16, 3>>(p, stream);
    case kGradLast128: return start_grad_tile<WeightGradTile<T, false, true, 1, 1, 2, 2, 2, 64, 64, 32, 5>>(p, stream);
    case kGradLast64: return start_grad_tile<WeightGradTile<T, false, true, 1, 1, 1, 1, 8, 64, 64, 16, 5>>(p, stream);
    case kGradLast32: return start_grad_tile<WeightGradTile<T, false, true, 1, 1, 1, 1, 8, 32, 32, 32, 5>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <bool Split>
cudaError_t start_grad_32bit(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream) {
  using T = float;
  if (tile == kGradSmallBlocks) return batch_last ? start_grad_small<T, true>(p, stream) : start_grad_small<T, false>(p, stream);
  if (batch_last != (tile == kGradLast128 || tile == kGradLast64 || tile == kGradLast32)) return cudaErrorInvalidValue;
  switch (tile) {
    case kGradRun1x32: return start_grad_tile<WeightGradTile<T, Split, false, 1, 1, 1, 1, 8, 32, 32, 16, 5>>(p, stream);
    case kGradRun1x64: return start_grad_tile<WeightGradTile<T, Split, false, 1, 1, 1, 2, 4, 64, 32, 16, 5>>(p, stream);
    case kGradRun1x128: return start_grad_tile<WeightGradTile<T, Split, false, 1, 1, 2, 4, 1, 64, 32, 32, 5>>(p, stream);
    case kGradRun2: return start_grad_tile<WeightGradTile<T, Split, false, 2, 1, 4, 2, 1, 32, 32, 32, 4>>(p, stream);
    case kGradRun2x64: return start_grad_tile<WeightGradTile<T, Split, false, 2, 1, 2, 2, 2, 32, 32, 16, 5>>(p, stream);
    case kGradRun4x64: return start_grad_tile<WeightGradTile<T, Split, false, 4, 1, 2, 4, 1, 32, 16, 16, 5>>(p, stream);
    case kGradRun4x32: return start_grad_tile<WeightGradTile<T, Split, false, 4, 1, 1, 2, 4, 32, 16, 16, 3>>(p, stream);
    case kGradRun8: return start_grad_tile<WeightGradTile<T, Split, false, 8, 1, 2, 2, 1, 32, 16, 16, 4>>(p, stream);
    case kGradRun8x32: return start_grad_tile<WeightGradTile<T, Split, false, 8, 1, 1, 2, 2, 32, 16, 16, 3>>(p, stream);
    case kGradLast128: return start_grad_tile<WeightGradTile<T, Split, true, 1, 1, 2, 4, 1, 64, 32, 32, 5>>(p, stream);
    case kGradLast64: return start_grad_tile<WeightGradTile<T, Split, true, 1, 1, 1, 2, 4, 64, 32, 16, 5>>(p, stream);
    case kGradLast32: return start_grad_tile<WeightGradTile<T, Split, true, 1, 1, 1, 1, 8, 32, 32, 16, 5>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

// The gradient, and the sum over splits where there are several.
template <typename T, bool Split = false>
cudaError_t launch_weight_grad(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream) {
  if (p.splits < 1 || (p.splits > 1) != (p.partial != nullptr)) return cudaErrorInvalidValue;
  cudaError_t error;
  if constexpr (sizeof(T) == 4) error = start_grad_32bit<Split>(p, batch_last, tile, stream);
  else error = start_grad_16bit<T>(p, batch_last, tile, stream);
  return error == cudaSuccess && p.partial != nullptr ? start_grad_sum<T>(p, stream) : error;
}

}  // namespace
}  // namespace structlayers
