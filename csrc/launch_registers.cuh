// From a product to a launch of batch_first_registers.cuh, batch_last_registers.cuh or float32_registers.cuh: how the work is cut,
// tensor maps, the kernel.
#pragma once

#include <algorithm>
#include <limits>
#include <mutex>
#include <type_traits>

#include "batch_first_registers.cuh"
#include "batch_last_registers.cuh"
#include "device.h"
#include "float32_registers.cuh"
#include "tensor_map.cuh"

namespace structlayers {

constexpr int kRegisterSharedBytes = 227 * 1024;

template <typename Tile>
constexpr bool takes_batch_last() {
  if constexpr (requires { Tile::Last; }) return Tile::Last;
  else return false;
}

// Into how many slots of w the l of a tile are cut, and the values of k that x covers beyond c.
template <typename Tile>
constexpr int w_parts() {
  if constexpr (std::is_same_v<typename Tile::T, float>) return Tile::LGroups;
  else return 1;
}

// Shared memory beside slots.
template <typename Tile>
constexpr int other_bytes() {
  if constexpr (requires { Tile::RawBytes; }) return Tile::YBytes + Tile::BarrierBytes + Tile::RawBytes;
  else return Tile::YBytes + Tile::BarrierBytes;
}

// How much of x is under way at least where w stays; less where steps that lie as in memory are, besides.
template <typename Tile>
constexpr int least_x_bytes() {
  if constexpr (requires { Tile::RawBytes; }) return Tile::RawBytes > 0 ? 32 * 1024 : 64 * 1024;
  else return 64 * 1024;
}

template <typename Tile>
constexpr int step_k() {
  if constexpr (std::is_same_v<typename Tile::T, float>) return Tile::StepK;
  else return Tile::XK;
}

// Up to how many bytes of w the L2 keeps all of it beside x and y, and how many rows of the batch share a w fetched once where it
// does not: by what was measured (VERSIONS.md).
template <typename Tile>
constexpr int64_t kept_bytes(bool resident) {
  if constexpr (std::is_same_v<typename Tile::T, float>) return Tile::Strided && !Tile::Last && !resident ? 4 << 20 : 8 << 20;
  if (takes_batch_last<Tile>()) return 8 << 20;
  if (Tile::Cluster > 1 || Tile::DL == 16) return 2 << 20;
  return Tile::TJ == 128 && Tile::DL == 4 ? 12 << 20 : 4 << 20;
}

template <typename Tile>
constexpr int group_rows() {
  if constexpr (std::is_same_v<typename Tile::T, float>) return Tile::Strided && !Tile::Last ? 512 : 1024;
  if (takes_batch_last<Tile>()) return 2048;
  return Tile::TN == 128 && Tile::Cluster == 1 ? 1024 : 512;
}

// False where the tile does not take the product: copies are of whole 16-byte pieces.
template <typename Tile>
bool register_shape(const Product& p, int clusters, RegisterShape& s) {
  constexpr int room = kRegisterSharedBytes - other_bytes<Tile>();
  const int64_t columns = int64_t{p.a} * p.c * p.d;
  constexpr bool Last = takes_batch_last<Tile>();
  // Whether threads copy x: short runs of long rows, or batch-last, rows of any kind.
  constexpr bool Runs = Tile::Strided && !Last, Rows = Tile::Strided && Last;
  if (!Last && (Runs ? p.d % 8 != 0 || p.d <= Tile::DL : p.d != Tile::DL)) return false;
  constexpr int Piece = 16 / sizeof(typename Tile::T);
  if ((Piece == 8 && !Rows && !p.w_aligned) || (!Rows && !p.x_aligned) || p.n > std::numeric_limits<int>::max() - Tile::TN) return false;
  s.flat_input = p.in_features != columns;
  if (Last && Piece == 8 && !Rows && !p.y_aligned) return false;
  if constexpr (Rows) {
    s.flat_input = false;  // threads know where x ends
  } else if constexpr (Last) {
    if (s.flat_input) return false;
  } else if constexpr (Runs) {
    if (p.in_features % Piece != 0) return false;
  } else {
    // Then the columns that follow a block are the next block's, and nothing but zeros may meet them.
    if (s.flat_input && p.a > 1 && p.c % step_k<Tile>() != 0) return false;
  }
  const int w_steps = (p.c + Tile::WK - 1) / Tile::WK * w_parts<Tile>();
  const int64_t tiles_n = (p.n + Tile::TN - 1) / Tile::TN;
  s.resident = tiles_n > 1 && w_steps <= Tile::MaxSlots && w_steps * Tile::WBytes + least_x_bytes<Tile>() <= room;
  // As many values of k of x as of w; where the tile is large, two steps and more of either.
  const int balanced = room / (Tile::WBytes * w_parts<Tile>() + Tile::XBytes * (Tile::WK / Tile::XK)) * w_parts<Tile>();
  s.w_slots = s.resident ? w_steps : std::clamp(balanced, std::is_same_v<typename Tile::T, float> && Tile::DL >= 4 ? 4 : 2, Tile::MaxSlots);
  s.x_slots = std::min((room - s.w_slots * Tile::WBytes) / Tile::XBytes, +Tile::MaxSlots);
  // Units as long as leaves the clusters evenly busy: the cost of a unit is its tiles and its w.
  const int tiles_l = (p.d + Tile::DL - 1) / Tile::DL;
  const int64_t columns_of_units = int64_t{p.a} * tiles_l * ((p.b + Tile::TJ * Tile::Cluster - 1) / (Tile::TJ * Tile::Cluster));
  const auto units = [&](int tiles) { return (tiles_n + tiles - 1) / tiles * columns_of_units; };
  s.unit_tiles = 1;
  if (s.resident) {
    double least = 0;
    for (int tiles = 1; tiles <= 8; ++tiles) {
      const double rounds = static_cast<double>((units(tiles) + clusters - 1) / clusters);
      const double cost = rounds * (tiles + 1.5 * Tile::TJ / Tile::TN);
      if (tiles == 1 || cost < least) {
        least = cost;
        s.unit_tiles = tiles;
      }
    }
  }
  const bool grouped = Tile::Grouped && columns * p.b * static_cast<int>(sizeof(typename Tile::T)) > kept_bytes<Tile>(s.resident) &&
                       (Runs || !s.resident);
  // Four runs of 32 bytes are a line.
  s.l_group = !Runs ? 1 : tiles_l % 4 == 0 ? 4 : tiles_l % 2 == 0 ? 2 : 1;
  s.group = s.groups = 0;
  if (grouped) {
    const int64_t units_n = (tiles_n + s.unit_tiles - 1) / s.unit_tiles;
    const int64_t most = std::max(group_rows<Tile>() / Tile::TN / s.unit_tiles, 1), groups = (units_n + most - 1) / most;
    // Groups of one length, so that few units are empty.
    s.group = static_cast<unsigned>((units_n + groups - 1) / groups);
    s.groups = static_cast<unsigned>(groups);
  }
  const int64_t all = grouped ? int64_t{s.groups} * s.group * columns_of_units : units(s.unit_tiles);
  if (all > std::numeric_limits<int>::max()) return false;
  s.units = static_cast<unsigned>(all);
  return true;
}

template <typename Tile>
bool make_register_maps(const Product& p, const RegisterShape& s, RegisterMaps& maps) {
  using T = typename Tile::T;
  constexpr auto type = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                        : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr int Size = sizeof(T);
  const int64_t run = static_cast<int64_t>(p.c) * p.d, block = static_cast<int64_t>(p.b) * p.c;
  if constexpr (takes_batch_last<Tile>() && !Tile::Strided) {
    if (!make_tensor_map(maps.x, type, Size, p.x, CU_TENSOR_MAP_SWIZZLE_128B,
                         {{p.n, 1, 128 / Size}, {p.d, p.x_stride, 1}, {p.c, int64_t{p.d} * p.x_stride, Tile::XK}, {p.a, run * p.x_stride, 1}})) {
      return false;
    }
  } else if constexpr (!Tile::Strided) {
    const int64_t blocks = s.flat_input ? 1 : p.a;
    // Where a is 1, its stride is not used, but must be one that a map takes.
    const int64_t block_stride = blocks == 1 ? p.x_stride : run;
    if (!make_tensor_map(maps.x, type, Size, p.x, CU_TENSOR_MAP_SWIZZLE_128B,
                         {{s.flat_input ? p.in_features : run, 1, 128 / Size}, {blocks, block_stride, 1}, {p.n, p.x_stride, Tile::BoxRows}})) {
      return false;
    }
  }
  // Threads fetch weights that the copy engine does not.
  if (!p.w_aligned || (takes_batch_last<Tile>() && Tile::Strided && Size == 2)) return true;
  return make_tensor_map(maps.w, type, Size, p.w, Tile::WRow == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                         {{p.c, 1, Tile::WK}, {p.b, p.c, Tile::TJ}, {int64_t{p.a} * p.d, block, Tile::DL / w_parts<Tile>()}});
}

template <typename Tile>
constexpr auto register_kernel() {
  if constexpr (std::is_same_v<typename Tile::T, float>) return float32_registers_kernel<Tile>;
  else if constexpr (takes_batch_last<Tile>()) return batch_last_registers_kernel<Tile>;
  else return batch_first_registers_kernel<Tile>;
}

// Leaves `taken` false where the tile does not take the product.
template <typename Tile>
cudaError_t launch_registers(const Product& p, cudaStream_t stream, bool& taken) {
  constexpr auto Kernel = register_kernel<Tile>();
  static std::mutex mutex;
  static int most_clusters[64] = {};
  taken = true;
  int device = 0;
  cudaGetDevice(&device);
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Tile::Cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.gridDim = dim3(Tile::Cluster);
  config.blockDim = dim3(Tile::Threads);
  config.dynamicSmemBytes = kRegisterSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = Tile::Cluster > 1 ? 1 : 0;
  int clusters;
  {
    std::lock_guard<std::mutex> lock(mutex);
    int& most = most_clusters[device % 64];
    if (most == 0) {
      cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRegisterSharedBytes);
      if (error == cudaSuccess && Tile::Cluster > 1) error = cudaOccupancyMaxActiveClusters(&most, Kernel, &config);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
      }
      if (Tile::Cluster == 1) most = multiprocessors();
      if (most < 1) return cudaErrorLaunchOutOfResources;
    }
    clusters = most;
  }
  RegisterShape s{};
  RegisterMaps maps{};
  if (!register_shape<Tile>(p, clusters, s) || !make_register_maps<Tile>(p, s, maps)) {
    taken = false;
    return cudaSuccess;
  }
  config.gridDim = dim3(std::min(s.units, static_cast<unsigned>(clusters)) * Tile::Cluster);
  if constexpr (std::is_same_v<typename Tile::T, float> || takes_batch_last<Tile>()) return cudaLaunchKernelEx(&config, Kernel, maps.x, maps.w, p, s);
  else return cudaLaunchKernelEx(&config, Kernel, maps, p, s);
}

}  // namespace structlayers
