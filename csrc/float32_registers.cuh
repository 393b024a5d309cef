// float32 product with one Kronecker-sparse factor on Hopper's tensor cores (sm_90a): x goes from shared memory to
// the registers that wgmma takes its first operand from, split there into two TF32 numbers; w is split on its way into shared
// memory, once for many tiles of the batch where all of it fits.
//
// Contract: product.h. What the host promises: register_shape in launch_registers.cuh.
//
// Index map: units, tiles and the persistent grid are those of unit_walk.cuh. Two warpgroups multiply: they cut the rows of a
// tile (DL = 1, 2), its values of j (DL = 4) or its l (DL = 8). A third fetches: x by the copy engine (where d = DL) or by two
// of its warps (d > DL: runs of 32 bytes); its other warps read w and write it split.
//
//   x in shared memory: boxes of 128 bytes of every row, [k][l] as it lies, 16-byte pieces swizzled by the row
//   batch-last: one l; boxes of 32 n of every k, [k][n] as it lies, swizzled likewise
//   w in shared memory: [l][j][k], upper parts, then lower parts; k in the order in which a thread of a warpgroup holds it:
//     DL = 1: its 16 bytes of x are 4 k; DL = 2: 2 k of 2 l; DL >= 4: one k of 4 l; batch-last: one k of 4 rows n
//
// Split: y = x_low w_high + x_high w_low + x_high w_high. The tensor core truncates where it accumulates, so the products of
// 16 k begin at zero and are added to float32 registers. Otherwise there is the last product alone: TF32.
//
// Shared memory: x_slots * XBytes + w_slots * WBytes + YBytes + 1024 bytes, and RawBytes where w does not stay.
// Source: the pattern is that of arXiv:2405.15013; that three products of split operands, promoted, are as exact as float32
// was measured (NOTES.md); the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "tile.cuh"
#include "unit_walk.cuh"
#include "wgmma.cuh"

namespace structlayers {

// LW: products that share a step of K: of so many l or, where DL = 1, of so many times 64 rows of the batch (RowTiles).
template <bool Split_, int DL_, bool Strided_, bool Last_ = false>
struct Float32Tile {
  using T = float;
  static constexpr int DL = DL_;
  static constexpr bool Split = Split_, Strided = Strided_, Last = Last_;
  static constexpr int Cluster = 1, LGroups = DL == 8 ? 2 : 1, JGroups = DL == 4 ? 2 : 1, RowGroups = DL <= 2 ? 2 : 1;
  static constexpr int LW = DL == 1 ? 2 : DL / LGroups, RowTiles = DL == 1 ? LW : 1, TN = 64 * RowGroups * RowTiles;
  static constexpr int WJ = DL == 4 || DL == 8 ? 32 : 64, TJ = WJ * JGroups;
  static constexpr int Consumers = 256, Threads = Consumers + 128;
  static constexpr int XK = DL <= 2 ? 32 : 16, Boxes = Last ? TN / 32 : XK * DL / 32, BoxRows = Last ? XK : TN;
  static constexpr int BoxBytes = BoxRows * 128, XBytes = Boxes * BoxBytes;
  static constexpr int XWarps = Strided ? 2 : 1, XArrivals = Strided ? 32 * XWarps : 1, WArrivals = 128 - 32 * XWarps;
  static constexpr int WK = XK, WRow = WK * 4, WPart = DL * TJ * WRow, WBytes = (Split ? 2 : 1) * WPart, WSteps = 1;
  // Weights that do not stay come by asynchronous copies, so many steps ahead of their splitting.
  static constexpr int RawStages = 3, RawBytes = RawStages * WPart;
  // Where the warpgroups cut l, each hands half of its j to the other, so that sectors of y leave whole.
  static constexpr int YBytes = LGroups == 2 ? Consumers * 128 : 0;
  static constexpr int MaxSlots = 16, BarrierBytes = 4 * MaxSlots * 8;
  static_assert((DL == 1 || DL == 2 || DL == 4 || DL == 8) && (!Strided || DL == 8) && (!Last || DL == 1) && WBytes % 1024 == 0);
};

template <typename Tile>
class Float32Registers : UnitWalk<Tile> {
  using Walk = UnitWalk<Tile>;
  using typename Walk::Place;
  using Walk::place, Walk::p, Walk::s, Walk::steps;
  static constexpr int DL = Tile::DL, LW = Tile::LW, WJ = Tile::WJ, TN = Tile::TN, Parts = Tile::XK / 16;
  static constexpr bool Split = Tile::Split;

