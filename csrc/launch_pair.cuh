// From a pair to a launch: how the work is cut, tensor maps, the kernel. Included once per element type.
#pragma once

#include <algorithm>
#include <mutex>

#include "device.h"
#include "pair.cuh"
#include "tensor_map.cuh"

namespace structlayers {
namespace {

constexpr int kPairSharedBytes = 227 * 1024;

int pair_ceil_div(int n, int size) { return (n + size - 1) / size; }

// False where the pair does not fit a cluster of that size, or shared memory holds fewer than `least_stages`.
bool pair_shape(const Pair& p, int cluster, int rows1, int rows2, int least_stages, PairShape& s) {
  if (cluster > 1 && (p.delta % (8 * cluster) != 0 || p.alpha % cluster != 0)) return false;
  const int sp = p.rank == 1 ? 2 : 1, columns = rows1 / sp;
  s.cluster = cluster;
  s.own_alpha = p.alpha / cluster;
  s.own_delta = p.delta / cluster;
  // Which kernels there are. Ranks 1 and 2 leave for t 8 neighbours in k at a time.
  if (p.rank <= 2 ? rows1 != 128 : rows1 != rows2) return false;
  if (p.rank % 2 != 0 && rows1 != 128) return false;
  if (p.rank <= 2 && cluster > 1 && s.own_alpha % (8 / p.rank) != 0) return false;
  s.x_k = p.c <= 32 ? 32 : 64;
  const int k = p.alpha * p.rank;
  s.t_k = k <= 32 ? 32 : 64;
  s.ranks = std::min(p.rank, columns);
  // Exact: columns are fewer than 65,536 / ranks, and l fewer than 65,536 / own_delta where t fits shared memory.
  s.rank_magic = 65536 / s.ranks + 1;
  s.owner_magic = 65536 / s.own_delta + 1;
  s.runs = std::min(p.delta, columns / s.ranks);
  s.rank_tiles = pair_ceil_div(p.rank, s.ranks);
  s.run_tiles = pair_ceil_div(p.delta, s.runs);
  s.x_steps = pair_ceil_div(p.c, s.x_k);
  s.t_blocks = pair_ceil_div(k, s.t_k);
  s.left_l = s.own_delta % 16 == 0 ? 16 : s.own_delta % 8 == 0 ? 8 : p.delta;
  s.left_j = rows2 / s.left_l;
  if (rows2 == 192 && (p.rank % 8 != 0 || s.left_l > 4)) return false;
  s.flat_x = p.in_features != static_cast<int64_t>(p.groups) * p.alpha * p.c;
  if (s.flat_x && p.c % s.x_k != 0) return false;
  s.stage_bytes = std::max((sp * kPairRows + rows1) * s.x_k, rows2 * s.t_k) * 2;
  // Exceeding shared memory by far must not overflow.
  const int64_t t_stride = static_cast<int64_t>(s.t_blocks) * s.t_k / 8 * kPairChunk + 16;
  const int64_t t_bytes = (s.own_delta * t_stride + 1023) / 1024 * 1024;
  if (t_bytes > kPairSharedBytes) return false;
  s.t_stride = static_cast<int>(t_stride);
  s.t_bytes = static_cast<int>(t_bytes);
  const int area = kPairRows * pair_y_pitch(rows2, s.left_l) * (s.left_l == 1 ? 2 : 1);
  const auto fit = [&](int areas) {
    const int room = kPairSharedBytes - s.t_bytes - areas * area - 16 * 17;
    s.two_areas = areas == 2;
    s.y_bytes = areas * area;
    s.stages = room > 0 ? std::min(room / s.stage_bytes, 8) : 0;
    return s.stages;
  };
  if (fit(2) < 3) fit(1);
  return s.stages >= least_stages;
}

// Roughly the clock cycles of all CTAs of a cluster for one tile, fitted to 14 pairs on one H200 (VERSIONS.md): a stage costs
// more with its rows than with its products, and exchanges within large clusters are dear.
double pair_cost(const Pair& p, const PairShape& s, int rows1) {
  const auto stage = [](int rows) { return 300 + 7.4 * rows; };
  const double right = pair_ceil_div(s.own_alpha, p.rank == 1 ? 2 : 1) * s.run_tiles * s.rank_tiles * s.x_steps;
  const double left = pair_ceil_div(p.b, s.left_j) * (s.own_delta / s.left_l) * s.t_blocks;
  const double exchange = s.cluster >= 4 ? 5000 * s.cluster : 0;
  return (right * stage(rows1) + left * stage(s.left_l * s.left_j) + exchange) * (s.stages < 3 ? 1.15 : 1) * s.cluster;
}

bool choose_pair_shape(const Pair& p, int tile, PairShape& s) {
  if (tile != 0) return pair_shape(p, tile % 256, tile / 256 % 256 * 32, tile / 65536 * 32, 2, s);
  double least = 0;
  for (const int cluster : {1, 2, 4, 8}) {
    for (const int rows : {256, 192, 128}) {
      PairShape candidate{};
      const int rows1 = p.rank <= 2 ? 128 : rows;
      if (!pair_shape(p, cluster, rows1, rows, 2, candidate)) continue;
      const double cost = pair_cost(p, candidate, rows1);
      if (least == 0 || cost < least) {
        least = cost;
        s = candidate;
      }
    }
  }
  return least > 0;
}

template <typename T>
bool make_map(CUtensorMap& map, const void* base, int rank, const cuuint64_t* sizes, const cuuint64_t* strides,
              const cuuint32_t* box) {
  const auto encode = tensor_map_encoder();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode != nullptr &&
         encode(&map, type, rank, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T>
bool make_maps(const Pair& p, const PairShape& s, PairMaps& maps) {
  const auto u64 = [](int64_t v) { return static_cast<cuuint64_t>(v); };
  const auto u32 = [](int v) { return static_cast<cuuint32_t>(v); };
  const int64_t blocks = static_cast<int64_t>(p.groups) * p.alpha, k = static_cast<int64_t>(p.alpha) * p.rank, c = p.c;
  const cuuint64_t x_sizes[3] = {u64(s.flat_x ? p.in_features : c), u64(s.flat_x ? 1 : blocks), u64(p.n)};
  const cuuint64_t x_strides[2] = {u64(s.flat_x ? p.x_stride * 2 : c * 2), u64(p.x_stride * 2)};
  const cuuint32_t x_box[3] = {u32(s.x_k), 1, kPairRows};
  const cuuint64_t right_sizes[4] = {u64(c), u64(p.rank), u64(p.delta), u64(blocks)};
  const cuuint64_t right_strides[3] = {u64(p.delta * c * 2), u64(c * 2), u64(int64_t{p.delta} * p.rank * c * 2)};
  const cuuint32_t right_box[4] = {u32(s.x_k), u32(s.ranks), u32(s.runs), 1};
  const cuuint64_t left_sizes[4] = {u64(k), u64(p.b), u64(p.delta), u64(p.groups)};
  const cuuint64_t left_strides[3] = {u64(k * 2), u64(p.b * k * 2), u64(p.delta * p.b * k * 2)};
  const cuuint32_t left_box[4] = {u32(s.t_k), u32(s.left_j), u32(s.left_l), 1};
  return make_map<T>(maps.x, p.x, 3, x_sizes, x_strides, x_box) &&
         make_map<T>(maps.right, p.right, 4, right_sizes, right_strides, right_box) &&
         make_map<T>(maps.left, p.left, 4, left_sizes, left_strides, left_box);
}

template <auto Kernel>
cudaError_t start_pair(const PairMaps& maps, const Pair& p, const PairShape& s, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared_bytes<Kernel>(kPairSharedBytes); error != cudaSuccess) return error;
  static std::mutex mutex;
  static int most_clusters[64][9] = {};
  int device = 0;
  cudaGetDevice(&device);
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = s.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.blockDim = dim3(kPairThreads);
  config.dynamicSmemBytes = kPairSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters;
  {
    std::lock_guard<std::mutex> lock(mutex);
    int& most = most_clusters[device % 64][s.cluster];
    if (most == 0) {
      config.gridDim = dim3(s.cluster);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&most, Kernel, &config);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
      }
      if (most < 1) return cudaErrorLaunchOutOfResources;
    }
    clusters = most;
  }
  const int64_t tiles = (p.n + kPairRows - 1) / kPairRows * p.groups;
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, clusters) * s.cluster));
  return cudaLaunchKernelEx(&config, Kernel, maps, p, s);
}

