// How a CTA of batch_first_unaligned.cuh is cut, and what all of its threads know.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "tile.cuh"

namespace structlayers {

// How a launch cuts the work; unaligned_shape derives it.
struct UnalignedShape {
  int x_slots, w_slots, unit_tiles;
  int j_groups;    // 2 where the warpgroups cut j, 1 where they cut the rows
  bool resident;   // w of a unit stays; w_slots hold all of it
  unsigned units;
};

template <typename T_, bool Split_, int DL_>
struct UnalignedTile {
  using T = T_;
  static constexpr bool Split = Split_, Float = sizeof(T) == 4;
  static constexpr int Size = sizeof(T), E = 16 / Size, DL = DL_;
  static constexpr int WJ = Float ? (DL <= 2 ? 64 : 32) : DL == 1 ? 128 : DL <= 4 ? 64 : 32;
  static constexpr int Consumers = 256, Copiers = 128, Threads = Consumers + Copiers;
  // x: a slot holds XK values of k of every row, and what of a piece is before them.
  static constexpr int XK = DL == 1 ? 128 / Size : DL == 2 || (DL == 3 && !Float) ? 32 : 16;
  static constexpr int XRun = XK * DL * Size, XPitch = XRun + 16;
  static constexpr bool Pieced = !Float && DL % 4 == 0;
  static constexpr int WRow = 128, WK = WRow / Size, WParts = Split ? 2 : 1;
  // y leaves in parts of j, each warp its own 16 rows of WJ columns.
  static constexpr int YParts = Float ? (DL == 1 ? 1 : DL <= 4 ? 2 : 4) : DL % 4 == 0 ? 2 : 1, YColumns = WJ / YParts;
  static constexpr int YRun = YColumns * DL * Size, YPitch = YRun + 16, YBytes = Consumers / 32 * 16 * YPitch;
  static constexpr int MaxSlots = 16, BarrierBytes = 2 * MaxSlots * 8;
  static_assert(DL >= 1 && DL <= 8 && WK % XK == 0 && YRun % 32 == 0);
};

// Addresses in shared memory, and the thread's place.
template <typename Tile_>
struct UnalignedFrame {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int DL = Tile::DL, WJ = Tile::WJ, XK = Tile::XK, Size = Tile::Size, E = Tile::E;
  using Accumulators = float[DL][WJ / 8][4];

  struct Place {
    int64_t n0;
    int i, j0, tiles;
  };

  const Product& p;
  const UnalignedShape& s;
  const int tn = s.j_groups == 2 ? 64 : 128, tj = s.j_groups * WJ;
  const int w_part = DL * tj * Tile::WRow, w_block = Tile::WParts * w_part;  // bytes
  const int steps = (p.c + XK - 1) / XK;
  const uint32_t w_base, x_base = w_base + s.w_slots * w_block, x_slot = tn * Tile::XPitch;
  const uint32_t y_base = x_base + s.x_slots * x_slot;
  const uint32_t x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int my_j = s.j_groups == 2 ? group * WJ : 0, my_row = (s.j_groups == 2 ? 0 : group * 64) + warp * 16;

  // The row, of eight, of this thread's accumulators. Pieced, DL = 4: threads that read at a time read different banks.
  const int row = Tile::Pieced && DL == 4 ? lane / 4 % 2 * 4 + lane / 8 : lane / 4;

  // The first tile of a unit, and how many it has.
  __device__ __forceinline__ Place place(unsigned unit) const {
    const unsigned tiles_j = (p.b + tj - 1) / tj;
    const int64_t tiles_n = (p.n + tn - 1) / tn;
    Place at;
    at.j0 = static_cast<int>(unit % tiles_j) * tj;
    unit /= tiles_j;
    at.i = static_cast<int>(unit % p.a);
    const int64_t first = static_cast<int64_t>(unit / p.a) * s.unit_tiles;
    at.n0 = first * tn;
    at.tiles = static_cast<int>(min(tiles_n - first, static_cast<int64_t>(s.unit_tiles)));
    return at;
  }

  // How many features of block i there are; the rest counts as zeros.
  __device__ __forceinline__ int block_features(int i) const {
    const int64_t run = static_cast<int64_t>(p.c) * DL;
    return static_cast<int>(max(min(run, p.in_features - i * run), int64_t{0}));
  }

  // A word of which `valid` elements exist; the others become zeros.
  static __device__ __forceinline__ uint32_t first_of_two(uint32_t v, int valid) { return valid >= 2 ? v : valid == 1 ? v & 0xffff : 0; }

  __device__ UnalignedFrame(const Product& product, const UnalignedShape& shape, uint32_t base)
      : p(product), s(shape), w_base(base) {}
};

}  // namespace structlayers
