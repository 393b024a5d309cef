// Batch-first product with one Kronecker-sparse factor on Hopper where rows or blocks are not made of whole 16-byte pieces:
// any a, b, c, d up to 8, any strides (sm_90a).
//
// Contract: product.h. What the host promises: unaligned_shape in launch_unaligned.cuh.
//
// Index map: a tile is TN rows n and TJ values of j of one i, with all l. A unit is `unit_tiles` tiles that follow one another
// along n; the grid is persistent and takes units with j running fastest, then i and n. Two warpgroups multiply: they cut the
// values of j, or where there are few the rows. A third copies x.
//
//   x, a step of XK values of k of one row, in shared memory: the 16-byte pieces of global memory that hold it, as they lie
//     ..|s s][k0 l0 .. l k0+1 l0 ..][.. s s|        begins `shift` bytes, 0 to 14, behind the first piece
//   16 bits: a thread reads the 2 d values of k and k+1 as d + 1 words, moves them half a word where the row asks for it, and has
//   for every l the pair (k, k+1): a register of the first operand of wgmma. float32: a word is a register
//   w in shared memory, blocks of 128 bytes of k: [l][j][k], swizzled, zeros from c on; Split: upper parts, then lower parts
//   D[n][j] in registers for every l  ->  y [n][j][l], every row as far behind a multiple of 16 bytes (but for half a word) as
//   it is in global memory  ->  whole 16-byte pieces, and the two ends of a row by themselves
//
// All rows of x and of y whose numbers differ by 8 have one shift, as do all steps and tiles of a unit.
//
// Where w of a unit does not fit, a block of it is fetched when it is needed. float32 is multiplied, and summed, as
// float32_registers.cuh says.
//
// Shared memory: w_slots * WParts * DL * TJ * 128 + x_slots * TN * XPitch + YBytes + barriers.
// Source: the pattern is that of arXiv:2405.15013; the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "split.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

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

template <typename Tile>
class BatchFirstUnaligned {
  using T = typename Tile::T;
  static constexpr int DL = Tile::DL, WJ = Tile::WJ, XK = Tile::XK, Size = Tile::Size, E = Tile::E;

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

  // ---- x: global memory to shared memory

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

  // ---- w: global memory to shared memory

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
            upper[m] = upper_part(v[m]);
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

  // A word of which `valid` elements exist; the others become zeros.
  static __device__ __forceinline__ uint32_t first_of_two(uint32_t v, int valid) { return valid >= 2 ? v : valid == 1 ? v & 0xffff : 0; }

  __device__ __forceinline__ void sync_consumers() const { sync_threads(1, Tile::Consumers); }

  // ---- 16 bits: x from shared memory to registers, and the products

  using Accumulators = float[DL][WJ / 8][4];

  // For the rows (row, row + 8) and the halves of 16 k: the 2 DL values of k and k+1, and one more word. Pieced: the 16-byte pieces
  // that hold them, since their words lie in few banks.
  static constexpr int Words = Tile::Pieced ? DL + 4 : DL + 1;
  using Raw = uint32_t[2][2][Words];
  using Operands = uint32_t[DL][4];

  __device__ __forceinline__ void load_x(Raw& raw, uint32_t source) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t run = source + h * 8 * Tile::XPitch + half * 16 * DL;
        if constexpr (Tile::Pieced) {
#pragma unroll
          for (int m = 0; m < Words; m += 4) {
            uint32_t v[4];
            load_shared_16(v, run + m * 4);
#pragma unroll
            for (int q = 0; q < 4; ++q) raw[h][half][m + q] = v[q];
          }
        } else {
#pragma unroll
          for (int m = 0; m < Words; ++m) raw[h][half][m] = load_shared_4(run + m * 4);
        }
      }
    }
  }

  // `shift` is the row's; `left` values exist from this thread's first on.
  template <bool Masked>
  __device__ __forceinline__ void separate(Operands& a, const Raw& raw, int shift, int left) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t run[Words], flat[DL];
