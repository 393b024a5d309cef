// The tile and the frame of batch_last_registers.cuh: sizes, places in shared memory, which part of a tile a warp has.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "tile.cuh"
#include "unit_walk.cuh"
#include "wgmma.cuh"

namespace structlayers {

// JGroups: into how many parts the two warpgroups cut the j; otherwise they cut the n. Strided: rows of x, w and y may begin anywhere
// in a 16-byte piece; threads fetch them, and tiles overlap by a sector of 32 bytes of y, so that all but the ends of rows are
// written as whole sectors: those with halves from two CTAs cost 1.6 times as much.
template <typename T_, int JGroups_, bool Strided_, int Cluster_ = 1>
struct LastRegisterTile {
  using T = T_;
  static constexpr bool Grouped = true, Strided = Strided_, Last = true;
  static constexpr int DL = 1, Cluster = Cluster_, JGroups = JGroups_, WJ = 64, WN = 256, TJ = WJ * JGroups;
  // How many n a tile computes, and how far it is to the next.
  static constexpr int Width = WN * 2 / JGroups, SectorN = 16, TN = Strided ? Width - SectorN : Width;
  static constexpr int Consumers = 256, Fetchers = 128, Threads = Consumers + Fetchers;
  // A slot of x holds XK values of k, one of w WK.
  static constexpr int XK = 32, BoxN = 64, Boxes = Width / BoxN, BoxBytes = XK * 128, XBytes = Boxes * BoxBytes;
  static constexpr int WK = Strided ? 32 : 64, WRow = WK * 2, WBytes = TJ * WRow, WSteps = WK / XK;
  // The fetching warps keep this many steps of x and w under way as they lie in memory, a row with one piece more.
  static constexpr int RawSteps = Strided ? 3 : 0, RawXRow = Width * 2 + 16, RawWRow = WRow + 16;
  static constexpr int RawStepBytes = XK * RawXRow + TJ * RawWRow, RawBytes = RawSteps * RawStepBytes;
  // y leaves in parts of 128 n, by the copy engine (Bulk) where that was the faster; a row may begin anywhere in its first sector.
  static constexpr bool Bulk = JGroups == 1;
  static constexpr int YPitch = 128 * 2 + (Strided ? 48 : 16), YBytes = Consumers / 32 * 16 * YPitch;
  static constexpr int MaxSlots = 16, BarrierBytes = 4 * MaxSlots * 8;
  // Arrivals that fill a slot, and that free it. Where threads fill w, every thread that has read it arrives: racecheck does not
  // follow what __syncwarp orders before one lane's arrival.
  static constexpr int Fills = Strided ? Fetchers : 1, XReleases = Consumers / 32 * Cluster, WReleases = Strided ? Consumers : Consumers / 32;
  static_assert(sizeof(T) == 2 && (JGroups == 1 || JGroups == 2) && WSteps <= 2 && Boxes % Cluster == 0);
  // With two groups along n, the warps of one would have to leave a sector to the other.
  static_assert(!Strided || (Cluster == 1 && JGroups == 2));
};

template <typename Tile_>
struct LastFrame : UnitWalk<Tile_> {
  using Tile = Tile_;
  using Walk = UnitWalk<Tile>;
  using typename Walk::Place;
  using Walk::place, Walk::p, Walk::s, Walk::rank, Walk::steps;
  using T = typename Tile::T;

  const CUtensorMap &x_map, &w_map;  // unless Strided
  const uint32_t shared;
  const uint32_t w_base = shared + s.x_slots * Tile::XBytes, raw_base = w_base + s.w_slots * Tile::WBytes;
  const uint32_t y_base = raw_base + Tile::RawBytes, x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  const uint32_t w_full = x_empty + 8 * Tile::MaxSlots, w_empty = w_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int my_j = Tile::JGroups == 2 ? group * Tile::WJ : 0, my_n = Tile::JGroups == 2 ? 0 : group * Tile::WN;

  __device__ LastFrame(const CUtensorMap& of_x, const CUtensorMap& of_w, const Product& product, const RegisterShape& shape, uint32_t base)
      : Walk(product, shape), x_map(of_x), w_map(of_w), shared(base) {}
};

}  // namespace structlayers
