// From the accumulators of batch_first_unaligned.cuh to y: bias, activation, whole pieces and the ends of rows.
#pragma once

#include "unaligned_tile.cuh"

namespace structlayers {

// Base: UnalignedFrame, or what adds to it.
template <typename Base>
struct UnalignedOutput : Base {
  using Base::Base, Base::p, Base::y_base, Base::lane, Base::group, Base::warp, Base::my_j, Base::my_row, Base::row, Base::DL, Base::WJ, Base::Size,
      Base::E;
  using typename Base::Tile, typename Base::T, typename Base::Place, typename Base::Accumulators;

  __device__ __forceinline__ uint32_t y_area() const { return y_base + (group * 4 + warp) * (16 * Tile::YPitch); }

  // A part of the accumulators to shared memory, [n][j][l]; `shift` is that of this thread's rows.
  __device__ __forceinline__ void stage_y(const Accumulators& acc, int64_t feature, int valid, int part, int shift) const {
    const int t = lane % 4;
    const uint32_t place = y_area() + row * Tile::YPitch + (shift & 12) + t * 2 * DL * Size;
#pragma unroll
    for (int q = 0; q < Tile::YColumns / 8; ++q) {
      const int g = part * (Tile::YColumns / 8) + q;
      float bias[2 * DL] = {};
      if (p.bias != nullptr) {
        const int first = (q * 8 + 2 * t) * DL;
#pragma unroll
        for (int e = 0; e < 2 * DL; ++e)
          if (first + e < valid) bias[e] = to_float(static_cast<const T*>(p.bias)[feature + first + e]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int m = 0; m < 2 * DL * Size / 4; ++m) {
          const auto value = [&](int e) { return acc[e % DL][g][2 * h + e / DL] + bias[e]; };
          uint32_t v;
          if constexpr (Tile::Float) v = __float_as_uint(value(m));
          else v = pack_two<T>(value(2 * m), value(2 * m + 1));
          store_shared_4(place + h * 8 * Tile::YPitch + q * 8 * DL * Size + m * 4, v);
        }
      }
    }
  }

  // Piece `chunk` of 16 bytes of global memory of a row.
  __device__ __forceinline__ void load_piece(uint32_t (&v)[4], uint32_t area, int chunk, int shift) const {
    if constexpr (Tile::Float) {
      load_shared_16(v, area + chunk * 16);
      if (p.activation != kNone) {
#pragma unroll
        for (int m = 0; m < 4; ++m) v[m] = __float_as_uint(activate(__uint_as_float(v[m]), p.activation));
      }
    } else {
      uint32_t w[4];
      const uint32_t before = load_shared_4(area + chunk * 16 - 4), selector = shift & 2 ? 0x5432 : 0x7654;
      load_shared_16(w, area + chunk * 16);
      v[0] = __byte_perm(before, w[0], selector);
#pragma unroll
      for (int m = 1; m < 4; ++m) v[m] = __byte_perm(w[m - 1], w[m], selector);
      if (p.activation != kNone) activate_piece<T>(v, p.activation);
    }
  }

  // Elements first to last - 1 of a piece; pairs of words and words leave whole where they can.
  static __device__ __forceinline__ void store_elements(uint8_t* to, const uint32_t (&v)[4], int first, int last) {
    constexpr int Word = 4 / Size;  // elements
    const auto inside = [&](int word, int count) { return first <= word * Word && (word + count) * Word <= last; };
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      if (inside(w, 2)) {
        *reinterpret_cast<uint2*>(to + w * 4) = make_uint2(v[w], v[w + 1]);
        continue;
      }
#pragma unroll
      for (int u = w; u < w + 2; ++u) {
        if (inside(u, 1)) {
          *reinterpret_cast<uint32_t*>(to + u * 4) = v[u];
        } else if constexpr (!Tile::Float) {
          if (first <= 2 * u && 2 * u < last) *reinterpret_cast<uint16_t*>(to + u * 4) = static_cast<uint16_t>(v[u]);
          else if (first <= 2 * u + 1 && 2 * u + 1 < last) *reinterpret_cast<uint16_t*>(to + u * 4 + 2) = static_cast<uint16_t>(v[u] >> 16);
        }
      }
    }
  }

  __device__ __forceinline__ void write_y(int64_t n, int64_t feature, int valid) const {
    constexpr int Chunks = Tile::YRun / 16;
    const int rows = static_cast<int>(min(p.n - n, int64_t{16})), bytes = valid * Size;
    const int64_t row_bytes = p.y_stride * Size;
    const uintptr_t base = reinterpret_cast<uintptr_t>(p.y) + (n * p.y_stride + feature) * Size;
#pragma unroll 2
    for (int piece = lane; piece < 16 * Chunks; piece += 32) {
      const int r = piece / Chunks;
      const uintptr_t run = base + r * row_bytes;
      const int shift = static_cast<int>(run & 15), chunk = piece % Chunks + (shift > 0);
      if (r < rows && chunk * 16 + 16 <= shift + bytes) {
        uint32_t v[4];
        load_piece(v, y_area() + r * Tile::YPitch, chunk, shift);
        store_global_16(reinterpret_cast<void*>(run - shift + chunk * 16), v);
      }
    }
    // The ends of a row that are no whole pieces: a lane takes one.
    const int r = lane / 2, last = lane % 2;
    const uintptr_t run = base + r * row_bytes;
    const int shift = static_cast<int>(run & 15), stop = shift + bytes, chunk = last ? stop / 16 : 0;
    const int from = chunk == 0 ? shift / Size : 0, to = min(stop - chunk * 16, 16) / Size;
    // A row that ends in its first piece has one end.
    if (r < rows && to > from && (last ? chunk > 0 || shift == 0 : shift > 0)) {
      uint32_t v[4];
      load_piece(v, y_area() + r * Tile::YPitch, chunk, shift);
      store_elements(reinterpret_cast<uint8_t*>(run - shift + chunk * 16), v, from, to);
    }
  }

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
    const int64_t n = at.n0 + my_row;
    if (n >= p.n) return;
#pragma unroll
    for (int part = 0; part < Tile::YParts; ++part) {
      const int j = at.j0 + my_j + part * Tile::YColumns;
      const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * DL;
      const int64_t left = min(static_cast<int64_t>(p.b - j) * DL, p.out_features - feature);
      const int valid = static_cast<int>(min(left, int64_t{Tile::YRun / Size}));
      if (valid <= 0) return;
      const uintptr_t run = reinterpret_cast<uintptr_t>(p.y) + ((n + row) * p.y_stride + feature) * Size;
      __syncwarp();  // what was here before has left
      stage_y(acc, feature, valid, part, static_cast<int>(run & 15));
      __syncwarp();
      write_y(n, feature, valid);
    }
  }
};

}  // namespace structlayers
