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

  // Splits w where it lies, or where the copy engine does not take it, fetches it: each thread 16-byte pieces of all rows that
  // lie RoundRows apart, so that a warp touches whole rows.
  template <bool Fetches>
  __device__ __forceinline__ void prepare_w(int thread) const {
    constexpr int Chunks = Tile::WRow / 16, RoundRows = Tile::WThreads / Chunks, Rounds = Tile::WL * Tile::TJ / RoundRows;
    static_assert(RoundRows % 8 == 0 && Tile::TJ % RoundRows == 0);
    const int row = thread / Chunks, chunk = thread % Chunks;
    const uint32_t first = w_base + swizzled<Chunks>(row, chunk);
    for_w([&](const Place& at, int l, int k0, const Ring& ring) {
      const uint32_t slot = first + ring.slot * Tile::WBytes;
      if constexpr (Fetches) barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
      else barrier_wait(w_raw + 8 * ring.slot, ring.parity);
      const int k = k0 + chunk * 4;
#pragma unroll(Fetches ? 1 : Rounds <= 4 ? Rounds : 4)
      for (int round = 0; round < Rounds; ++round) {
        const uint32_t place = slot + round * (RoundRows * Tile::WRow);
        uint32_t v[4] = {0, 0, 0, 0}, lower[4];
        if constexpr (Fetches) {
          const int index = row + round * RoundRows, j = at.j0 + index % Tile::TJ, of_l = l + index / Tile::TJ;
          const float* source = static_cast<const float*>(p.w) + ((static_cast<int64_t>(at.i) * p.d + of_l) * p.b + j) * p.c + k;
          const int valid = j < p.b && of_l < p.d ? p.c - k : 0;
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (e < valid) v[e] = __float_as_uint(__ldg(source + e));
        } else {
          load_shared_16(v, place);
        }
        if constexpr (Split) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t exact = v[e];
            v[e] = upper_part(exact);
            lower[e] = lower_part(exact, v[e]);
          }
          store_shared_16(place + Tile::WPart, lower);
        }
        store_shared_16(place, v);
      }
      fence_shared_for_wgmma();
      barrier_arrive(w_full + 8 * ring.slot);
    });
  }
};

}  // namespace structlayers