  const CUtensorMap& x_map;
  const uint32_t shared;
  const uint32_t w_base = shared + s.x_slots * Tile::XBytes, raw_base = w_base + s.w_slots * Tile::WBytes;
  const uint32_t y_base = raw_base + (s.resident ? 0 : Tile::RawBytes);
  const uint32_t x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  const uint32_t w_full = x_empty + 8 * Tile::MaxSlots, w_empty = w_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  // ---- the threads that fetch

  __device__ __forceinline__ void fetch_x() const {
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      // Features of block i begin at i * c * d of a row, or at 0 of block i of the map.
      const int block = s.flat_input ? 0 : at.i, first_k = s.flat_input ? at.i * p.c : 0;
      for (int tile = 0; tile < at.tiles; ++tile) {
        for (int step = 0; step < steps; ++step) {
          const uint32_t full = x_full + 8 * ring.slot;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::XBytes);
#pragma unroll
          for (int box = 0; box < Tile::Boxes; ++box) {
            const uint32_t destination = shared + ring.slot * Tile::XBytes + box * Tile::BoxBytes;
            const int n = static_cast<int>(at.n0) + tile * TN, k = first_k + step * Tile::XK;
            if constexpr (Tile::Last) copy_box(destination, x_map, full, n + box * 32, at.l0, k, at.i);
            else copy_box(destination, x_map, full, k * DL + box * 32, block, n);
          }
          ring.advance(s.x_slots);
        }
      }
    }
  }

  // The same by XWarps warps, where runs lie apart: an instruction of a warp takes one row of a slot, a lane 16 bytes of the run
  // of one k.
  __device__ __forceinline__ void copy_x(int first_row) const {
    const int k = lane / 2, half = lane % 2, chunk = k % 4 * 2 + half;
    const uint32_t box = k / 4 * Tile::BoxBytes;
    const int64_t step_features = int64_t{Tile::XK} * p.d;
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      const int64_t run = static_cast<int64_t>(p.c) * p.d, block = at.i * run;
      const int64_t first = static_cast<int64_t>(k) * p.d + at.l0 + half * 4;
      // How many features there are from this lane's first to the end of the block; what lies behind counts as zeros.
      const int64_t features = at.l0 + half * 4 < p.d ? min(run, p.in_features - block) - first : 0;
      const float* tile_source = static_cast<const float*>(p.x) + (at.n0 + first_row) * p.x_stride + block + first;
      int rows = static_cast<int>(p.n - at.n0) - first_row;
      for (int tile = 0; tile < at.tiles; ++tile, rows -= TN, tile_source += TN * p.x_stride) {
        const float* step_source = tile_source;
        int64_t left = features;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, step_source += step_features, left -= step_features) {
          const uint32_t slot = shared + ring.slot * Tile::XBytes + box;
          const int valid_rows = left > 0 ? rows : 0;
          const float* source = step_source;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll 8
          for (int r = 0; r < TN; r += Tile::XWarps, source += Tile::XWarps * p.x_stride) {
            const int n = first_row + r;
            copy_async_16(slot + n * 128 + ((chunk ^ (n & 7)) * 16), source, r < valid_rows ? 16 : 0);
          }
          copy_async_arrive(x_full + 8 * ring.slot);
          ring.advance(s.x_slots);
        }
      }
    }
    // No thread leaves before what it copied has arrived.
    copy_async_commit();
    copy_async_wait<0>();
  }

  // The k, of 16, at `position` of a row of w.
  static __device__ __forceinline__ constexpr int k_at(int position) {
    const int q = position / 8, upper = position / 4 % 2, t = position % 4;
    return Tile::Last ? position : DL == 1 ? 4 * t + 2 * q + upper : DL == 2 ? 8 * q + 2 * t + upper : position;
  }

  // To the nearest number of 10 bits; what is left is exact.
  static __device__ __forceinline__ uint32_t upper_part(uint32_t v) { return (v + 0x1000u) & 0xffffe000u; }
  static __device__ __forceinline__ uint32_t lower_part(uint32_t v, uint32_t upper) {
    return __float_as_uint(__uint_as_float(v) - __uint_as_float(upper));
  }

  __device__ __forceinline__ void load_w(uint32_t (&v)[16], const Place& at, int l, int j, int k) const {
    const bool inside = at.l0 + l < p.d && at.j0 + j < p.b;
    const int64_t row = (static_cast<int64_t>(at.i) * p.d + at.l0 + l) * p.b + at.j0 + j;
    const float* source = static_cast<const float*>(p.w) + row * p.c + k;
    const int valid = inside ? p.c - k : 0;
#pragma unroll
    for (int m = 0; m < 16; m += 4) {
      uint32_t piece[4] = {0, 0, 0, 0};
      if (p.w_aligned) {
        if (m < valid) load_global_16(piece, source + m);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (m + e < valid) piece[e] = __float_as_uint(__ldg(source + m + e));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) v[m + e] = piece[e];
    }
  }

  // What threads do to w: a thread takes pieces of 16 k of one row, always the same of every step.
  static constexpr int KParts = Tile::WK / 16, Pieces = DL * Tile::TJ * KParts, WThreads = Tile::WArrivals;
  static constexpr int Rounds = (Pieces + WThreads - 1) / WThreads;

  __device__ __forceinline__ void write_w(const uint32_t (&v)[16], int piece, uint32_t slot) const {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const uint32_t place = slot + swizzled<Tile::WRow / 16>(piece / KParts, piece % KParts * 4 + chunk);
      uint32_t upper[4], lower[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t exact = v[k_at(chunk * 4 + e)];
        upper[e] = upper_part(exact);
        lower[e] = lower_part(exact, upper[e]);
      }
      store_shared_16(place, upper);
      if constexpr (Split) store_shared_16(place + Tile::WPart, lower);
    }
  }

  // Through registers: where w stays for several tiles, or is not made of whole 16-byte pieces.
  __device__ __forceinline__ void split_w(int thread) const {
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      const int times = s.resident ? 1 : at.tiles;
      for (int tile = 0; tile < times; ++tile) {
#pragma unroll 1
        for (int k0 = 0; k0 < p.c; k0 += Tile::WK) {
          barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll 2
          for (int round = 0; round < Rounds; ++round) {
            const int piece = thread + round * WThreads;
            if (piece >= Pieces) break;
            uint32_t v[16];
            load_w(v, at, piece / KParts / Tile::TJ, piece / KParts % Tile::TJ, k0 + piece % KParts * 16);
            write_w(v, piece, w_base + ring.slot * Tile::WBytes);
          }
          fence_shared_for_wgmma();
          barrier_arrive(w_full + 8 * ring.slot);
          ring.advance(s.w_slots);
        }
      }
    }
  }

  // Where w does not stay: these threads copy it RawStages - 1 steps before they split it. Four lanes copy the 64 bytes of a
  // piece, so that a warp reads whole sectors; one of them splits it.
  __device__ __forceinline__ void stream_w(int thread) const {
    unsigned unit = blockIdx.x;  // of the step to copy
    int tile = 0, k0 = 0, under_way = 0, stage = 0;
    Place at{};
    if (unit < s.units) at = place(unit);
    static_assert(Pieces * 64 == Tile::WPart);
    const auto raw = [&](int of_stage, int piece, int m) { return raw_base + of_stage * Tile::WPart + (m * Pieces + piece) * 16; };
    const auto copy_step = [&](int to_stage) {
      if (unit < s.units) {
#pragma unroll 4
        for (int quarter = thread; quarter < Pieces * 4; quarter += WThreads) {
          const int piece = quarter / 4, m = quarter % 4, j = at.j0 + piece / KParts % Tile::TJ, l = at.l0 + piece / KParts / Tile::TJ;
          const int k = k0 + piece % KParts * 16 + m * 4;
          const bool inside = l < p.d && j < p.b && k < p.c;
          const int64_t element = ((static_cast<int64_t>(at.i) * p.d + l) * p.b + j) * p.c + k;
          copy_async_16(raw(to_stage, piece, m), static_cast<const float*>(p.w) + (inside ? element : 0), inside ? 16 : 0);
        }
        ++under_way;
        k0 += Tile::WK;
        if (k0 >= p.c) {
          k0 = 0;
          if (++tile == at.tiles) {
            tile = 0;
            unit += gridDim.x;
            if (unit < s.units) at = place(unit);
          }
        }
      }
      copy_async_commit();
    };
    Ring ring;
    for (int q = 0; q < Tile::RawStages - 1; ++q) copy_step(q);
    while (true) {
      if (under_way == 0) break;
      copy_async_wait<Tile::RawStages - 2>();
      // Everybody's copies of this step are there, and the stage of the step before has been read.
      sync_threads(2, WThreads);
      copy_step(stage == 0 ? Tile::RawStages - 1 : stage - 1);
      barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
      for (int round = 0; round < Rounds; ++round) {
        const int piece = thread + round * WThreads;
        if (piece >= Pieces) continue;
        uint32_t v[16];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          uint32_t part[4];
          load_shared_16(part, raw(stage, piece, m));
#pragma unroll
          for (int e = 0; e < 4; ++e) v[m * 4 + e] = part[e];
        }
        write_w(v, piece, w_base + ring.slot * Tile::WBytes);
      }
      fence_shared_for_wgmma();
      barrier_arrive(w_full + 8 * ring.slot);
      ring.advance(s.w_slots);
      --under_way;
      if (++stage == Tile::RawStages) stage = 0;
    }
  }

  // ---- x: shared memory to registers

  const int my_l = Tile::LGroups == 2 ? group * LW : 0, my_j = Tile::JGroups == 2 ? group * WJ : 0;
  const int my_row = (Tile::RowGroups == 2 ? group * 64 * Tile::RowTiles : 0) + warp * 16;
  // The row, of eight, of this thread's accumulators: threads that read at a time read different banks.
  static __device__ __forceinline__ int row_of(int quad) { return DL == 8 ? quad : quad % 2 * 4 + quad / 2; }
  const int row = row_of(lane / 4);

  // For rows (row, row + 8), what 16 k of a slot hold for this thread, LW values of l.
  static constexpr int Held = 4 * LW;
  using Raw = uint32_t[2][Held];

  __device__ __forceinline__ void load_x(Raw& raw, uint32_t slot, int part) const {
    const int t = lane % 4;
    if constexpr (Tile::Last) {
      // Here the rows of this thread are four neighbours in n, two of either product.
      const uint32_t box = slot + (group * 4 + warp) * Tile::BoxBytes + part * (16 * 128);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int k = m * 4 + t;
        uint32_t v[4];
        load_shared_16(v, box + k * 128 + (row ^ (k & 7)) * 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) raw[e % 2][m * 2 + e / 2] = v[e];
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t line = slot + (my_row + row + h * 8) * 128;
#pragma unroll
        for (int m = 0; m < LW; ++m) {
          const int box = DL == 2 ? part : DL == 4 ? m / 2 : DL == 8 ? m : 0, below = DL == 1 ? m * 64 * 128 : 0;
          const int chunk = DL == 1 ? part * 4 + t : DL == 2 ? m * 4 + t : DL == 4 ? m % 2 * 4 + t : 2 * t + group;
          uint32_t v[4];
          load_shared_16(v, line + below + box * Tile::BoxBytes + (chunk ^ row) * 16);
#pragma unroll
          for (int e = 0; e < 4; ++e) raw[h][m * 4 + e] = v[e];
        }
      }
    }
  }

  // The operands of 8 k: registers are (row, k), (row + 8, k), (row, k + 4), (row + 8, k + 4) of the order of k_at.
  using Operands = uint32_t[2][4];

  static __device__ __forceinline__ void split_x(Operands& upper, Operands& lower, const Raw& raw, int l) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int high = r / 2;
        const int index = Tile::Last ? (q * 2 + high) * 2 + l
                          : DL == 1  ? l * 4 + 2 * q + high
                          : DL == 2  ? q * 4 + high * 2 + l
                                     : (q * 2 + high) * 4 + l;
        const uint32_t exact = raw[r % 2][index];
        upper[q][r] = upper_part(exact);
        if constexpr (Split) lower[q][r] = lower_part(exact, upper[q][r]);
      }
    }
    // Ready before the first product: none is written while products are under way.
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      asm volatile("" : "+r"(upper[q][0]), "+r"(upper[q][1]), "+r"(upper[q][2]), "+r"(upper[q][3])::"memory");
      if constexpr (Split) asm volatile("" : "+r"(lower[q][0]), "+r"(lower[q][1]), "+r"(lower[q][2]), "+r"(lower[q][3])::"memory");
    }
  }

  // ---- products

  using Accumulators = float[LW][WJ / 8][4];
  using Partial = float[WJ / 8][4];
  static constexpr uint64_t LStep = DL == 1 ? 0 : Tile::TJ * Tile::WRow / 16, LowStep = Tile::WPart / 16;

  __device__ static __forceinline__ void promote(Partial& acc, const Partial& partial) {
#pragma unroll
    for (int g = 0; g < WJ / 8; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[g][e] += partial[g][e];
  }

  __device__ __forceinline__ void release_x(int slot) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(x_empty + 8 * slot);
  }

  // The products of one slot of x with one of w; all are done at the end. While those of one batch (16 k, one l) are under way,
  // the operands of the next are made, and the sums of the one before are promoted.
  __device__ __forceinline__ void multiply_step(Accumulators& acc, int slot, uint64_t w) const {
    constexpr int Batches = Parts * LW;
    Raw raw;
    Operands upper[2], lower[2];
    Partial partial[2];
#pragma unroll
    for (int batch = 0; batch < Batches; ++batch) {
      const int part = batch / LW, l = batch % LW;
      if (l == 0) load_x(raw, shared + slot * Tile::XBytes, part);
      split_x(upper[batch % 2], lower[batch % 2], raw, l);
      if (batch == Batches - 1) release_x(slot);
      wgmma_fence();
      const uint64_t b = w + (my_l + l) * LStep + part * 4;
      Partial& out = partial[batch % 2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if constexpr (Split) {
          WgmmaRegisters<float, WJ>::multiply(out, lower[batch % 2][q], b + 2 * q, q == 0);
          WgmmaRegisters<float, WJ>::multiply(out, upper[batch % 2][q], b + LowStep + 2 * q, false);
        }
        WgmmaRegisters<float, WJ>::multiply(out, upper[batch % 2][q], b + 2 * q, !Split && q == 0);
      }
      wgmma_commit();
      if (batch > 0) {
        wgmma_wait<1>();
        promote(acc[(batch - 1) % LW], partial[(batch - 1) % 2]);
      }
    }
    wgmma_wait();
    promote(acc[LW - 1], partial[(Batches - 1) % 2]);
  }

  __device__ __forceinline__ void multiply() const {
    Ring x, w;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += TN) {
        const bool loads = !s.resident || tile == 0, last_use = !s.resident || tile == at.tiles - 1;
        Accumulators acc;
#pragma unroll
        for (int l = 0; l < LW; ++l)
#pragma unroll
          for (int g = 0; g < WJ / 8; ++g)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[l][g][e] = 0.f;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          if (loads) barrier_wait(w_full + 8 * w.slot, w.parity);
          barrier_wait(x_full + 8 * x.slot, x.parity);
          multiply_step(acc, x.slot, wgmma_descriptor<Tile::WRow>(w_base + w.slot * Tile::WBytes + my_j * Tile::WRow));
          if (last_use && lane == 0) barrier_arrive(w_empty + 8 * w.slot);
          x.advance(s.x_slots);
          w.advance(s.w_slots);
        }
        // The same w again.
        if (!last_use) w.parity ^= 1;
        finish(acc, at);
      }
    }
  }

  // ---- y

  // Values of y that a thread writes: LE values of l, G groups of 8 columns.
  static constexpr int LE = DL, G = Tile::LGroups == 2 ? WJ / 16 : WJ / 8;
  using Finished = float[LE][G][4];

  __device__ __forceinline__ void finish(Accumulators& acc, const Place& at) const {
    if constexpr (Tile::Last) {
      write_y_last(acc, at);
    } else if constexpr (Tile::LGroups == 2) {
      Finished z;
      exchange(z, acc);
      write_y(z, at, my_j + group * G * 8);
    } else if constexpr (DL == 1) {
#pragma unroll
      for (int m = 0; m < LW; ++m) write_y(reinterpret_cast<Finished&>(acc[m]), at, my_j, m * 64);
    } else {
      write_y(acc, at, my_j);
    }
  }

  // Warpgroup q gives its values of the other half of j, and gets the other l of its own half.
  __device__ __forceinline__ void exchange(Finished& z, const Accumulators& acc) const {
    const int thread = threadIdx.x % 128;
    const bool upper = group == 1;
    const uint32_t mine = y_base + group * (128 * 128) + thread * 16, theirs = y_base + (group ^ 1) * (128 * 128) + thread * 16;
    sync_threads(1, Tile::Consumers);  // what was exchanged before has been read
#pragma unroll
    for (int l = 0; l < LW; ++l)
#pragma unroll
      for (int g = 0; g < G; ++g) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = __float_as_uint(upper ? acc[l][g][e] : acc[l][G + g][e]);
        store_shared_16(mine + (l * G + g) * (128 * 16), v);
      }
    sync_threads(1, Tile::Consumers);
