// x and w of batch_last_registers.cuh where rows begin anywhere in a 16-byte piece: an odd batch, an odd c, views.
//
// The warps that fetch copy whole pieces, from the one in which a row begins, to shared memory as they lie, and keep RawSteps
// steps under way; a pass through registers then moves every row to where the products expect it. Each warp has rows of its own
// of x and w, so that it waits for nobody.
#pragma once

#include "batch_last_tile.cuh"

namespace structlayers {

template <typename Tile>
struct LastRows : LastFrame<Tile> {
  using Frame = LastFrame<Tile>;
  using typename Frame::Place;
  using Frame::Frame, Frame::place, Frame::p, Frame::s, Frame::steps, Frame::shared, Frame::w_base, Frame::raw_base;
  using Frame::x_full, Frame::x_empty, Frame::w_full, Frame::w_empty, Frame::warp, Frame::lane;
  static constexpr int Warps = Tile::Fetchers / 32, XRows = Tile::XK / Warps, WRows = Tile::TJ / Warps;
  static constexpr int XChunks = Tile::Width / 8, WChunks = Tile::WRow / 16;
  static_assert(XChunks == 32, "a lane has one piece of every row");

  // Walks over the steps of all tiles of this CTA.
  struct Cursor {
    unsigned unit;
    Place at;
    int tile, step;
    bool fetches_w;  // otherwise w of the unit is there already
  };

  __device__ __forceinline__ Cursor begin() const {
    Cursor cursor{blockIdx.x};
    enter(cursor);
    return cursor;
  }

  __device__ __forceinline__ bool there(const Cursor& cursor) const { return cursor.unit < s.units; }

  // To the first tile of the unit, or of the next that has one.
  __device__ __forceinline__ void enter(Cursor& cursor) const {
    cursor.tile = cursor.step = 0;
    cursor.fetches_w = true;
    for (; cursor.unit < s.units; cursor.unit += gridDim.x) {
      cursor.at = place(cursor.unit);
      if (cursor.at.tiles > 0) return;
    }
  }

  __device__ __forceinline__ void advance(Cursor& cursor) const {
    if (++cursor.step < steps) return;
    cursor.step = 0;
    cursor.at.n0 += Tile::TN;
    cursor.fetches_w = !s.resident;
    if (++cursor.tile < cursor.at.tiles) return;
    cursor.unit += gridDim.x;
    enter(cursor);
  }

  // Where this warp's first row of x, or of w, of a step begins in memory.
  __device__ __forceinline__ uintptr_t x_row(const Cursor& cursor) const {
    const int64_t feature = (static_cast<int64_t>(cursor.at.i) * p.c + cursor.step * Tile::XK + warp * XRows) * p.d + cursor.at.l0;
    return reinterpret_cast<uintptr_t>(p.x) + (feature * p.x_stride + cursor.at.n0) * 2;
  }

  __device__ __forceinline__ uintptr_t w_row(const Cursor& cursor) const {
    const int64_t row = (static_cast<int64_t>(cursor.at.i) * p.d + cursor.at.l0) * p.b + cursor.at.j0 + warp * WRows;
    return reinterpret_cast<uintptr_t>(p.w) + (row * p.c + cursor.step * Tile::WK) * 2;
  }

  __device__ __forceinline__ uint32_t raw_x(int stage) const { return raw_base + stage * Tile::RawStepBytes + warp * XRows * Tile::RawXRow; }

  __device__ __forceinline__ uint32_t raw_w(int stage) const {
    return raw_base + stage * Tile::RawStepBytes + Tile::XK * Tile::RawXRow + warp * WRows * Tile::RawWRow;
  }

  // Piece `piece` of a row of `bytes` bytes, zeros where the row does not exist.
  __device__ __forceinline__ void copy_piece(uint32_t destination, uintptr_t row, int piece, int bytes) const {
    const int before = static_cast<int>(row & 15), valid = bytes > 0 ? max(0, min(before + bytes - piece * 16, 16)) : 0;
    copy_async_16(destination, valid > 0 ? reinterpret_cast<const void*>(row - before + piece * 16) : p.w, valid);
  }

  __device__ __forceinline__ void copy_x(const Cursor& cursor, int stage) const {
    const int k = cursor.step * Tile::XK + warp * XRows;
    const int64_t feature = (static_cast<int64_t>(cursor.at.i) * p.c + k) * p.d + cursor.at.l0, left = p.in_features - feature;
    const int64_t stride = p.d * p.x_stride * 2;
    const uintptr_t x = x_row(cursor);
    const uint32_t to = raw_x(stage) + lane * 16, last = raw_x(stage) + lane * Tile::RawXRow + XChunks * 16;
    if (p.c - k >= XRows && left > (XRows - 1) * static_cast<int64_t>(p.d) && p.n - cursor.at.n0 >= Tile::Width) {
      // Whole rows: what else a piece holds is not used. Of the last there is nothing where rows are aligned.
      uintptr_t row = x;
#pragma unroll
      for (int r = 0; r < XRows; ++r, row += stride) {
        copy_async_16(to + r * Tile::RawXRow, reinterpret_cast<const void*>((row & ~uintptr_t{15}) + lane * 16));
      }
      row = x + lane * stride;
      if (lane < XRows && row % 16 != 0) copy_async_16(last, reinterpret_cast<const void*>((row & ~uintptr_t{15}) + XChunks * 16));
      return;
    }
    // Features l, d + l, 2d + l ... below the logical input size.
    const int there = static_cast<int>(min(left > 0 ? (left - 1) / p.d + 1 : 0, int64_t{XRows})), rows = min(p.c - k, there);
    const int bytes = static_cast<int>(min(p.n - cursor.at.n0, int64_t{Tile::Width})) * 2;
#pragma unroll 1
    for (int r = 0; r < XRows; ++r) copy_piece(to + r * Tile::RawXRow, x + r * stride, lane, r < rows ? bytes : 0);
    if (lane < XRows) copy_piece(last, x + lane * stride, XChunks, lane < rows ? bytes : 0);
  }

