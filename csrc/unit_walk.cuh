// How the kernels that take x to registers walk over their work. No torch here.
//
// A tile is TN rows n, TJ values of j and DL neighbouring l of one i. A unit is `unit_tiles` tiles that follow one another
// along n; a persistent grid takes units with j running fastest, then l, i and n, so that CTAs that read the same x run together.
// Where w is larger than the L2 keeps, `l_group` tiles along l run fastest, which share lines of x and y, then `group` units
// along n, j, the rest of l, of n, and i: every w is fetched once for a group.
#pragma once

#include "asynchronous.cuh"
#include "product.h"

namespace structlayers {

// How a launch cuts the work; register_shape (launch_registers.cuh) derives it.
struct RegisterShape {
  int x_slots, w_slots, unit_tiles;
  bool resident;     // w of a unit stays; w_slots hold all of it
  bool flat_input;   // x is fetched by features, not by blocks: logical padding
  unsigned units;    // of a cluster
  unsigned group;    // 0: not grouped
  unsigned groups;   // along n
  unsigned l_group;  // divides the tiles along l
};

template <typename Tile>
struct UnitWalk {
  const Product& p;
  const RegisterShape& s;
  const int rank = Tile::Cluster == 1 ? 0 : static_cast<int>(cluster_rank());
  const int steps = (p.c + Tile::XK - 1) / Tile::XK;
  const int64_t tiles_n = (p.n + Tile::TN - 1) / Tile::TN;

  struct Place {
    int64_t n0;
    int i, l0, j0, tiles;
  };

  __device__ UnitWalk(const Product& product, const RegisterShape& shape) : p(product), s(shape) {}

  // The first tile of a unit, and how many it has.
  __device__ __forceinline__ Place place(unsigned unit) const {
    const unsigned tiles_j = (p.b + Tile::TJ * Tile::Cluster - 1) / (Tile::TJ * Tile::Cluster), tiles_l = (p.d + Tile::DL - 1) / Tile::DL;
    if constexpr (Tile::Grouped) {
      if (s.group > 0) return place_grouped(unit, tiles_j, tiles_l / s.l_group);
    }
    Place at;
    at.j0 = (static_cast<int>(unit % tiles_j) * Tile::Cluster + rank) * Tile::TJ;
    unit /= tiles_j;
    at.l0 = static_cast<int>(unit % tiles_l) * Tile::DL;
    unit /= tiles_l;
    at.i = static_cast<int>(unit % p.a);
    const int64_t first = static_cast<int64_t>(unit / p.a) * s.unit_tiles;
    at.n0 = first * Tile::TN;
    at.tiles = static_cast<int>(min(tiles_n - first, static_cast<int64_t>(s.unit_tiles)));
    return at;
  }

  __device__ __forceinline__ Place place_grouped(unsigned unit, unsigned tiles_j, unsigned l_groups) const {
    Place at;
    unsigned l = unit % s.l_group;
    unit /= s.l_group;
    unsigned n = unit % s.group;
    unit /= s.group;
    at.j0 = (static_cast<int>(unit % tiles_j) * Tile::Cluster + rank) * Tile::TJ;
    unit /= tiles_j;
    l += unit % l_groups * s.l_group;
    at.l0 = static_cast<int>(l) * Tile::DL;
    unit /= l_groups;
    n += unit % s.groups * s.group;
    at.i = static_cast<int>(unit / s.groups);
    const int64_t first = static_cast<int64_t>(n) * s.unit_tiles;
    at.n0 = first * Tile::TN;
    // None, or fewer, at the end of the last group.
    at.tiles = static_cast<int>(max(min(tiles_n - first, static_cast<int64_t>(s.unit_tiles)), int64_t{0}));
    return at;
  }

  // By one thread: the slots of w from `base` on, once for a unit where w stays.
  __device__ __forceinline__ void fetch_w(const CUtensorMap& map, uint32_t base, uint32_t full_barriers, uint32_t empty_barriers) const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      const int times = s.resident ? min(at.tiles, 1) : at.tiles;
      for (int tile = 0; tile < times; ++tile) {
        for (int k = 0; k < p.c; k += Tile::WK) {
          const uint32_t full = full_barriers + 8 * ring.slot;
          barrier_wait(empty_barriers + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::WBytes);
          copy_box(base + ring.slot * Tile::WBytes, map, full, k, at.j0, at.i * p.d + at.l0);
          ring.advance(s.w_slots);
        }
      }
    }
  }
};

}  // namespace structlayers