#pragma unroll
    for (int l = 0; l < LW; ++l)
#pragma unroll
      for (int g = 0; g < G; ++g) {
        uint32_t v[4];
        load_shared_16(v, theirs + (l * G + g) * (128 * 16));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float own = upper ? acc[l][G + g][e] : acc[l][g][e], other = __uint_as_float(v[e]);
          z[l][g][e] = upper ? other : own;
          z[LW + l][g][e] = upper ? own : other;
        }
      }
  }

  __device__ __forceinline__ void write_y(Finished& z, const Place& at, int column0, int row0 = 0) const {
    const int t = lane % 4, j0 = at.j0 + column0;
    const int64_t d = p.d, feature0 = (static_cast<int64_t>(at.i) * p.b + j0) * d + at.l0;  // of column 0, l 0
    if (p.bias != nullptr) {
      const float* bias = static_cast<const float*>(p.bias);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = g * 8 + 2 * t + e;
#pragma unroll
          for (int l = 0; l < LE; ++l) {
            const int64_t feature = feature0 + j * d + l;
            const float v = j0 + j < p.b && feature < p.out_features ? __ldg(bias + feature) : 0.f;
            z[l][g][e] += v;
            z[l][g][2 + e] += v;
          }
        }
    }
    if (p.activation != kNone) {
#pragma unroll
      for (int l = 0; l < LE; ++l)
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[l][g][e] = activate(z[l][g][e], p.activation);
    }
    const int64_t n0 = at.n0 + my_row + row0 + row;
    float* destination = static_cast<float*>(p.y) + n0 * p.y_stride + feature0;
    // All of this warp's rows and columns exist: one path for the whole warp.
    const bool whole = p.y_aligned && at.n0 + my_row + row0 + 16 <= p.n && j0 + G * 8 <= p.b &&
                       feature0 + (G * 8 - 1) * d + LE <= p.out_features;
    if (whole) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* line = destination + h * 8 * p.y_stride;