  __device__ __forceinline__ void copy_w(const Cursor& cursor, int stage) const {
    const int rows = p.b - cursor.at.j0 - warp * WRows, bytes = min((p.c - cursor.step * Tile::WK) * 2, Tile::WRow);
    const uintptr_t w = w_row(cursor);
#pragma unroll
    for (int own = lane; own < WRows * (WChunks + 1); own += 32) {
      const int row = own / (WChunks + 1), piece = own % (WChunks + 1);
      copy_piece(raw_w(stage) + row * Tile::RawWRow + piece * 16, w + static_cast<int64_t>(row) * p.c * 2, piece, row < rows ? bytes : 0);
    }
  }

  __device__ __forceinline__ void copy(const Cursor& cursor, int stage) const {
    copy_x(cursor, stage);
    if (cursor.fetches_w) copy_w(cursor, stage);
  }

  // Count pieces of Together at a time, since a warp has no other to wait beside: piece(q, source, destination) says from where to
  // where piece q goes, and returns by how many bytes it is shifted.
  template <int Count, int Together, typename Piece>
  static __device__ __forceinline__ void move(const Piece& piece) {
    static_assert(Count % Together == 0);
#pragma unroll
    for (int first = 0; first < Count; first += Together) {
      uint32_t low[Together][4], high[Together][4], destination[Together];
      int shift[Together];
#pragma unroll
      for (int q = 0; q < Together; ++q) {
        uint32_t source;
        shift[q] = piece(first + q, source, destination[q]);
        load_shared_16(low[q], source);
        load_shared_16(high[q], source + 16);
      }
#pragma unroll
      for (int q = 0; q < Together; ++q) {
        uint32_t v[4];
        shift_16<2>(v, low[q], high[q], shift[q]);
        store_shared_16(destination[q], v);
      }
    }
  }

  // Of addresses, only the bits below 16 matter to these two.
  __device__ __forceinline__ void move_x(const Cursor& cursor, int stage, uint32_t slot) const {
    const uint32_t low = static_cast<uint32_t>(x_row(cursor)), stride = static_cast<uint32_t>(p.d) * static_cast<uint32_t>(p.x_stride) * 2;
    const uint32_t from = raw_x(stage) + lane * 16, to = slot + lane / 8 * Tile::BoxBytes;
    move<XRows, 4>([&](int r, uint32_t& source, uint32_t& destination) {
      source = from + r * Tile::RawXRow;
      destination = to + swizzled<8>(warp * XRows + r, lane % 8);
      return static_cast<int>((low + r * stride) & 15);
    });
  }

  __device__ __forceinline__ void move_w(const Cursor& cursor, int stage, uint32_t slot) const {
    const uint32_t low = static_cast<uint32_t>(w_row(cursor)), from = raw_w(stage);
    move<WRows * WChunks / 32, 2>([&](int q, uint32_t& source, uint32_t& destination) {
      const int own = q * 32 + lane, row = own / WChunks, chunk = own % WChunks;
      source = from + row * Tile::RawWRow + chunk * 16;
      destination = slot + swizzled<WChunks>(warp * WRows + row, chunk);
      return static_cast<int>((low + row * p.c * 2) & 15);
    });
  }

  __device__ __forceinline__ void fetch() const {
    Ring x, w;
    Cursor ahead = begin(), now = ahead;
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < Tile::RawSteps; ++step) {
      if (there(ahead)) {
        copy(ahead, step);
        advance(ahead);
      }
      copy_async_commit();
    }
#pragma unroll 1
    while (there(now)) {
      copy_async_wait<Tile::RawSteps - 1>();
      __syncwarp();
      if (now.fetches_w) {
        barrier_wait(w_empty + 8 * w.slot, w.parity ^ 1);
        move_w(now, stage, w_base + w.slot * Tile::WBytes);
        barrier_arrive(w_full + 8 * w.slot);
        w.advance(s.w_slots);
      }
      barrier_wait(x_empty + 8 * x.slot, x.parity ^ 1);
      move_x(now, stage, shared + x.slot * Tile::XBytes);
      fence_shared_for_wgmma();
      barrier_arrive(x_full + 8 * x.slot);
      x.advance(s.x_slots);
      __syncwarp();  // the stage has been read
      if (there(ahead)) {
        copy(ahead, stage);
        advance(ahead);
      }
      copy_async_commit();
      stage = stage == Tile::RawSteps - 1 ? 0 : stage + 1;
      advance(now);
    }
  }
};

}  // namespace structlayers
