// Batch-first product with one Kronecker-sparse factor on Hopper: the interleaved x goes from shared memory through a byte
// permutation to the registers that wgmma takes its first operand from (sm_90a; 16-bit types).
//
// Contract: product.h. What the host promises: register_shape in launch_registers.cuh.
//
// Index map: a tile is TN rows n, TJ values of j and DL neighbouring l of one i. A unit is `unit_tiles` tiles that follow one
// another along n; the grid is persistent and takes units in the order of unit_walk.cuh, so that CTAs that read the same x run
// together. Where w[i, l.., j.., :] fits, it is fetched once for a unit. Two warpgroups multiply, each 64 rows of LW values of l
// and WJ of j; of a third, one thread fetches x and one fetches w. Where d > DL, the copy engine would take x 32 bytes at a
// time, one piece in four or five clocks: there three warps copy x, and shared memory looks the same.
//
//   x, one row n, in shared memory as it lies          k0           k0+1         k0+2 ...
//                                                 [l0 l1 .. l][l0 l1 .. l][l0 l1 .. l]
//   a thread reads the runs of k, k+1 (16 or 8 bytes) and has, for every l, the pair (k, k+1): a register of the operand
//   w in shared memory [l][j][k]     D[n][j] in registers for every l  ->  y [n][j][l]  ->  global memory, whole runs
//
// A cluster of two CTAs takes two neighbouring tiles along j; each fetches half of the rows of x for both (d = DL alone:
// threads cannot copy to both).
//
// Shared memory: x_slots * XBytes + w_slots * WBytes + YBytes + 1024 bytes.
// Source: the pattern is that of arXiv:2405.15013; the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "tile.cuh"
#include "unit_walk.cuh"
#include "wgmma.cuh"

namespace structlayers {

// Strided: d > DL, a run of x is 32 bytes; else d = DL, and the runs of a row follow one another. RowGroups, JGroups: into how
// many parts the two warpgroups cut the rows, or the values of j; otherwise they cut the l. WK: values of k in a slot of w.
template <typename T_, int DL_, bool Strided_, int RowGroups_, int JGroups_, int WJ_, int WK_, int Cluster_>
struct RegisterTile {
  using T = T_;
  static constexpr int DL = DL_, RowGroups = RowGroups_, JGroups = JGroups_, WJ = WJ_, WK = WK_;
  static constexpr bool Strided = Strided_;
  // Whether units may be grouped (unit_walk.cuh): runs that lie apart lost by it, up to 1.4 times.
  static constexpr bool Grouped = !Strided;
  // Only the copy engine can write to both CTAs.
  static constexpr int Cluster = Strided ? 1 : Cluster_;
  static constexpr int LGroups = 2 / (RowGroups * JGroups);
  static constexpr int TN = 64 * RowGroups, TJ = WJ * JGroups, LW = DL / LGroups;
  static constexpr int Consumers = 256, Threads = Consumers + 128;
  // x: a slot holds XK values of k, in boxes of 128 bytes of every row; where Strided, of XK runs of every row.
  static constexpr int XK = DL == 2 ? 32 : 16, Boxes = Strided ? 1 : XK * DL / 64, BoxBytes = TN * XK * DL * 2 / Boxes;
  static constexpr int BoxRows = TN / Cluster, XBytes = Boxes * BoxBytes;
  static constexpr int XWarps = 3, XArrivals = Strided ? 32 * XWarps : 1;  // warps that copy; arrivals that fill a slot
  static constexpr int XReleases = Strided ? Consumers : Consumers / 32 * Cluster;  // arrivals that free a slot
  static constexpr int WRow = WK * 2, WBytes = DL * TJ * WRow, WSteps = WK / XK;
  // y leaves in two parts of j. The threads of a warp, or of two warps that hold different l, write whole rows of a part.
  static constexpr int YParts = 2, YColumns = WJ / YParts, YRun = LGroups == 2 ? DL : LW;
  static constexpr int YRowBytes = YColumns * YRun * 2, YPitch = YRowBytes + (LGroups == 2 ? 32 : 16);
  static constexpr int YAreas = LGroups == 2 ? 4 : 8, YBytes = YAreas * 16 * YPitch, YThreads = 32 * LGroups;
  static constexpr int MaxSlots = 16, BarrierBytes = 4 * MaxSlots * 8;
  static_assert(sizeof(T) == 2 && (DL == 2 || DL == 4 || DL == 8 || DL == 16) && LGroups >= 1 && LW <= 8);
  static_assert((DL == 16) == (LGroups == 2) && (!Strided || DL == 16) && XBytes % 1024 == 0 && WBytes % 1024 == 0);
  static_assert(WK % XK == 0 && LW * WJ <= 256 && (Cluster == 1 || Cluster == 2));
};

struct RegisterMaps {
  CUtensorMap x, w;
};

template <typename Tile>
class BatchFirstRegisters : UnitWalk<Tile> {
  using Walk = UnitWalk<Tile>;
  using typename Walk::Place;
  using Walk::place, Walk::p, Walk::s, Walk::rank, Walk::steps;
  using T = typename Tile::T;
  static constexpr int DL = Tile::DL, LW = Tile::LW, WJ = Tile::WJ, TN = Tile::TN;

