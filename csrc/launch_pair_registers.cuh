// From a pair whose intermediate fits registers to a launch: tensor maps, the kernel. Included once per element type.
#pragma once

#include <algorithm>
#include <mutex>

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

template <typename Tile>
cudaError_t start_pair_registers(const Pair& p, cudaStream_t stream) {
  constexpr auto Kernel = pair_registers_kernel<Tile>;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(Tile::SharedBytes); error != cudaSuccess) return error;
  static std::mutex mutex;
  static int most_clusters[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Tile::Cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(Tile::Cluster);
  config.blockDim = dim3(Tile::Threads);
  config.dynamicSmemBytes = Tile::SharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters;
  {
    std::lock_guard<std::mutex> lock(mutex);
    int& most = most_clusters[device % 64];
    if (most == 0) {
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&most, Kernel, &config);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
      }
      if (most < 1) return cudaErrorLaunchOutOfResources;
    }
    clusters = most;
  }
  const bool flat_x = p.in_features != int64_t{p.groups} * p.alpha * p.c;
  PairRegisterMaps maps;
  if (!make_pair_register_maps<Tile>(p, flat_x, maps)) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_div(p.n, Tile::Rows * Tile::Cluster) * p.groups;
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, clusters) * Tile::Cluster));
  return cudaLaunchKernelEx(&config, Kernel, maps, p, flat_x);
}

template <typename T, int Cluster>
cudaError_t start_pair_registers_of(const Pair& p, cudaStream_t stream) {
  switch (p.rank) {
    case 16: return start_pair_registers<PairRegisterTile<T, 2, Cluster>>(p, stream);
    case 24: return start_pair_registers<PairRegisterTile<T, 3, Cluster>>(p, stream);
    case 32: return start_pair_registers<PairRegisterTile<T, 4, Cluster>>(p, stream);
    case 48: return start_pair_registers<PairRegisterTile<T, 6, Cluster>>(p, stream);
    case 64: return start_pair_registers<PairRegisterTile<T, 8, Cluster>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch_pair_registers(const Pair& p, int cluster, cudaStream_t stream) {
  if (!pair_fits_registers(p)) return cudaErrorInvalidValue;
  return cluster == 2 ? start_pair_registers_of<T, 2>(p, stream) : start_pair_registers_of<T, 1>(p, stream);
}

}  // namespace
}  // namespace structlayers