template <typename T, int Rows1, int Rows2, Rank R>
cudaError_t start_pair_of(const PairMaps& maps, const Pair& p, const PairShape& s, cudaStream_t stream) {
  if (s.cluster > 1) {
    return s.left_l == 16 ? start_pair<pair_kernel<T, Rows1, Rows2, 8, 16, R, true>>(maps, p, s, stream)
                          : start_pair<pair_kernel<T, Rows1, Rows2, 4, 8, R, true>>(maps, p, s, stream);
  }
  switch (s.left_l) {
    case 1: return start_pair<pair_kernel<T, Rows1, Rows2, 1, 1, R, false>>(maps, p, s, stream);
    case 2: return start_pair<pair_kernel<T, Rows1, Rows2, 1, 2, R, false>>(maps, p, s, stream);
    case 4: return start_pair<pair_kernel<T, Rows1, Rows2, 2, 4, R, false>>(maps, p, s, stream);
    case 8: return start_pair<pair_kernel<T, Rows1, Rows2, 4, 8, R, false>>(maps, p, s, stream);
    default: return start_pair<pair_kernel<T, Rows1, Rows2, 8, 16, R, false>>(maps, p, s, stream);
  }
}

template <typename T>
cudaError_t launch_pair(const Pair& p, int tile, cudaStream_t stream) {
  // No rows of left: registers, or this kernel's own choice.
  if (tile >> 16 == 0) {
    if (pair_fits_registers(p)) {
      const int parts = std::max(1, tile >> 8);
      if constexpr (std::is_same_v<T, __half>) return launch_pair_registers_float16(p, parts, stream);
      else return launch_pair_registers_bfloat16(p, parts, stream);
    }
    tile = 0;
  }
  PairShape s{};
  PairMaps maps;
  if (!choose_pair_shape(p, tile, s) || !make_maps<T>(p, s, maps)) return cudaErrorInvalidValue;
  const bool wide = s.left_l * s.left_j == 256;
  if (p.rank == 1) {
    return wide ? start_pair_of<T, 128, 256, Rank::kOne>(maps, p, s, stream) : start_pair_of<T, 128, 128, Rank::kOne>(maps, p, s, stream);
  }
  if (p.rank == 2) {
    return wide ? start_pair_of<T, 128, 256, Rank::kTwo>(maps, p, s, stream) : start_pair_of<T, 128, 128, Rank::kTwo>(maps, p, s, stream);
  }
  if (p.rank % 8 == 0) {
    if (wide) return start_pair_of<T, 256, 256, Rank::kEights>(maps, p, s, stream);
    if (s.left_l * s.left_j == 128) return start_pair_of<T, 128, 128, Rank::kEights>(maps, p, s, stream);
    switch (s.left_l) {
      case 1: return start_pair<pair_kernel<T, 192, 192, 1, 1, Rank::kEights, false>>(maps, p, s, stream);
      case 2: return start_pair<pair_kernel<T, 192, 192, 1, 2, Rank::kEights, false>>(maps, p, s, stream);
      default: return start_pair<pair_kernel<T, 192, 192, 2, 4, Rank::kEights, false>>(maps, p, s, stream);
    }
  }
  if (p.rank % 2 == 0) {
    return wide ? start_pair_of<T, 256, 256, Rank::kEven>(maps, p, s, stream) : start_pair_of<T, 128, 128, Rank::kEven>(maps, p, s, stream);
  }
  return start_pair_of<T, 128, 128, Rank::kOdd>(maps, p, s, stream);
}

}  // namespace
}  // namespace structlayers
