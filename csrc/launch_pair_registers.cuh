// From a pair whose intermediate fits registers to a launch: tensor maps, the kernel. Included once per element type.
#pragma once

#include <algorithm>

#include "device.h"
#include "pair_registers.cuh"
#include "tensor_map.cuh"

namespace structlayers {
namespace {

template <typename Tile>
bool make_pair_register_maps(const Pair& p, bool flat_x, PairRegisterMaps& maps) {
  constexpr auto type = std::is_same_v<typename Tile::T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto make = [](CUtensorMap& map, const void* base, std::initializer_list<TensorMapDimension> dimensions) {
    return make_tensor_map(map, type, 2, base, CU_TENSOR_MAP_SWIZZLE_128B, dimensions);
  };
  constexpr int RowK = Tile::RowK, Rows = Tile::Rows, LW = Tile::LW;
  const int64_t blocks = int64_t{p.groups} * Tile::Alpha, c = p.c, group_features = int64_t{p.b} * Tile::Delta;
  return make(maps.x, p.x,
              {{flat_x ? p.in_features : c, 1, RowK}, {flat_x ? 1 : blocks, flat_x ? p.x_stride : c, 1}, {p.n, p.x_stride, Rows}}) &&
         make(maps.right, p.right,
              {{c, 1, RowK}, {Tile::Rank, Tile::Delta * c, Tile::Rank}, {Tile::Delta, c, LW}, {blocks, Tile::Delta * Tile::Rank * c, 1}}) &&
         make(maps.left, p.left,
              {{Tile::K, 1, RowK}, {p.b, Tile::K, Tile::J}, {Tile::Delta, int64_t{p.b} * Tile::K, LW},
               {p.groups, group_features * Tile::K, 1}}) &&
         make(maps.y, p.y,
              {{p.groups == 1 ? p.out_features : group_features, 1, RowK}, {p.groups, group_features, 1}, {p.n, p.y_stride, Rows}});
}

template <typename Tile, bool Parts>
cudaError_t start_pair_registers(const Pair& p, const PairRegisterCut& cut, cudaStream_t stream) {
  constexpr auto Kernel = pair_registers_kernel<Tile, Parts>;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(Tile::SharedBytes); error != cudaSuccess) return error;
  PairRegisterMaps maps;
  if (!make_pair_register_maps<Tile>(p, cut.flat_x, maps)) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  const int64_t units = ceil_div(p.n, Tile::Rows) * p.groups * cut.parts;
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(units, multiprocessors())));
  config.blockDim = dim3(Tile::Threads);
  config.dynamicSmemBytes = Tile::SharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, Kernel, maps, p, cut);
}

template <typename Tile>
cudaError_t start_pair_registers(const Pair& p, int parts, cudaStream_t stream) {
  if (parts < 1) return cudaErrorInvalidValue;
  // Whole chunks of J in every part, and no empty part.
  const int chunks = (p.b + Tile::J - 1) / Tile::J, part_chunks = (chunks + parts - 1) / parts;
  const bool flat_x = p.in_features != int64_t{p.groups} * p.alpha * p.c;
  const PairRegisterCut cut{(chunks + part_chunks - 1) / part_chunks, part_chunks * Tile::J, flat_x};
  return cut.parts == 1 ? start_pair_registers<Tile, false>(p, cut, stream) : start_pair_registers<Tile, true>(p, cut, stream);
}

template <typename T>
cudaError_t launch_pair_registers(const Pair& p, int parts, cudaStream_t stream) {
  switch (p.rank) {
    case 16: return start_pair_registers<PairRegisterTile<T, 2>>(p, parts, stream);
    case 24: return start_pair_registers<PairRegisterTile<T, 3>>(p, parts, stream);
    case 32: return start_pair_registers<PairRegisterTile<T, 4>>(p, parts, stream);
    case 48: return start_pair_registers<PairRegisterTile<T, 6>>(p, parts, stream);
    case 64: return start_pair_registers<PairRegisterTile<T, 8>>(p, parts, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace structlayers
