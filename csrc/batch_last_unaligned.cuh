// batch_last.cuh for operands that are not made of whole 16-byte pieces: an odd batch, an odd c, views.
//
// Every row of w and x begins somewhere in a 16-byte piece of memory. The copies fetch whole pieces, from the one in which a row
// begins, and keep up to three steps under way as they lie; a pass through registers then moves every row of a step to where
// the products expect it. y leaves likewise: pieces of memory are put together from two pieces of shared memory.
//
// Shared memory: a step as the products expect it, Stages steps as they lie in memory, half of the rows of a tile of y.
// Preconditions (host): addresses are multiples of the element's size.
#pragma once

#include "batch_last.cuh"

namespace structlayers {

// Base: BatchLastTile.
template <typename Base>
struct BatchLastUnalignedTile : Base {
  // A row as it lies: one piece more. Raw w comes first in a stage, as w does in what is ready.
  static constexpr int RawW = Base::KB + 16, RawX = Base::XRow + 16, RawWBytes = Base::TJ * RawW;
  static constexpr int ReadyBytes = Base::WBytes + Base::K * Base::XRow, StageBytes = RawWBytes + Base::K * RawX;
  static constexpr int YParts = 2, SharedBytes = ReadyBytes + Base::Stages * StageBytes + Base::TJ / YParts * Base::YRow;
};

template <typename Tile>
struct BatchLastUnaligned : BatchLastFrame<Tile> {
  using Frame = BatchLastFrame<Tile>;
  using Frame::Frame, Frame::E, Frame::Size, Frame::p, Frame::shared, Frame::x_offset, Frame::stage_y, Frame::row_of_part;
  using typename Frame::T, typename Frame::Place, typename Frame::Accumulators, typename Frame::Operands;
  static constexpr int XChunks = Tile::TN / E;

  // The operands of a step: of the first row of each, and how many rows and bytes of a row exist.
  struct Reader {
    uintptr_t w, x;
    int w_rows, w_bytes, x_rows, x_bytes;
  };

  __device__ __forceinline__ int64_t w_row(const Place& at) const { return (static_cast<int64_t>(at.i) * p.d + at.l) * p.b + at.j0; }

  __device__ __forceinline__ int64_t x_feature(const Place& at) const { return static_cast<int64_t>(at.i) * p.c * p.d + at.l; }

  __device__ __forceinline__ Reader reader(const Place& at) const {
    Reader r;
    r.w = reinterpret_cast<uintptr_t>(p.w) + w_row(at) * p.c * Size;
    r.x = reinterpret_cast<uintptr_t>(p.x) + (x_feature(at) * p.x_stride + at.n0) * Size;
    r.w_rows = p.b - at.j0;
    r.w_bytes = p.c * Size;
    r.x_bytes = static_cast<int>(min(p.n - at.n0, int64_t{Tile::TN})) * Size;
    // Features l, d + l, 2d + l ... below the logical input size.
    const int64_t left = p.in_features - x_feature(at);
    r.x_rows = static_cast<int>(max(int64_t{0}, min(left > 0 ? (left - 1) / p.d + 1 : 0, int64_t{p.c})));
    return r;
  }

  // Piece `piece` of a row of `bytes` bytes, none where the row does not exist.
  __device__ __forceinline__ void copy_piece(uint32_t destination, uintptr_t row, int piece, int bytes) const {
    const int before = static_cast<int>(row & 15), there = bytes > 0 ? max(0, min(before + bytes - piece * 16, 16)) : 0;
    copy_async_16(destination, there > 0 ? reinterpret_cast<const void*>(row - before + piece * 16) : p.w, there);
  }

  __device__ __forceinline__ void load(Reader& r, int stage) const {
    const uint32_t ws = shared + Tile::ReadyBytes + stage * Tile::StageBytes, xs = ws + Tile::RawWBytes;
    constexpr int WPieces = Tile::Chunks + 1, XPieces = XChunks + 1;
    const int64_t w_stride = static_cast<int64_t>(p.c) * Size, x_stride = p.d * p.x_stride * Size;
#pragma unroll
    for (int unit = 0; unit < Tile::TJ * WPieces; unit += Tile::Threads) {
      const int own = unit + threadIdx.x, row = own / WPieces, piece = own % WPieces;
      if (unit + Tile::Threads > Tile::TJ * WPieces && row >= Tile::TJ) break;
      copy_piece(ws + row * Tile::RawW + piece * 16, r.w + row * w_stride, piece, row < r.w_rows ? min(r.w_bytes, Tile::KB) : 0);
    }
#pragma unroll
    for (int unit = 0; unit < Tile::K * XPieces; unit += Tile::Threads) {
      const int own = unit + threadIdx.x, row = own / XPieces, piece = own % XPieces;
      if (unit + Tile::Threads > Tile::K * XPieces && row >= Tile::K) break;
      copy_piece(xs + row * Tile::RawX + piece * 16, r.x + row * x_stride, piece, row < r.x_rows ? r.x_bytes : 0);
    }
    r.w += Tile::KB;
    r.w_bytes -= Tile::KB;
    r.x += Tile::K * x_stride;
    r.x_rows -= Tile::K;
  }

