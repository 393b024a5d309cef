// From a product to a launch of batch_first_unaligned.cuh: how the work is cut, the kernel. Included once per element type.
#pragma once

#include <algorithm>
#include <limits>

#include "batch_first_unaligned.cuh"
#include "device.h"
#include "unaligned.h"

namespace structlayers {

constexpr int kUnalignedSharedBytes = 227 * 1024;

template <typename Tile>
bool unaligned_shape(const Product& p, int ctas, UnalignedShape& s) {
  constexpr int LeastXBytes = 40 * 1024, room = kUnalignedSharedBytes - Tile::YBytes - Tile::BarrierBytes;
  const int64_t blocks = ceil_div(p.c, Tile::WK), block = Tile::WParts * Tile::DL * Tile::WJ * Tile::WRow;
  const auto slot = [](int j_groups) { return (j_groups == 2 ? 64 : 128) * Tile::XPitch; };
  const auto fits = [&](int j_groups) { return blocks * block * j_groups + std::max(LeastXBytes, 2 * slot(j_groups)) <= room; };
  // Twice as many values of j read x half as often.
  s.j_groups = p.b > Tile::WJ && fits(2) ? 2 : 1;
  s.resident = fits(s.j_groups);
  s.w_slots = s.resident ? static_cast<int>(blocks) : 1;
  const int tn = s.j_groups == 2 ? 64 : 128, tj = s.j_groups * Tile::WJ;
  const int64_t left = room - s.w_slots * block * s.j_groups;
  s.x_slots = static_cast<int>(std::min(left / slot(s.j_groups), int64_t{Tile::MaxSlots}));
  // Units as long as leaves the CTAs evenly busy: the cost of a unit is its tiles and its w.
  const int64_t tiles_n = ceil_div(p.n, tn), columns = p.a * ceil_div(p.b, tj);
  const auto units = [&](int64_t tiles) { return ceil_div(tiles_n, tiles) * columns; };
  s.unit_tiles = 1;
  double least = std::numeric_limits<double>::max();
  for (int tiles = 1; s.resident && tiles <= std::min<int64_t>(tiles_n, 64); ++tiles) {
    const double cost = static_cast<double>(ceil_div(units(tiles), ctas)) * (tiles + 1);
    if (cost < least) least = cost, s.unit_tiles = tiles;
  }
  if (s.x_slots < 2 || units(s.unit_tiles) > std::numeric_limits<int>::max()) return false;
  s.units = static_cast<unsigned>(units(s.unit_tiles));
  return true;
}

template <typename T, bool Split, int DL>
cudaError_t launch_unaligned_run(const Product& p, cudaStream_t stream, bool& taken) {
  using Tile = UnalignedTile<T, Split, DL>;
  constexpr auto Kernel = batch_first_unaligned_kernel<Tile>;
  const int ctas = multiprocessors();
  UnalignedShape s{};
  taken = unaligned_shape<Tile>(p, ctas, s);
  if (!taken) return cudaSuccess;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(kUnalignedSharedBytes); error != cudaSuccess) return error;
  Kernel<<<std::min(s.units, static_cast<unsigned>(ctas)), Tile::Threads, kUnalignedSharedBytes, stream>>>(p, s);
  return cudaGetLastError();
}

template <typename T, bool Split>
cudaError_t launch_unaligned(const Product& p, cudaStream_t stream, bool& taken) {
  taken = false;
  if (!has_wgmma()) return cudaSuccess;
  switch (p.d) {
    case 1: return launch_unaligned_run<T, Split, 1>(p, stream, taken);
    case 2: return launch_unaligned_run<T, Split, 2>(p, stream, taken);
    case 3: return launch_unaligned_run<T, Split, 3>(p, stream, taken);
    case 4: return launch_unaligned_run<T, Split, 4>(p, stream, taken);
    case 5: return launch_unaligned_run<T, Split, 5>(p, stream, taken);
    case 6: return launch_unaligned_run<T, Split, 6>(p, stream, taken);
    case 7: return launch_unaligned_run<T, Split, 7>(p, stream, taken);
    case 8: return launch_unaligned_run<T, Split, 8>(p, stream, taken);
    default: return cudaSuccess;
  }
}

}  // namespace structlayers
