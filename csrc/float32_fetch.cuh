// The threads of float32_registers.cuh that fetch x and w, and split w.
#pragma once

#include "float32_tile.cuh"
#include "split.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

namespace structlayers {

// Base: Float32Frame, or what adds to it.
template <typename Base>
struct Float32Fetch : Base {
  using Base::Base, Base::place, Base::p, Base::s, Base::rank, Base::x_map, Base::w_map, Base::shared, Base::steps, Base::w_base, Base::x_full,
      Base::x_empty, Base::w_raw, Base::w_full, Base::w_empty, Base::lane, Base::warp, Base::DL, Base::TN;
  using typename Base::Tile, typename Base::Place;
  static constexpr bool Split = Tile::Split;

  __device__ __forceinline__ void fetch_x() const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      // Features of block i begin at i * c * d of a row, or at 0 of block i of the map.
      const int block = s.flat_input ? 0 : at.i, first_k = s.flat_input ? at.i * p.c : 0;
      for (int tile = 0; tile < at.tiles; ++tile) {
        for (int piece = 0; piece < steps * Tile::XSlots; ++piece) {
          const uint32_t full = x_full + 8 * ring.slot;
          if constexpr (Tile::Cluster == 1) barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
          else barrier_wait_cluster(x_empty + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::XBytes);
#pragma unroll
          for (int box = 0; box < Tile::Boxes; ++box) {
            const uint32_t destination = shared + ring.slot * Tile::XBytes + box * Tile::BoxBytes + rank * (Tile::BoxRows * 128);
            const int n = static_cast<int>(at.n0) + tile * TN + rank * Tile::BoxRows, k = first_k + piece * Tile::XK;
            if constexpr (Tile::Last) copy_box(destination, x_map, full, n + box * 32, at.l0, k, at.i);
            else if constexpr (Tile::Cluster == 1) copy_box(destination, x_map, full, k * DL + box * 32, block, n);
            else copy_box_to(3, destination, x_map, full, k * DL + box * 32, block, n);
          }
          ring.advance(s.x_slots);
        }
      }
    }
  }

  // The same by XWarps warps, where runs lie apart: an instruction of a warp takes two rows of a slot, a lane 16 bytes of the
  // run of one k.
  __device__ __forceinline__ void copy_x() const {
    constexpr int Pairs = TN / 2;
    const int k = lane / 2 % 8, half = lane % 2, chunk = k % 4 * 2 + half, first_row = 2 * warp + lane / 16;
    const uint32_t box = k / 4 * Tile::BoxBytes;
    const int64_t slot_features = int64_t{Tile::XK} * p.d;
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      const int64_t run = static_cast<int64_t>(p.c) * p.d, block = at.i * run;
      const int64_t first = static_cast<int64_t>(k) * p.d + at.l0 + half * 4;
      // How many features there are from this lane's first to the end of the block; what lies behind counts as zeros.
      const int64_t features = at.l0 + half * 4 < p.d ? min(run, p.in_features - block) - first : 0;
      const float* tile_source = static_cast<const float*>(p.x) + (at.n0 + first_row) * p.x_stride + block + first;
      int rows = static_cast<int>(p.n - at.n0) - first_row;
      for (int tile = 0; tile < at.tiles; ++tile, rows -= TN, tile_source += TN * p.x_stride) {
        const float* slot_source = tile_source;
        int64_t left = features;
#pragma unroll 1
        for (int piece = 0; piece < steps * Tile::XSlots; ++piece, slot_source += slot_features, left -= slot_features) {
          const uint32_t slot = shared + ring.slot * Tile::XBytes + box;
          const int valid_rows = left > 0 ? rows : 0;
          const float* source = slot_source;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
          for (int r = 0; r < Pairs; r += Tile::XWarps, source += 2 * Tile::XWarps * p.x_stride) {
            const int n = first_row + 2 * r;
            if (r + Tile::XWarps <= Pairs || warp < Pairs - r) {
              copy_async_16(slot + n * 128 + ((chunk ^ (n & 7)) * 16), source, 2 * r < valid_rows ? 16 : 0);
            }
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

  // The same batch-last: an instruction of a warp takes 32 neighbouring n of one k, a lane one of them.
  __device__ __forceinline__ void copy_x_last() const {
    const int64_t feature_step = static_cast<int64_t>(p.d) * p.x_stride;
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      const int64_t first = static_cast<int64_t>(at.i) * p.c * p.d + at.l0, left = p.in_features - first;
      // How many k there are; what lies behind counts as zeros.
      const int features = static_cast<int>(min(left > 0 ? (left - 1) / p.d + 1 : 0, static_cast<int64_t>(p.c)));
      for (int tile = 0; tile < at.tiles; ++tile) {
        const int64_t n = at.n0 + tile * TN + lane, valid = p.n - n;
        const float* source = static_cast<const float*>(p.x) + (first + warp * static_cast<int64_t>(p.d)) * p.x_stride + n;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const uint32_t slot = shared + ring.slot * Tile::XBytes + lane % 4 * 4;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll 1
          for (int k = warp; k < Tile::XK; k += Tile::XWarps, source += Tile::XWarps * feature_step) {
            const uint32_t row = slot + k * 128 + ((lane / 4 ^ (k & 7)) * 16);
            const bool there = step * Tile::XK + k < features;
#pragma unroll
            for (int box = 0; box < Tile::Boxes; ++box) {
              const bool inside = there && box * 32 < valid;
              copy_async_4(row + box * Tile::BoxBytes, inside ? source + box * 32 : p.x, inside);
            }
          }
          copy_async_arrive(x_full + 8 * ring.slot);
          // Where this warp's rows of the next step begin.
          source += (Tile::XK - (Tile::XK - warp + Tile::XWarps - 1) / Tile::XWarps * Tile::XWarps) * feature_step;
          ring.advance(s.x_slots);
        }
      }
    }
    // No thread leaves before what it copied has arrived.
    copy_async_commit();
    copy_async_wait<0>();
  }

  // Calls `fill(place, first l, first k, ring)` for every slot of w in turn.
  template <typename Fill>
  __device__ __forceinline__ void for_w(const Fill& fill) const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      const int times = s.resident ? min(at.tiles, 1) : at.tiles;
      for (int tile = 0; tile < times; ++tile) {
#pragma unroll 1
        for (int k0 = 0; k0 < p.c; k0 += Tile::WK) {
#pragma unroll 1
          for (int l = 0; l < DL; l += Tile::WL) {
            fill(at, at.l0 + l, k0, ring);
            ring.advance(s.w_slots);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void fetch_w() const {
    for_w([&](const Place& at, int l, int k0, const Ring& ring) {
      const uint32_t full = (Split ? w_raw : w_full) + 8 * ring.slot;
      barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
      barrier_expect(full, Tile::WPart);
      copy_box(w_base + ring.slot * Tile::WBytes, w_map, full, k0, at.j0, at.i * p.d + l);
    });
  }

  // Of a slot of w, each thread splits, or copies, 16-byte pieces of rows that lie RoundRows apart, so that a warp touches whole rows.
  static constexpr int WChunks = Tile::WRow / 16, RoundRows = Tile::WThreads / WChunks, WRounds = Tile::WL * Tile::TJ / RoundRows;
  static_assert(RoundRows % 8 == 0 && Tile::TJ % RoundRows == 0);

  // This thread's pieces of a slot are there: splits them where they lie, and says so.
  __device__ __forceinline__ void hand_over_w(uint32_t pieces, int slot) const {
    if constexpr (Split) {
#pragma unroll(WRounds <= 4 ? WRounds : 4)
      for (int round = 0; round < WRounds; ++round) {
        const uint32_t piece = pieces + slot * Tile::WBytes + round * (RoundRows * Tile::WRow);
        uint32_t v[4], lower[4];
        load_shared_16(v, piece);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const uint32_t exact = v[e];
          v[e] = upper_part(exact);
          lower[e] = lower_part(exact, v[e]);
        }
        store_shared_16(piece + Tile::WPart, lower);
        store_shared_16(piece, v);
      }
    }
    fence_shared_for_wgmma();
    barrier_arrive(w_full + 8 * slot);
  }

  // Splits what fetch_w brought.
  __device__ __forceinline__ void split_w(int thread) const {
    const uint32_t pieces = w_base + swizzled<WChunks>(thread / WChunks, thread % WChunks);
    for_w([&](const Place&, int, int, const Ring& ring) {
      barrier_wait(w_raw + 8 * ring.slot, ring.parity);
      hand_over_w(pieces, ring.slot);
    });
  }

  // In the place of fetch_w and split_w where rows of w are not whole 16-byte pieces: asynchronous copies of single numbers, of
  // one slot while those of the slot before are under way.
  __device__ __forceinline__ void copy_w(int thread) const {
    const int row = thread / WChunks, chunk = thread % WChunks;
    const uint32_t pieces = w_base + swizzled<WChunks>(row, chunk);
    int pending = -1;  // a slot whose copies are under way
    for_w([&](const Place& at, int l, int k0, const Ring& ring) {
      if (!barrier_passed(w_empty + 8 * ring.slot, ring.parity ^ 1)) {
        // Who is to free this slot may be waiting for the one before.
        if (pending >= 0) {
          copy_async_wait<0>();
          hand_over_w(pieces, pending);
          pending = -1;
        }
        barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
      }
      const int k = k0 + chunk * 4;
#pragma unroll 1
      for (int round = 0; round < WRounds; ++round) {
        const int index = row + round * RoundRows, j = at.j0 + index % Tile::TJ, of_l = l + index / Tile::TJ;
        const float* source = static_cast<const float*>(p.w) + ((static_cast<int64_t>(at.i) * p.d + of_l) * p.b + j) * p.c + k;
        const int valid = j < p.b && of_l < p.d ? p.c - k : 0;
        const uint32_t piece = pieces + ring.slot * Tile::WBytes + round * (RoundRows * Tile::WRow);
#pragma unroll
        for (int e = 0; e < 4; ++e) copy_async_4(piece + e * 4, e < valid ? source + e : p.w, e < valid);
      }
      copy_async_commit();
      if (pending >= 0) {
        copy_async_wait<1>();
        hand_over_w(pieces, pending);
      }
      pending = ring.slot;
    });
    if (pending >= 0) {
      copy_async_wait<0>();
      hand_over_w(pieces, pending);
    }
  }
};

}  // namespace structlayers