  const RegisterMaps& maps;
  const uint32_t shared;
  const uint32_t w_base = shared + s.x_slots * Tile::XBytes, y_base = w_base + s.w_slots * Tile::WBytes;
  const uint32_t x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  const uint32_t w_full = x_empty + 8 * Tile::MaxSlots, w_empty = w_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  // ---- the threads that fetch

  __device__ __forceinline__ void fetch_x() const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      // Features of block i begin at i * c * d of a row, or at 0 of block i of the map.
      const int block = s.flat_input ? 0 : at.i, first_k = s.flat_input ? at.i * p.c : 0;
      for (int tile = 0; tile < at.tiles; ++tile) {
        const int n = static_cast<int>(at.n0) + tile * TN + rank * Tile::BoxRows;
        for (int step = 0; step < steps; ++step) {
          const uint32_t full = x_full + 8 * ring.slot, slot = shared + ring.slot * Tile::XBytes;
          const int k = first_k + step * Tile::XK;
          if constexpr (Tile::Cluster == 1) barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
          else barrier_wait_cluster(x_empty + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::XBytes);
#pragma unroll
          for (int box = 0; box < Tile::Boxes; ++box) {
            const uint32_t destination = slot + box * Tile::BoxBytes + rank * (Tile::BoxBytes / Tile::Cluster);
            if constexpr (Tile::Cluster == 1) copy_box(destination, maps.x, full, k * DL + box * 64, block, n);
            else copy_box_to(3, destination, maps.x, full, k * DL + box * 64, block, n);
          }
          ring.advance(s.x_slots);
        }
      }
    }
  }

  // The same by XWarps warps, where runs lie apart: an instruction of a warp takes one row of a slot, a lane 16 bytes of the run
  // of one k. The halves of a run change places where k / 4 is odd, so that the reads of first_read meet different banks.
  __device__ __forceinline__ void copy_x(int first_row) const {
    constexpr int Warps = Tile::XWarps, RunBytes = DL * 2, RowBytes = Tile::XK * RunBytes;
    static_assert(RowBytes == 32 * 16 && RunBytes == 2 * 16);
    const int k = lane / 2, half = lane % 2;
    const uint32_t place_in_slot = first_row * RowBytes + k * RunBytes + (half ^ k / 4 % 2) * 16;
    const int64_t step_features = int64_t{Tile::XK} * p.d;
    Ring ring;
    for (unsigned unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
      const Place at = place(unit);
      const int64_t run = static_cast<int64_t>(p.c) * p.d, block = at.i * run, first = static_cast<int64_t>(k) * p.d + at.l0 + half * 8;
      // How many features there are from this lane's first to the end of the block; what lies behind counts as zeros.
      const int64_t features = at.l0 + half * 8 < p.d ? min(run, p.in_features - block) - first : 0;
      const T* tile_source = static_cast<const T*>(p.x) + (at.n0 + first_row) * p.x_stride + block + first;
      int rows = static_cast<int>(p.n - at.n0) - first_row;
      for (int tile = 0; tile < at.tiles; ++tile, rows -= TN, tile_source += TN * p.x_stride) {
        const T* step_source = tile_source;
        int64_t left = features;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, step_source += step_features, left -= step_features) {
          const uint32_t destination = shared + ring.slot * Tile::XBytes + place_in_slot;
          const int valid_rows = left > 0 ? rows : 0;
          const T* source = step_source;
          barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
          for (int r = 0; r < TN; r += Warps, source += Warps * p.x_stride) {
            if (r + Warps <= TN || first_row < TN - r) copy_async_16(destination + r * RowBytes, source, r < valid_rows ? 16 : 0);
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

  // ---- x: shared memory to registers

  // The values of l and j, and the rows within a tile, that this warp holds.
  const int my_l = Tile::LGroups == 2 ? group * LW : 0, my_j = Tile::JGroups == 2 ? group * WJ : 0;
  const int my_row = (Tile::RowGroups == 2 ? group * 64 : 0) + warp * 16;
  // The row, of eight, of this thread's accumulators. Threads that read at a time shall read different banks.
  static __device__ __forceinline__ int row_of(int quad) {
    if constexpr (DL == 2) return quad % 4 * 2 + quad / 4;
    if constexpr (DL == 4) return quad % 2 * 4 + quad / 2;
    return quad;
  }
  const int row = row_of(lane / 4);
  // Where runs are 32 bytes, some threads read k+1 before k, for the same reason.
  const bool swapped = DL == 16 && (Tile::Strided ? lane / 4 % 2 : lane % 4 / 2);
  const uint32_t even = swapped ? 0x1054 : 0x5410, odd = swapped ? 0x3276 : 0x7632;

  // Where in a slot this thread reads first.
  __device__ __forceinline__ uint32_t first_read() const {
    const int t = lane % 4, n = my_row + row;
    if constexpr (Tile::Strided) {
      return n * 512 + (2 * t + swapped) * 32 + ((group ^ t / 2) * 16);
    } else {
      int box = 0, chunk, rest = 0;
      if constexpr (DL == 2) {
        chunk = t / 2;
        rest = t % 2 * 8;
      } else if constexpr (DL == 4) {
        chunk = t;
      } else if constexpr (DL == 8) {
        chunk = 2 * t;
      } else {
        box = t / 2;
        chunk = (t % 2 * 2 + swapped) * 2 + group;
      }
      return box * Tile::BoxBytes + n * 128 + (chunk ^ row) * 16 + rest;
    }
  }
  const uint32_t x_first = first_read();

  // Reads of one product: rows (row, row + 8), halves of k (0.., 8..), and k, k+1 where they lie apart.
  static constexpr int Apart = LW == 8 ? 2 : 1, Words = LW == 2 ? 2 : 4;
  using Raw = uint32_t[2][2][Apart * Words];

  __device__ __forceinline__ void load_x(Raw& raw, uint32_t slot, int product) const {
    constexpr int RowStep = Tile::Strided ? 8 * 512 : 8 * 128;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // What differs in the swizzled bits is mixed in, the rest is added.
      const uint32_t mixed = DL == 2 ? product * 64 + half * 32 : DL == 4 ? half * 64 : 0;
      const uint32_t added = Tile::Strided ? half * 256 : DL >= 8 ? half * (DL / 8) * Tile::BoxBytes : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int apart = 0; apart < Apart; ++apart) {
          const uint32_t source = slot + (x_first ^ (mixed + apart * (DL == 8 ? 16 : 32))) + added + h * RowStep;
          if constexpr (Words == 2) {
            load_shared_8(raw[h][half][0], raw[h][half][1], source);
          } else {
            uint32_t v[4];
            load_shared_16(v, source);
#pragma unroll
            for (int m = 0; m < 4; ++m) raw[h][half][apart * 4 + m] = v[m];
          }
        }
      }
    }
  }

  using Operands = uint32_t[LW][4];

  __device__ __forceinline__ void separate(Operands& a, const Raw& raw) const {
#pragma unroll
    for (int l = 0; l < LW; ++l) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t(&flat)[Apart * Words] = raw[r % 2][r / 2];
        const uint32_t selector = DL == 16 ? (l % 2 ? odd : even) : l % 2 ? 0x7632 : 0x5410;
        a[l][r] = __byte_perm(flat[l / 2], flat[LW / 2 + l / 2], selector);
      }
    }
  }

  // ---- y

  using Accumulators = float[LW][WJ / 8][4];

  // Count values of the bias that lie together, of which `valid` exist.
  template <int Count>
  __device__ __forceinline__ void load_bias(float (&bias)[Count], int64_t feature, int64_t valid) const {
    const T* source = static_cast<const T*>(p.bias) + feature;
    if (valid >= Count && reinterpret_cast<uintptr_t>(source) % (Count * 2) == 0) {
      uint32_t v[Count / 2];
      if constexpr (Count == 8) load_global_16(v, source);
      else load_global_8(v[0], v[1], source);
#pragma unroll
      for (int m = 0; m < Count; ++m) {
        const uint16_t bits = static_cast<uint16_t>(v[m / 2] >> (m % 2 * 16));
        bias[m] = to_float(reinterpret_cast<const T&>(bits));
      }
    } else {
#pragma unroll
      for (int m = 0; m < Count; ++m) bias[m] = m < valid ? to_float(source[m]) : 0.f;
    }
  }

  __device__ __forceinline__ uint32_t y_area() const {
    return y_base + (Tile::LGroups == 2 ? warp : group * 4 + warp) * (16 * Tile::YPitch);
  }

  // A part of the accumulators to shared memory, [n][j][l].
  __device__ __forceinline__ void stage_y(const Accumulators& acc, const Place& at, int part) const {
    constexpr int Parts = Tile::YColumns / 8, Together = LW == 8 ? 8 : 2 * LW;
    const int t = lane % 4;
#pragma unroll
    for (int q = 0; q < Parts; ++q) {
      const int g = part * Parts + q, column = q * 8 + 2 * t;  // first of two columns
      float bias[2][LW] = {};
      if (p.bias != nullptr) {
        const int j = at.j0 + my_j + g * 8 + 2 * t, l = at.l0 + my_l;
        const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * p.d + l, left = p.out_features - feature;
        if constexpr (LW == 8) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            load_bias<8>(bias[e], feature + e * static_cast<int64_t>(p.d), j + e < p.b && l < p.d ? left - e * p.d : 0);
          }
        } else {
          float both[Together];
          load_bias<Together>(both, feature, min(static_cast<int64_t>(p.b - j) * DL, left));
#pragma unroll
          for (int m = 0; m < Together; ++m) bias[m / LW][m % LW] = both[m];
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t v[2][LW / 2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int l = 0; l < LW; l += 2) {
            v[e][l / 2] = pack_two<T>(acc[l][g][2 * h + e] + bias[e][l], acc[l + 1][g][2 * h + e] + bias[e][l + 1]);
          }
        }
        const uint32_t place = y_area() + (h * 8 + row) * Tile::YPitch;
        if constexpr (LW == 2) {
          store_shared_8(place + column * 4, v[0][0], v[1][0]);
        } else if constexpr (LW == 4) {
          store_shared_16(place + column * 8, {v[0][0], v[0][1], v[1][0], v[1][1]});
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int chunk = DL == 16 ? mixed_chunk((column + e) * 2 + group) : column + e;
            store_shared_16(place + chunk * 16, {v[e][0], v[e][1], v[e][2], v[e][3]});
          }
        }
      }
    }
  }

  // The place of a 16-byte piece in a row of a part of y.
  static __device__ __forceinline__ int mixed_chunk(int chunk) { return DL == 16 ? chunk ^ (chunk >> 3 & 1) : chunk; }

  __device__ __forceinline__ void write_y(const Place& at, int part) const {
    constexpr int Chunks = Tile::YRowBytes / 16, RowStep = Tile::YThreads / Chunks;
    static_assert(Tile::YThreads % Chunks == 0 && 16 % RowStep == 0);
    const int thread = Tile::LGroups == 2 ? group * 32 + lane : lane, chunk = thread % Chunks, first = thread / Chunks;
    // This piece of every row: values l.. of j, or, where runs are short, of j and what follows.
    const int j = at.j0 + my_j + part * Tile::YColumns + chunk * 8 / DL, l = at.l0 + chunk * 8 % DL;
    const int64_t feature = (static_cast<int64_t>(at.i) * p.b + j) * p.d + l;
    const int64_t left = min(DL < 8 ? static_cast<int64_t>(p.b - j) * DL : (j < p.b && l < p.d ? 8 : 0), p.out_features - feature);
    const int64_t n0 = at.n0 + my_row + first;
    T* destination = static_cast<T*>(p.y) + n0 * p.y_stride + feature;
    uint32_t source = y_area() + first * Tile::YPitch + mixed_chunk(chunk) * 16;
    // One path for the whole warp: a call that only some lanes make was seen to spoil the others' uniform registers.
    if (__all_sync(0xffffffff, left >= 8 && p.y_aligned && at.n0 + my_row + 16 <= p.n)) {
#pragma unroll
      for (int r = 0; r < 16; r += RowStep) {
        uint32_t v[4];
        load_shared_16(v, source + r * Tile::YPitch);
        if (p.activation != kNone) activate_piece<T>(v, p.activation);
        store_global_16(destination, v);
        destination += RowStep * p.y_stride;
      }
    } else {
      write_y_pieces(p, destination, source, left, n0);
    }
  }

  // At an edge, or where nothing is aligned.
  static __device__ __noinline__ void write_y_pieces(const Product& p, T* destination, uint32_t source, int64_t left, int64_t n) {
    constexpr int RowStep = Tile::YThreads / (Tile::YRowBytes / 16);
    const int valid = static_cast<int>(max(min(left, int64_t{8}), int64_t{0}));
#pragma unroll 1
    for (int r = 0; r < 16 && n + r < p.n; r += RowStep) {
      uint32_t v[4];
      load_shared_16(v, source + r * Tile::YPitch);
      if (p.activation != kNone) activate_piece<T>(v, p.activation);
      if (valid == 8 && p.y_aligned) {
        store_global_16(destination, v);
      } else {
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          if (m < valid) reinterpret_cast<uint16_t*>(destination)[m] = static_cast<uint16_t>(v[m / 2] >> (m % 2 * 16));
        }
      }
      destination += RowStep * p.y_stride;
    }
  }

  // The threads that share a part of y.
  __device__ __forceinline__ void sync_y() const {
    if constexpr (Tile::LGroups == 2) sync_threads(1 + warp, 64);
    else __syncwarp();
  }

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
#pragma unroll
    for (int part = 0; part < Tile::YParts; ++part) {
      sync_y();  // the part before has left
      stage_y(acc, at, part);
      sync_y();
      write_y(at, part);
    }
  }

  // ---- the warpgroups that multiply

  // Where threads copy, every thread that has read arrives: it costs nothing, and racecheck does not follow what
  // __syncwarp orders before one lane's arrival.
  __device__ __forceinline__ void release_x(int slot) const {
    if constexpr (Tile::Strided) {
      barrier_arrive(x_empty + 8 * slot);
      return;
    }
    __syncwarp();
    if constexpr (Tile::Cluster == 1) {
      if (lane == 0) barrier_arrive(x_empty + 8 * slot);
    } else {
      if (lane < Tile::Cluster) barrier_arrive_remote(map_to_cta(x_empty + 8 * slot, lane));
    }
  }

  __device__ __forceinline__ void multiply() const {
    Ring x, w;
    Accumulators acc;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += TN) {
        const bool last_use = !s.resident || tile == at.tiles - 1;
        uint64_t w_descriptor = 0;
        int w_used = -1;  // a slot of w whose products are under way, and the last of it
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int w_part = step % Tile::WSteps;
          if (w_part == 0) {
            barrier_wait(w_full + 8 * w.slot, w.parity);
            w_descriptor = wgmma_descriptor<Tile::WRow>(w_base + w.slot * Tile::WBytes + my_j * Tile::WRow);
          }
          barrier_wait(x_full + 8 * x.slot, x.parity);
#pragma unroll
          for (int product = 0; product < Tile::XK / 16; ++product) {
            Raw raw;
            Operands a;
            load_x(raw, shared + x.slot * Tile::XBytes, product);
            // The products before are done with their registers, and with their slot of w.
            wgmma_wait();
            if (product == 0 && w_used >= 0) {
              if (lane == 0) barrier_arrive(w_empty + 8 * w_used);
              w_used = -1;
            }
            separate(a, raw);
            // All operands are ready before the first product: none is written once products are under way.
#pragma unroll
            for (int l = 0; l < LW; ++l) asm volatile("" : "+r"(a[l][0]), "+r"(a[l][1]), "+r"(a[l][2]), "+r"(a[l][3])::"memory");
            if (product == Tile::XK / 16 - 1) release_x(x.slot);
            const uint64_t b = w_descriptor + (w_part * (Tile::XK / 16) + product) * 2;
            wgmma_fence();
#pragma unroll
            for (int l = 0; l < LW; ++l) {
              WgmmaRegisters<T, WJ>::multiply(acc[l], a[l], b + (my_l + l) * (Tile::TJ * Tile::WRow / 16), step == 0 && product == 0);
            }
            wgmma_commit();
          }
          x.advance(s.x_slots);
          if (w_part == Tile::WSteps - 1 || step == steps - 1) {
            if (last_use) w_used = w.slot;
            w.advance(s.w_slots);
          }
        }
        wgmma_wait();
        if (w_used >= 0 && lane == 0) barrier_arrive(w_empty + 8 * w_used);
        // The same w again.
        if (!last_use) w.parity ^= 1;
        finish(acc, at);
      }
    }
  }

 public:
  __device__ BatchFirstRegisters(const RegisterMaps& tensor_maps, const Product& product, const RegisterShape& shape, uint32_t base)
      : Walk(product, shape), maps(tensor_maps), shared(base) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, Tile::XArrivals);
        barrier_init(x_empty + 8 * slot, Tile::XReleases);
      }
      for (int slot = 0; slot < s.w_slots; ++slot) {
        barrier_init(w_full + 8 * slot, 1);
        barrier_init(w_empty + 8 * slot, Tile::Consumers / 32);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if constexpr (Tile::Cluster > 1) cluster_sync();
    if (group == 2) {
      keep_registers<40>();
      if constexpr (Tile::Strided) {
        if (warp < Tile::XWarps) copy_x(warp);
      } else {
        if (lane == 0 && warp == 0) fetch_x();
      }
      if (lane == 0 && warp == Tile::XWarps) this->fetch_w(maps.w, w_base, w_full, w_empty);
      __syncwarp();
    } else {
      take_registers<232>();
      multiply();
    }
    // Nobody leaves while the other may still write here.
    if constexpr (Tile::Cluster > 1) cluster_sync();
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    batch_first_registers_kernel(const __grid_constant__ RegisterMaps maps, const __grid_constant__ Product p,
                                 const __grid_constant__ RegisterShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchFirstRegisters<Tile>(maps, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
