// The compiled tiles, by the number that structlayers/backends/tiles.py gives them. One launch function per element type,
// each in a file of its own, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "product.h"

namespace structlayers {

enum TileId : int {
  kSmallBlocks = 0,
  kBatchFirst1 = 1,       // DL = 1: d = 1, or scattered reads
  kBatchFirst2 = 3,
  kBatchFirst4 = 4,       // DL = 4, wide in j
  kBatchFirst4Tall = 5,   // DL = 4, wide in n
  kBatchFirst8 = 6,
  kBatchFirst16 = 7,
  kBatchLast = 8,
  kBatchLastNarrow = 9,   // small b
  kHopper1 = 10,          // wgmma, 16-bit, batch-first, sm_90a; DL as in the name
  kHopper2 = 11,
  kHopper16 = 14,
  kHopper16Wide = 15,     // rows of w read 64 bytes at a time, fewer steps ahead
  kRegisters2 = 20,       // wgmma with x in registers, batch-first, sm_90a; DL as in the name
  kRegisters4 = 21,       // 128 rows, 64 values of j
  kRegisters4Wide = 22,   // 64 rows, 128 values of j
  kRegisters8 = 23,
  kRegisters16 = 24,
  kRegisters16Pair = 25,  // clusters of two CTAs, which share x
  kRegisters1 = 26,       // float32 alone: 256 rows, 64 values of j
  kRegistersLast = 27,    // batch-last; 16 bits: 128 values of j, 256 n
  kUnaligned = 28,        // rows and blocks of any length, d up to 8; sm_90a
  kRegisters4Pair = 29,   // clusters of two CTAs, which share x: 128 rows, 64 values of j
  kRegisters8Pair = 30,
  kRegistersLastNarrow = 31,  // 16 bits: 64 values of j, 512 n
  kRegistersLastPair = 32,    // 16 bits: 128 values of j, 256 n, clusters of two CTAs, which share x
  kLastRows = 33,             // 16 bits, rows that begin anywhere: 128 values of j, 240 n
  kSmallBatch = 40,       // both layouts, all types: weights straight to registers
};

// Launches on `stream` on the current device. Returns an error of the launch; cudaErrorInvalidValue for an unknown tile.
cudaError_t launch_float32(const Product& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_float32_split(const Product& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_float16(const Product& p, bool batch_last, int tile, cudaStream_t stream);
cudaError_t launch_bfloat16(const Product& p, bool batch_last, int tile, cudaStream_t stream);

}  // namespace structlayers
