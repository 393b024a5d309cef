// x and w of batch_first_unaligned.cuh from global to shared memory.
#pragma once

#include "split.cuh"
#include "unaligned_tile.cuh"
#include "wgmma.cuh"

namespace structlayers {

// Base: UnalignedFrame, or what adds to it.
template <typename Base>
struct UnalignedFetch : Base {
  using Base::Base, Base::place, Base::p, Base::s, Base::tn, Base::tj, Base::w_part, Base::w_block, Base::steps, Base::w_base, Base::x_base, Base::x_slot,
      Base::x_full, Base::x_empty, Base::block_features, Base::first_of_two, Base::DL, Base::XK, Base::Size, Base::E;
  using typename Base::Tile, typename Base::Place;

  // A thread takes one piece of every eighth row, which all have the same shift.
  __device__ __forceinline__ void copy_x(int thread) const {
    constexpr int Chunks = Tile::XPitch / 16;
    const int64_t row_bytes = p.x_stride * Size, eight_rows = 8 * row_bytes;
    const uintptr_t end = reinterpret_cast<uintptr_t>(p.x) + ((p.n - 1) * p.x_stride + p.in_features) * Size;
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      uintptr_t tile_source = reinterpret_cast<uintptr_t>(p.x) + (at.n0 * p.x_stride + static_cast<int64_t>(at.i) * p.c * DL) * Size;
      const int features = block_features(at.i);
      int64_t rows = p.n - at.n0;
      for (int tile = 0; tile < at.tiles; ++tile, rows -= tn, tile_source += tn * row_bytes) {
        const int tile_rows = static_cast<int>(min(rows, static_cast<int64_t>(tn)));
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const uintptr_t source = tile_source + step * Tile::XRun;
          const int bytes = min(features - step * XK * DL, XK * DL) * Size;
          const uint32_t slot = x_base + ring.slot * x_slot;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll 1
          for (int piece = thread; piece < 8 * Chunks; piece += Tile::Copiers) {
            const int row = piece / Chunks, chunk = piece % Chunks;
            const uintptr_t run = source + row * row_bytes;
            uintptr_t from = (run & ~uintptr_t{15}) + chunk * 16;
            // Pieces with something of this row's in them.
            if (bytes <= 0 || from >= run + bytes) continue;
            const int count = (tile_rows - row + 7) / 8;
            uint32_t to = slot + piece * 16;
            if (from + (count - 1) * eight_rows + 16 <= end) {
#pragma unroll 8
              for (int r = 0; r < count; ++r, to += 8 * Tile::XPitch, from += eight_rows) {
                copy_async_16(to, reinterpret_cast<const void*>(from), 16);
              }
            } else {
              // The last piece of all may reach beyond the end of x.
#pragma unroll 1
              for (int r = 0; r < count; ++r, to += 8 * Tile::XPitch, from += eight_rows) {
                copy_async_16(to, reinterpret_cast<const void*>(from), static_cast<int>(min(end - from, uintptr_t{16})));
              }
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

  // The 16-byte piece of w at `address`, of which the rest matters not where it lies outside of w.
  __device__ __forceinline__ void load_w_piece(uint32_t* v, uintptr_t address, uintptr_t begin, uintptr_t end) const {
    if (address >= begin && address + 16 <= end) {
      uint32_t piece[4];
      load_global_16(piece, reinterpret_cast<const void*>(address));
#pragma unroll
      for (int m = 0; m < 4; ++m) v[m] = piece[m];
    } else {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const uintptr_t element = address + Size * e;
        const uint32_t bits = element >= begin && element < end ? load_bits<Size>(reinterpret_cast<const void*>(element), 0) : 0;
        if constexpr (Tile::Float) v[e] = bits;
        else v[e / 2] = e % 2 == 0 ? bits : v[e / 2] | bits << 16;
      }
    }
  }

  // `count` values of k from first_k on of every row of this tile's w; a thread moves 16 bytes of a row at a time.
  __device__ __forceinline__ void load_w(const Place& at, int first_k, int count) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p.w), end = begin + static_cast<int64_t>(p.a) * DL * p.b * p.c * Size;
    const unsigned chunks = count / E, rows = min(p.b - at.j0, tj), pieces = DL * rows * chunks;
    constexpr int Together = 4;
    for (unsigned first = threadIdx.x; first < pieces; first += Together * Tile::Consumers) {
      uint32_t raw[Together][8], place[Together];
      int shift[Together], valid[Together];
#pragma unroll
      for (int q = 0; q < Together; ++q) {
        const unsigned piece = first + q * Tile::Consumers, row = piece / chunks, chunk = piece % chunks;
        const unsigned l = row / rows, j = row % rows, k = chunk * E;
        valid[q] = piece < pieces ? max(p.c - first_k - static_cast<int>(k), 0) : -1;
        const uintptr_t source =
            begin + (((static_cast<int64_t>(at.i) * DL + l) * p.b + at.j0 + j) * p.c + first_k + static_cast<int64_t>(k)) * Size;
        shift[q] = static_cast<int>(source & 15);
        place[q] = w_base + k / Tile::WK * w_block + l * tj * Tile::WRow + swizzled<8>(j, chunk % 8);
#pragma unroll
        for (int m = 0; m < 8; ++m) raw[q][m] = 0;
        if (valid[q] > 0) {
          load_w_piece(raw[q], source - shift[q], begin, end);
          if (shift[q] + min(valid[q], E) * Size > 16) load_w_piece(raw[q] + 4, source - shift[q] + 16, begin, end);
        }
      }
#pragma unroll
      for (int q = 0; q < Together; ++q) {
        uint32_t v[4];
#pragma unroll
        for (int m = 0; m < 6; ++m) raw[q][m] = shift[q] & 8 ? raw[q][m + 2] : raw[q][m];
#pragma unroll
        for (int m = 0; m < 5; ++m) raw[q][m] = shift[q] & 4 ? raw[q][m + 1] : raw[q][m];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if constexpr (Tile::Float) {
            v[m] = m < valid[q] ? raw[q][m] : 0;
          } else {
            v[m] = __byte_perm(raw[q][m], raw[q][m + 1], shift[q] & 2 ? 0x5432 : 0x3210);
            v[m] = first_of_two(v[m], valid[q] - 2 * m);
          }
        }
        if (valid[q] < 0) continue;
        if constexpr (Tile::Float) {
          uint32_t upper[4], lower[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            upper[m] = Tile::Split ? upper_part(v[m]) : rounded_by_cutting(v[m]);
            lower[m] = lower_part(v[m], upper[m]);
          }
          store_shared_16(place[q], upper);
          if constexpr (Tile::Split) store_shared_16(place[q] + w_part, lower);
        } else {
          store_shared_16(place[q], v);
        }
      }
    }
    fence_shared_for_wgmma();
  }
};

}  // namespace structlayers
