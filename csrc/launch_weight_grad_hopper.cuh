// From a weight gradient to a launch of weight_grad_hopper.cuh.
#pragma once

#include <limits>
#include <type_traits>

#include "device.h"
#include "tensor_map.cuh"
#include "weight_grad_hopper.cuh"

namespace structlayers {
namespace {

template <typename T>
constexpr CUtensorMapDataType grad_map_type() {
  return std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

template <typename Tile>
bool make_grad_map(CUtensorMap& map, const GradOperand& operand, int64_t n) {
  // The stride of the second dimension is not used, but must be one that a map takes.
  return make_tensor_map(map, grad_map_type<typename Tile::T>(), 2, operand.data, CU_TENSOR_MAP_SWIZZLE_128B,
                         {{operand.features, 1, 64}, {1, 8, 1}, {n, operand.stride, Tile::Rows}});
}

template <typename Tile, typename Out>
bool make_sum_map(CUtensorMap& map, CUtensorMapDataType type, const void* base, const WeightGrad& p) {
  constexpr int OutK = Tile::template OutK<Out>;
  const int64_t b = p.dy.block, c = p.x.block;
  const auto swizzle = OutK * sizeof(Out) == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return make_tensor_map(map, type, sizeof(Out), base, swizzle,
                         {{c, 1, OutK}, {b, c, 16}, {p.d, b * c, 1}, {int64_t{p.splits} * p.a, p.d * b * c, 1}});
}

// Leaves `taken` false where the tile does not take the problem: rows that are read and written begin at multiples of 16 bytes.
template <typename Tile>
cudaError_t start_grad_hopper(WeightGrad p, cudaStream_t stream, bool& taken) {
  using T = typename Tile::T;
  constexpr auto Kernel = weight_grad_hopper_kernel<Tile>;
  HopperGradMaps maps;
  taken = has_wgmma() && p.d == Tile::DL && p.x.block % 8 == 0 && p.dy.aligned && p.x.aligned && p.n > 0 &&
          p.n <= std::numeric_limits<int>::max() - 2 * Tile::Rows && make_grad_map<Tile>(maps.dy, p.dy, p.n) &&
          make_grad_map<Tile>(maps.x, p.x, p.n) &&
          (p.partial != nullptr ? make_sum_map<Tile, float>(maps.out, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, p.partial, p)
                                : make_sum_map<Tile, T>(maps.out, grad_map_type<T>(), p.dw, p));
  if (!taken) return cudaSuccess;
  p.rows_per_split = ceil_div(ceil_div(p.n, p.splits), Tile::Rows) * Tile::Rows;
  const int64_t ctas = int64_t{p.splits} * p.a * ceil_div(p.dy.block, Tile::TJ) *
                       ceil_div(p.x.block, Tile::TK * Tile::Cluster) * Tile::Cluster;
  if (ctas > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(Tile::SharedBytes); error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Tile::Cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(Tile::Threads);
  config.dynamicSmemBytes = Tile::SharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = Tile::Cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, Kernel, maps, p);
}

// l, CTAs of a cluster.
template <typename T>
cudaError_t start_grad_hopper_of(const WeightGrad& p, int tile, cudaStream_t stream, bool& taken) {
  switch (tile) {
    case kGradHopper2: return start_grad_hopper<HopperGradTile<T, 2, 1>>(p, stream, taken);
    case kGradHopper4: return start_grad_hopper<HopperGradTile<T, 4, 1>>(p, stream, taken);
    default: return start_grad_hopper<HopperGradTile<T, 8, 2>>(p, stream, taken);
  }
}

}  // namespace
}  // namespace structlayers
