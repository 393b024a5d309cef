// How a CTA of float32_registers.cuh is cut, and what all of its threads know.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "unit_walk.cuh"

namespace structlayers {

// Strided: threads copy x, since d > DL and runs lie apart or, batch-last, since rows are not whole 16-byte pieces or not all
// there (logical padding). LW: products that share a step: of so many l or, where DL = 1, of so many times 64 rows of the batch (RowTiles). JGroups: into
// how many parts the warpgroups cut the values of j; otherwise they cut the l (DL = 8) or the rows. WJ: j of a warpgroup.
template <bool Split_, int DL_, bool Strided_, bool Last_ = false, int JGroups_ = 1, int WJ_ = 64, int Cluster_ = 1>
struct Float32Tile {
  using T = float;
  static constexpr bool Grouped = true;
  static constexpr int DL = DL_;
  static constexpr bool Split = Split_, Strided = Strided_, Last = Last_;
  static constexpr int Cluster = Cluster_, JGroups = JGroups_, LGroups = DL == 8 ? 2 : 1, RowGroups = 2 / (JGroups * LGroups);
  static constexpr int LW = DL == 1 ? 2 : DL / LGroups, RowTiles = DL == 1 ? LW : 1, TN = 64 * RowGroups * RowTiles;
  static constexpr int WJ = WJ_, TJ = WJ * JGroups;
  static constexpr int Consumers = 256, Threads = Consumers + 256;
  // A step takes StepK values of k, in XSlots slots of x.
  static constexpr int XK = DL <= 2 ? 32 : 8, StepK = XK < 16 ? 16 : XK, XSlots = StepK / XK;
  static constexpr int Boxes = Last ? TN / 32 : XK * DL / 32, BoxRows = Last ? XK : TN / Cluster;
  static constexpr int BoxBytes = (Last ? XK : TN) * 128, XBytes = Boxes * BoxBytes;
  static constexpr int XWarps = 3, XArrivals = Strided ? 32 * XWarps : 1;
  // Where threads copy, every thread that has read arrives, so that compute-sanitizer sees what orders the two.
  static constexpr int XReleases = Strided ? Consumers : Consumers / 32 * Cluster;
  // A slot of w holds WK values of k of WL values of l: where the warpgroups cut l, each has slots of its own, in turn.
  static constexpr int WK = Split ? StepK : 32, WSteps = WK / StepK, WL = DL / LGroups, WRow = WK * 4, WPart = WL * TJ * WRow;
  static constexpr int WBytes = (Split ? 2 : 1) * WPart, WThreads = 128;
  // Where the warpgroups cut l, each hands half of its j to the other, 8 at a time, so that sectors of y leave whole.
  static constexpr int YBytes = LGroups == 2 ? Consumers * 64 : 0;
  static constexpr int MaxSlots = 16, BarrierBytes = 5 * MaxSlots * 8;
  static_assert((DL == 1 || DL == 2 || DL == 4 || DL == 8) && (!Strided || DL == 8 || Last) && (!Last || DL == 1));
  static_assert((Cluster == 1 || (Cluster == 2 && !Strided && !Last)) && RowGroups >= 1);
  static_assert(XBytes % 1024 == 0 && WPart % 1024 == 0);
};

// Addresses in shared memory, and the thread's place.
template <typename Tile_>
struct Float32Frame : UnitWalk<Tile_> {
  using Tile = Tile_;
  using Walk = UnitWalk<Tile>;
  using Walk::p, Walk::s;
  static constexpr int DL = Tile::DL, LW = Tile::LW, WJ = Tile::WJ, TN = Tile::TN;
  using Accumulators = float[LW][WJ / 8][4];

  const CUtensorMap &x_map, &w_map;
  const uint32_t shared;
  const int steps = (p.c + Tile::StepK - 1) / Tile::StepK;
  const uint32_t w_base = shared + s.x_slots * Tile::XBytes, y_base = w_base + s.w_slots * Tile::WBytes;
  const uint32_t x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  // w_raw: what the copy engine brought is there, not split yet.
  const uint32_t w_raw = x_empty + 8 * Tile::MaxSlots, w_full = w_raw + 8 * Tile::MaxSlots, w_empty = w_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  const int my_j = Tile::JGroups == 2 ? group * WJ : 0;
  const int my_row = (Tile::RowGroups == 2 ? group * 64 * Tile::RowTiles : 0) + warp * 16;
  // The row, of eight, of this thread's accumulators: threads that read at a time read different banks.
  static __device__ __forceinline__ int row_of(int quad) {
    return DL == 8 ? quad : DL == 2 ? quad % 4 * 2 + quad / 4 : quad % 2 * 4 + quad / 2;
  }
  const int row = row_of(lane / 4);

  __device__ Float32Frame(const CUtensorMap& of_x, const CUtensorMap& of_w, const Product& product, const RegisterShape& shape,
                          uint32_t base)
      : Walk(product, shape), x_map(of_x), w_map(of_w), shared(base) {}
};

}  // namespace structlayers
