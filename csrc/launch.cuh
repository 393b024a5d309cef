// From a tile's number to a launch. Included once per element type.
#pragma once

#include <algorithm>
#include <limits>

#include "batch_first_hopper.cuh"
#include "batch_last_unaligned.cuh"
#include "device.h"
#include "launch_registers.cuh"
#include "small_batch.h"
#include "small_blocks.cuh"
#include "tiles.h"
#include "unaligned.h"

namespace structlayers {

template <auto Kernel, typename... Arguments>
cudaError_t launch(int shared_bytes, int threads, int64_t tiles, int per_multiprocessor, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (tiles > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(shared_bytes); error != cudaSuccess) return error;
  const int64_t resident = int64_t{multiprocessors()} * per_multiprocessor;
  Kernel<<<static_cast<unsigned>(std::min(tiles, resident)), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

template <typename Tile>
cudaError_t launch_batch_first(const Product& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.n, Tile::TN) * p.a * ceil_div(p.d, Tile::DL) * ceil_div(p.b, Tile::TJ);
  static_assert(Tile::SharedBytes <= 227 * 1024);
  return launch<batch_first_kernel<Tile>>(Tile::SharedBytes, Tile::Threads, tiles, 1, stream, p, static_cast<unsigned>(tiles));
}

template <typename Tile>
cudaError_t launch_hopper(const Product& p, cudaStream_t stream) {
  if (!has_wgmma()) return cudaErrorInvalidDeviceFunction;
  const int64_t tiles = ceil_div(p.n, Tile::TN) * p.a * ceil_div(p.d, Tile::DL) * ceil_div(p.b, Tile::TJ);
  static_assert(Tile::SharedBytes <= 227 * 1024);
  return launch<batch_first_hopper_kernel<Tile>>(Tile::SharedBytes, Tile::Threads, tiles, 1, stream, p, static_cast<unsigned>(tiles));
}

template <typename Tile>
cudaError_t launch_batch_last(const Product& p, cudaStream_t stream) {
  using Unaligned = BatchLastUnalignedTile<Tile>;
  const int64_t tiles = ceil_div(p.n, Tile::TN) * p.a * p.d * ceil_div(p.b, Tile::TJ);
  static_assert(Tile::SharedBytes <= 227 * 1024 && Unaligned::SharedBytes <= 227 * 1024);
  const unsigned count = static_cast<unsigned>(tiles);
  if (p.x_aligned && p.w_aligned && p.y_aligned) {
    return launch<batch_last_kernel<Tile>>(Tile::SharedBytes, Tile::Threads, tiles, 1, stream, p, count);
  }
  return launch<batch_last_unaligned_kernel<Unaligned>>(Unaligned::SharedBytes, Tile::Threads, tiles, 1, stream, p, count);
}

// The tile of products that are not made of whole 16-byte pieces, or where it does not take one, a tile that takes all.
template <typename T, bool Split, typename Other>
cudaError_t launch_unaligned_or(const Product& p, cudaStream_t stream) {
  bool taken = false;
  const cudaError_t error = launch_unaligned<T, Split>(p, stream, taken);
  if (taken) return error;
  if constexpr (std::is_same_v<T, float>) return launch_batch_first<Other>(p, stream);
  else return launch_hopper<Other>(p, stream);
}

// Batch-last, rows that begin anywhere.
template <typename T>
using LastRowsTile = LastRegisterTile<T, 2, true>;

// A tile that takes x to registers, or where it does not take the product, one that takes all.
template <typename Tile, typename Other>
cudaError_t launch_registers_or(const Product& p, cudaStream_t stream) {
  if (!has_wgmma()) return cudaErrorInvalidDeviceFunction;
  bool taken = false;
  const cudaError_t error = launch_registers<Tile>(p, stream, taken);
  if (taken) return error;
  if constexpr (takes_batch_last<Tile>() && sizeof(typename Tile::T) == 2 && !Tile::Strided)
    return launch_registers_or<LastRowsTile<typename Tile::T>, Other>(p, stream);
  else if constexpr (takes_batch_last<Tile>()) return launch_batch_last<Other>(p, stream);
  else if constexpr (std::is_same_v<typename Tile::T, float>) return launch_unaligned_or<float, Tile::Split, Other>(p, stream);
  else return launch_unaligned_or<typename Tile::T, false, Other>(p, stream);
}

// Takes every product, with any d, if not fast.
template <typename T>
using AnyHopperTile = HopperTile<T, 16, 32, 32, 4, 1, 3, 4>;

// Batch-last by mma.sync: warps along j and n, warp tile j x n, bytes of K per step, stages.
template <typename T>
using WideLastTile = BatchLastTile<T, false, 2, 4, 64, 64, 64, 4>;
template <typename T>
using NarrowLastTile = BatchLastTile<T, false, 1, 8, 64, 32, 64, 4>;

template <typename T, int Cluster>
cudaError_t launch_registers_16(const Product& p, cudaStream_t stream) {
  using Other = AnyHopperTile<T>;
  if (p.d == 16) return launch_registers_or<RegisterTile<T, 16, false, 1, 1, 32, 32, Cluster>, Other>(p, stream);
  return launch_registers_or<RegisterTile<T, 16, true, 1, 1, 32, 32, Cluster>, Other>(p, stream);
}

template <typename T, bool BatchLast>
cudaError_t launch_small_blocks(const Product& p, cudaStream_t stream) {
  const int64_t groups = BatchLast ? ceil_div(p.n, 128) * 32 : ceil_div(p.n, 4);
  const int64_t tiles = ceil_div(groups * p.a * p.d, 256);
  if (p.c <= 2) return launch<small_blocks_kernel<T, 2, BatchLast>>(0, 256, tiles, 8, stream, p);
  if (p.c <= 4) return launch<small_blocks_kernel<T, 4, BatchLast>>(0, 256, tiles, 8, stream, p);
  if (p.c <= 8) return launch<small_blocks_kernel<T, 8, BatchLast>>(0, 256, tiles, 4, stream, p);
  if (p.c <= 16) return launch<small_blocks_kernel<T, 16, BatchLast>>(0, 256, tiles, 4, stream, p);
  return cudaErrorInvalidValue;
}

// Batch-first: DL, LW, warps along n and j, warp tile n x j, bytes of K per step, stages of w, parts of y.
template <typename T>
cudaError_t launch_16bit(const Product& p, bool batch_last, int tile, cudaStream_t stream) {
  switch (tile) {
    case kSmallBlocks: return batch_last ? launch_small_blocks<T, true>(p, stream) : launch_small_blocks<T, false>(p, stream);
    case kSmallBatch: return launch_small_batch<T, false>(p, batch_last, stream);
    case kBatchFirst1: return launch_batch_first<BatchFirstTile<T, false, 1, 1, 4, 2, 64, 64, 128, 3, 1>>(p, stream);
    case kBatchFirst2: return launch_batch_first<BatchFirstTile<T, false, 2, 2, 2, 4, 64, 32, 64, 3, 1>>(p, stream);
    case kBatchFirst4: return launch_batch_first<BatchFirstTile<T, false, 4, 2, 1, 4, 64, 32, 64, 3, 1>>(p, stream);
    case kBatchFirst4Tall: return launch_batch_first<BatchFirstTile<T, false, 4, 2, 2, 2, 64, 32, 64, 3, 1>>(p, stream);
    case kBatchFirst8: return launch_batch_first<BatchFirstTile<T, false, 8, 2, 1, 2, 64, 32, 64, 3, 2>>(p, stream);
    case kBatchFirst16: return launch_batch_first<BatchFirstTile<T, false, 16, 2, 1, 1, 32, 64, 64, 2, 4>>(p, stream);
    // DL, TN, bytes of K per step, stages of raw x, steps in a stage of w, stages of w, parts of y.
    case kHopper1: return launch_hopper<HopperTile<T, 1, 256, 128, 4, 1, 4, 4>>(p, stream);
    case kHopper2: return launch_hopper<HopperTile<T, 2, 256, 64, 3, 2, 2, 4>>(p, stream);
    case kHopper16: return launch_hopper<AnyHopperTile<T>>(p, stream);
    case kHopper16Wide: return launch_hopper<HopperTile<T, 16, 32, 32, 3, 2, 2, 4>>(p, stream);
    // DL, whether runs lie apart, parts that the warpgroups make of rows and of j, j of a warpgroup, K in a slot of w, cluster.
    case kRegisters2:
      return launch_registers_or<RegisterTile<T, 2, false, 2, 1, 128, 64, 1>, HopperTile<T, 2, 256, 64, 3, 2, 2, 4>>(p, stream);
    case kRegisters4:
      return launch_registers_or<RegisterTile<T, 4, false, 2, 1, 64, 64, 1>, AnyHopperTile<T>>(p, stream);
    case kRegisters4Wide:
      return launch_registers_or<RegisterTile<T, 4, false, 1, 2, 64, 32, 1>, AnyHopperTile<T>>(p, stream);
    case kRegisters8:
      return launch_registers_or<RegisterTile<T, 8, false, 1, 2, 32, 32, 1>, AnyHopperTile<T>>(p, stream);
    case kRegisters4Pair:
      return launch_registers_or<RegisterTile<T, 4, false, 2, 1, 64, 64, 2>, AnyHopperTile<T>>(p, stream);
    case kRegisters8Pair:
      return launch_registers_or<RegisterTile<T, 8, false, 1, 2, 32, 32, 2>, AnyHopperTile<T>>(p, stream);
    case kUnaligned: return launch_unaligned_or<T, false, AnyHopperTile<T>>(p, stream);
    case kRegisters16: return launch_registers_16<T, 1>(p, stream);
    case kRegisters16Pair: return launch_registers_16<T, 2>(p, stream);
    // Parts that the warpgroups make of j, whether rows begin anywhere, cluster.
    case kRegistersLast: return launch_registers_or<LastRegisterTile<T, 2, false>, WideLastTile<T>>(p, stream);
    case kRegistersLastNarrow: return launch_registers_or<LastRegisterTile<T, 1, false>, NarrowLastTile<T>>(p, stream);
    case kRegistersLastPair: return launch_registers_or<LastRegisterTile<T, 2, false, 2>, WideLastTile<T>>(p, stream);
    case kLastRows: return launch_registers_or<LastRowsTile<T>, WideLastTile<T>>(p, stream);
    case kBatchLast: return launch_batch_last<WideLastTile<T>>(p, stream);
    case kBatchLastNarrow: return launch_batch_last<NarrowLastTile<T>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <bool Split>
cudaError_t launch_32bit(const Product& p, bool batch_last, int tile, cudaStream_t stream) {
  using T = float;
  switch (tile) {
    case kSmallBlocks: return batch_last ? launch_small_blocks<T, true>(p, stream) : launch_small_blocks<T, false>(p, stream);
    case kSmallBatch: return launch_small_batch<T, Split>(p, batch_last, stream);
    case kBatchFirst1: return launch_batch_first<BatchFirstTile<T, Split, 1, 1, 4, 2, 32, 64, 128, 3, 1>>(p, stream);
    case kBatchFirst2: return launch_batch_first<BatchFirstTile<T, Split, 2, 2, 2, 4, 32, 32, 128, 2, 1>>(p, stream);
    case kBatchFirst4: return launch_batch_first<BatchFirstTile<T, Split, 4, 2, 2, 2, 32, 32, 64, 3, 1>>(p, stream);
    case kBatchFirst8: return launch_batch_first<BatchFirstTile<T, Split, 8, 2, 1, 2, 32, 32, 64, 3, 1>>(p, stream);
    case kRegisters1:
      return launch_registers_or<Float32Tile<Split, 1, false>, BatchFirstTile<T, Split, 1, 1, 4, 2, 32, 64, 128, 3, 1>>(p, stream);
    case kRegisters2:
      return launch_registers_or<Float32Tile<Split, 2, false>, BatchFirstTile<T, Split, 2, 2, 2, 4, 32, 32, 128, 2, 1>>(p, stream);
    case kRegisters4: {
      using Other = BatchFirstTile<T, Split, 4, 2, 2, 2, 32, 32, 64, 3, 1>;
      // Few rows where w stays, so that more of x is on its way; two CTAs that share x want an even number of tiles along j.
      if (p.c <= (Split ? 64 : 128)) return launch_registers_or<Float32Tile<Split, 4, false, false, 2, 32>, Other>(p, stream);
      if (ceil_div(p.b, 64) % 2 == 0) return launch_registers_or<Float32Tile<Split, 4, false, false, 1, 64, 2>, Other>(p, stream);
      return launch_registers_or<Float32Tile<Split, 4, false>, Other>(p, stream);
    }
    case kRegisters8: {
      using Other = BatchFirstTile<T, Split, 8, 2, 1, 2, 32, 32, 64, 3, 1>;
      if (p.d == 8) return launch_registers_or<Float32Tile<Split, 8, false>, Other>(p, stream);
      // Half as many columns where w then stays.
      const bool half = Split ? p.c > 32 && p.c <= 64 : p.c > 64 && p.c <= 128;
      if (half) return launch_registers_or<Float32Tile<Split, 8, true, false, 1, 32>, Other>(p, stream);
      return launch_registers_or<Float32Tile<Split, 8, true>, Other>(p, stream);
    }
    case kUnaligned: return launch_unaligned_or<T, Split, BatchFirstTile<T, Split, 8, 2, 1, 2, 32, 32, 64, 3, 1>>(p, stream);
    case kRegistersLast: {
      using Other = BatchLastTile<T, Split, 2, 4, 64, 32, 64, 4>;
      if (p.x_aligned && p.in_features == int64_t{p.a} * p.c * p.d) {
        return launch_registers_or<Float32Tile<Split, 1, false, true>, Other>(p, stream);
      }
      return launch_registers_or<Float32Tile<Split, 1, true, true>, Other>(p, stream);
    }
    case kBatchLast: return launch_batch_last<BatchLastTile<T, Split, 2, 4, 64, 32, 64, 4>>(p, stream);
    case kBatchLastNarrow: return launch_batch_last<BatchLastTile<T, Split, 2, 4, 32, 32, 64, 4>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace structlayers