#pragma unroll
      for (int m = 0; m < Words; ++m) run[m] = raw[r % 2][r / 2][m];
      if constexpr (Tile::Pieced) {
#pragma unroll
        for (int m = 0; m < DL + 2; ++m) run[m] = shift & 8 ? run[m + 2] : run[m];
#pragma unroll
        for (int m = 0; m < DL + 1; ++m) run[m] = shift & 4 ? run[m + 1] : run[m];
      }
#pragma unroll
      for (int m = 0; m < DL; ++m) {
        flat[m] = __byte_perm(run[m], run[m + 1], shift & 2 ? 0x5432 : 0x3210);
        if constexpr (Masked) flat[m] = first_of_two(flat[m], left - r / 2 * 8 * DL - 2 * m);
      }
#pragma unroll
      for (int l = 0; l < DL; ++l) {
        const int next = DL + l;
        a[l][r] = DL == 1 ? flat[0] : __byte_perm(flat[l / 2], flat[next / 2], (l % 2 ? 0x32 : 0x10) | (next % 2 ? 0x7600 : 0x5400));
      }
    }
  }

  // Every thread that has read arrives, so that compute-sanitizer sees what orders the two.
  __device__ __forceinline__ void release_x(int slot) const { barrier_arrive(x_empty + 8 * slot); }

  // Starts the products of a slot of x, of which `left` values exist, and leaves the last of them under way.
  __device__ __forceinline__ void multiply_pairs(Accumulators& acc, uint32_t source, uint64_t w, int shift, int left, int slot,
                                                 bool fresh) const {
#pragma unroll
    for (int product = 0; product < XK / 16; ++product) {
      Raw raw;
      Operands a;
      load_x(raw, source + product * 32 * DL);
      // The products before are done with their registers.
      wgmma_wait();
      const int here = left - product * 16 * DL, mine = here - lane % 4 * 2 * DL;
      if (here >= 16 * DL) separate<false>(a, raw, shift, mine);
      else separate<true>(a, raw, shift, mine);
      // All operands are ready before the first product: none is written once products are under way.
#pragma unroll
      for (int l = 0; l < DL; ++l) asm volatile("" : "+r"(a[l][0]), "+r"(a[l][1]), "+r"(a[l][2]), "+r"(a[l][3])::"memory");
      if (product == XK / 16 - 1) release_x(slot);
      wgmma_fence();
#pragma unroll
      for (int l = 0; l < DL; ++l) {
        WgmmaRegisters<T, WJ>::multiply(acc[l], a[l], w + product * 2 + l * (w_part / DL / 16), fresh && product == 0);
      }
      wgmma_commit();
    }
  }

  // ---- float32

  using Partial = float[WJ / 8][4];
  using SplitOperands = uint32_t[2][4];  // of 8 k, and 8 more

  // 16 k of one l; `left` values exist from this thread's first on.
  __device__ __forceinline__ void load_split(SplitOperands& upper, SplitOperands& lower, uint32_t source, int left) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int k = q * 8 + r / 2 * 4;
        uint32_t exact = load_shared_4(source + r % 2 * 8 * Tile::XPitch + k * DL * 4);
        exact = k * DL < left ? exact : 0;
        upper[q][r] = upper_part(exact);
        if constexpr (Tile::Split) lower[q][r] = lower_part(exact, upper[q][r]);
      }
    }
    // Ready before the first product: none is written while products are under way.
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      asm volatile("" : "+r"(upper[q][0]), "+r"(upper[q][1]), "+r"(upper[q][2]), "+r"(upper[q][3])::"memory");
      if constexpr (Tile::Split) asm volatile("" : "+r"(lower[q][0]), "+r"(lower[q][1]), "+r"(lower[q][2]), "+r"(lower[q][3])::"memory");
    }
  }

  // The products of a slot of x; all are done at the end. While those of one batch (16 k, one l) are under way, the operands of
  // the next are made, and the sums of the one before are promoted.
  __device__ __forceinline__ void multiply_split(Accumulators& acc, uint32_t source, uint64_t w, int left, int slot) const {
    constexpr int Batches = XK / 16 * DL;
    const uint64_t low = w_part / 16;
    const int mine = left - lane % 4 * DL;
    SplitOperands upper[2], lower[2];
    Partial partial[2];
#pragma unroll
    for (int batch = 0; batch < Batches; ++batch) {
      const int part = batch / DL, l = batch % DL;
      load_split(upper[batch % 2], lower[batch % 2], source + part * 16 * DL * 4 + l * 4, mine - part * 16 * DL - l);
      if (batch == Batches - 1) release_x(slot);
      wgmma_fence();
      const uint64_t b = w + l * (w_part / DL / 16) + part * 4;
      Partial& out = partial[batch % 2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if constexpr (Tile::Split) {
          WgmmaRegisters<T, WJ>::multiply(out, lower[batch % 2][q], b + 2 * q, q == 0);
          WgmmaRegisters<T, WJ>::multiply(out, upper[batch % 2][q], b + low + 2 * q, false);
        }
        WgmmaRegisters<T, WJ>::multiply(out, upper[batch % 2][q], b + 2 * q, !Tile::Split && q == 0);
      }
      wgmma_commit();
      if (batch > 0) {
        wgmma_wait<1>();
        promote(acc[(batch - 1) % DL], partial[(batch - 1) % 2]);
      }
    }
    wgmma_wait();
    promote(acc[DL - 1], partial[(Batches - 1) % 2]);
  }

  // ---- y

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

  // ---- the warpgroups that multiply

  __device__ __forceinline__ void multiply() const {
    Ring ring;
    Accumulators acc;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      Place at = place(unit);
      const int features = block_features(at.i);
      const uintptr_t run =
          reinterpret_cast<uintptr_t>(p.x) + ((at.n0 + my_row + row) * p.x_stride + static_cast<int64_t>(at.i) * p.c * DL) * Size;
      const int shift = static_cast<int>(run & 15);
      const uint32_t first_read = x_base + (my_row + row) * Tile::XPitch + (Tile::Pieced ? 0 : shift & 12) + lane % 4 * DL * 4;
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += tn) {
        if constexpr (Tile::Float) clear_sums(acc);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int k = step * XK, within = k % Tile::WK;
          if (s.resident ? tile + step == 0 : within == 0) {
            // Everybody's products with what was there are done.
            wgmma_wait();
            sync_consumers();
            load_w(at, k, s.resident ? steps * XK : min(Tile::WK, (steps - step) * XK));
            sync_consumers();
          }
          const uint32_t block = w_base + (s.resident ? k / Tile::WK * w_block : 0);
          const uint64_t w_descriptor = wgmma_descriptor<Tile::WRow>(block + my_j * Tile::WRow) + within / E;
          barrier_wait(x_full + 8 * ring.slot, ring.parity);
          const uint32_t source = first_read + ring.slot * x_slot;
          const int left = features - k * DL;
          if constexpr (Tile::Float) multiply_split(acc, source, w_descriptor, left, ring.slot);
          else multiply_pairs(acc, source, w_descriptor, shift, left, ring.slot, step == 0);
          ring.advance(s.x_slots);
        }
        wgmma_wait();
        finish(acc, at);
      }
    }
  }

 public:
  __device__ BatchFirstUnaligned(const Product& product, const UnalignedShape& shape, uint32_t base)
      : p(product), s(shape), w_base(base) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, Tile::Copiers);
        barrier_init(x_empty + 8 * slot, Tile::Consumers);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {
      keep_registers<40>();
      copy_x(threadIdx.x % 128);
    } else {
      take_registers<232>();
      multiply();
    }
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    batch_first_unaligned_kernel(const __grid_constant__ Product p, const __grid_constant__ UnalignedShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchFirstUnaligned<Tile>(p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