#pragma unroll
        for (int g = 0; g < G; ++g) write_columns(z, line, g, h, t);
      }
      return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (n0 + h * 8 >= p.n) continue;
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = g * 8 + 2 * t + e;
          const int64_t offset = j * d;
          if (j0 + j >= p.b) continue;
#pragma unroll
          for (int l = 0; l < LE; ++l)
            if (feature0 + offset + l < p.out_features) destination[h * 8 * p.y_stride + offset + l] = z[l][g][2 * h + e];
        }
    }
  }

  // Batch-last: a thread has four neighbours in n of every j, and eight quads 128 bytes of a row of y.
  __device__ __forceinline__ void write_y_last(Accumulators& acc, const Place& at) const {
    const int t = lane % 4;
    const int64_t n = at.n0 + (group * 4 + warp) * 32 + row * 4, valid = p.n - n;
    const int64_t feature0 = (static_cast<int64_t>(at.i) * p.b + at.j0) * p.d + at.l0;
#pragma unroll
    for (int g = 0; g < WJ / 8; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = g * 8 + 2 * t + e;
        const int64_t feature = feature0 + static_cast<int64_t>(j) * p.d;
        const bool inside = at.j0 + j < p.b && feature < p.out_features;
        const float bias = p.bias != nullptr && inside ? __ldg(static_cast<const float*>(p.bias) + feature) : 0.f;
        float z[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) z[q] = acc[q / 2][g][q % 2 * 2 + e] + bias;
        if (p.activation != kNone) {
#pragma unroll
          for (int q = 0; q < 4; ++q) z[q] = activate(z[q], p.activation);
        }
        float* destination = static_cast<float*>(p.y) + feature * p.y_stride + n;
        if (inside && valid >= 4 && p.y_aligned) {
          *reinterpret_cast<float4*>(destination) = make_float4(z[0], z[1], z[2], z[3]);
        } else if (inside) {
#pragma unroll
          for (int q = 0; q < 4; ++q)
            if (q < valid) destination[q] = z[q];
        }
      }
  }

  // Two neighbouring columns of one row. Where a thread's values of a column fill half a sector or more, two lanes exchange
  // pieces, so that every store of the warp fills whole sectors.
  __device__ __forceinline__ void write_columns(const Finished& z, float* line, int g, int h, int t) const {
    const auto bits = [&](int l, int e) { return __float_as_uint(z[l][g][2 * h + e]); };
    if constexpr (DL == 1) {
      *reinterpret_cast<float2*>(line + g * 8 + 2 * t) = make_float2(z[0][g][2 * h], z[0][g][2 * h + 1]);
    } else if constexpr (DL == 2) {
      store_global_16(line + (g * 8 + 2 * t) * 2, {bits(0, 0), bits(1, 0), bits(0, 1), bits(1, 1)});
    } else if constexpr (DL == 4) {
      const uint32_t low[4] = {bits(0, 0), bits(1, 0), bits(2, 0), bits(3, 0)}, high[4] = {bits(0, 1), bits(1, 1), bits(2, 1), bits(3, 1)};
      float* first = line + (g * 8 + t / 2 * 4 + t % 2) * 4;
      write_pair(low, high, first, first + 8, t % 2 != 0);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t low[4] = {bits(0, e), bits(1, e), bits(2, e), bits(3, e)}, high[4] = {bits(4, e), bits(5, e), bits(6, e), bits(7, e)};
        float* first = line + static_cast<int64_t>(g * 8 + t / 2 * 4 + e) * p.d + t % 2 * 4;
        write_pair(low, high, first, first + 2 * static_cast<int64_t>(p.d), t % 2 != 0);
      }
    }
  }

  // The even lane of two holds (A0, A1), the odd one (B0, B1): A0 and A1 leave together for `first`, B0 and B1 for `second`.
  static __device__ __forceinline__ void write_pair(const uint32_t (&low)[4], const uint32_t (&high)[4], float* first, float* second,
                                                    bool odd) {
    uint32_t a[4], b[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t received = __shfl_xor_sync(0xffffffff, odd ? low[e] : high[e], 1);
      a[e] = odd ? received : low[e];
      b[e] = odd ? high[e] : received;
    }
    store_global_16(first, a);
    store_global_16(second, b);
  }

 public:
  __device__ Float32Registers(const CUtensorMap& map, const Product& product, const RegisterShape& shape, uint32_t base)
      : Walk(product, shape), x_map(map), shared(base) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, Tile::XArrivals);
        barrier_init(x_empty + 8 * slot, Tile::Consumers / 32);
      }
      for (int slot = 0; slot < s.w_slots; ++slot) {
        barrier_init(w_full + 8 * slot, Tile::WArrivals);
        barrier_init(w_empty + 8 * slot, Tile::Consumers / 32);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {
      keep_registers<88>();
      if (warp >= Tile::XWarps) {
        const int thread = threadIdx.x % 128 - 32 * Tile::XWarps;
        if (s.resident || !p.w_aligned) split_w(thread);
        else stream_w(thread);
      } else if constexpr (Tile::Strided) {
        copy_x(warp);
      } else {
        if (lane == 0) fetch_x();
        __syncwarp();
      }
    } else {
      take_registers<208>();
      multiply();
    }
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    float32_registers_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Product p,
                             const __grid_constant__ RegisterShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Float32Registers<Tile>(x_map, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