  // Of addresses, only the bits below 16 matter here.
  __device__ __forceinline__ Operands ready(const Place& at, int step, int stage) const {
    const uint32_t ws = shared, xs = shared + Tile::WBytes;
    const uint32_t raw_w = shared + Tile::ReadyBytes + stage * Tile::StageBytes, raw_x = raw_w + Tile::RawWBytes;
    const uint32_t w_low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.w)) + static_cast<uint32_t>(w_row(at)) * p.c * Size;
    const uint32_t row_low = static_cast<uint32_t>(p.d) * static_cast<uint32_t>(p.x_stride) * Size;
    const uint32_t x_low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.x)) +
                           static_cast<uint32_t>(x_feature(at)) * static_cast<uint32_t>(p.x_stride) * Size + step * Tile::K * row_low;
    static_assert(Tile::TJ * Tile::Chunks % Tile::Threads == 0 && Tile::K * XChunks % Tile::Threads == 0);
#pragma unroll
    for (int unit = 0; unit < Tile::TJ * Tile::Chunks; unit += Tile::Threads) {
      const int own = unit + threadIdx.x, row = own / Tile::Chunks, chunk = own % Tile::Chunks;
      uint32_t v[4];
      load_shared_16_at<Size>(v, raw_w + row * Tile::RawW + chunk * 16, (w_low + row * p.c * Size) & 15);
      store_shared_16(ws + swizzled<Tile::Chunks>(row, chunk), v);
    }
#pragma unroll
    for (int unit = 0; unit < Tile::K * XChunks; unit += Tile::Threads) {
      const int own = unit + threadIdx.x, row = own / XChunks, chunk = own % XChunks;
      uint32_t v[4];
      load_shared_16_at<Size>(v, raw_x + row * Tile::RawX + chunk * 16, (x_low + row * row_low) & 15);
      store_shared_16(xs + x_offset(row, chunk), v);
    }
    __syncthreads();
    return {ws, xs};
  }

  __device__ __forceinline__ void finish(Accumulators& acc, const Place& at) const {
    const uint32_t ys = shared + Tile::ReadyBytes + Tile::Stages * Tile::StageBytes;
    const int valid = static_cast<int>(min(p.n - at.n0, int64_t{Tile::TN}));
#pragma unroll
    for (int part = 0; part < Tile::YParts; ++part) {
      if (part > 0) __syncthreads();  // the part before has left
      stage_y(acc, at, ys, part);
      __syncthreads();
      for (int unit = threadIdx.x; unit < Tile::TJ / Tile::YParts * (XChunks + 1); unit += Tile::Threads) {
        const int row = unit / (XChunks + 1), chunk = unit % (XChunks + 1), j = at.j0 + row_of_part(row, part);
        const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * p.d + at.l;
        if (j >= p.b || feature >= p.out_features) continue;
        T* y = static_cast<T*>(p.y) + feature * p.y_stride + at.n0;
        // The piece of memory that holds elements first.. of the row; it may begin in the row's piece before, or before the row.
        const int before = static_cast<int>(reinterpret_cast<uintptr_t>(y) & 15), first = chunk * E - before / Size;
        if (first >= valid) continue;
        uint32_t v[4];
        const uint32_t place = ys + row * Tile::YRow + chunk * 16;
        if (before == 0) load_shared_16(v, place);
        else load_shared_16_at<Size>(v, place - 16, 16 - before);
        if (first >= 0 && first + E <= valid) store_global_16(y + first, v);
        else store_elements<Size>(y + first, v, -first, valid - first);
      }
    }
  }

  __device__ void run(unsigned tiles) const { this->run_tiles(*this, tiles); }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1) batch_last_unaligned_kernel(const __grid_constant__ Product p, unsigned tiles) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchLastUnaligned<Tile>(p, shared_address(dynamic_shared)).run(tiles);
}

}  // namespace structlayers
