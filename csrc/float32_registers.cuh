// float32 product with one Kronecker-sparse factor on Hopper's tensor cores (sm_90a): x goes from shared memory to the
// registers that wgmma takes its first operand from, w by the copy engine to shared memory, where the second is read.
//
// Contract: product.h. What the host promises: register_shape in launch_registers.cuh.
//
// Index map: units, tiles and the persistent grid are those of unit_walk.cuh. Two warpgroups multiply: they cut the rows of a
// tile (DL = 1, 2, 4) or its l (DL = 8). A third fetches: x by the copy engine (where d = DL) or by three of its warps
// (d > DL: runs of 32 bytes), w by the copy engine. A fourth splits w in place, or fetches it where its rows are not whole
// 16-byte pieces. A cluster of two CTAs takes two neighbouring tiles along j; each fetches half of the rows of x for both.
//
//   x in shared memory: boxes of 128 bytes of every row, [k][l] as it lies, 16-byte pieces swizzled by the row
//   batch-last: one l; boxes of 32 n of every k, [k][n] as it lies, swizzled likewise
//   w in shared memory: [l][j][k]; Split: upper parts, then lower parts
//
// Split: y = x_low w_high + x_high w_low + x_high w_high. The tensor core truncates where it accumulates, so the products of
// 16 k begin at zero and are added to float32 registers. Otherwise there is the last product alone, TF32, accumulated by the
// tensor core, which ignores the lower bits of w.
//
// Shared memory: x_slots * XBytes + w_slots * WBytes + YBytes + BarrierBytes.
// Source: the pattern is that of arXiv:2405.15013; that three products of split operands, promoted, are as exact as float32
// was measured (NOTES.md); the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "split.cuh"
#include "tile.cuh"
#include "unit_walk.cuh"
#include "wgmma.cuh"

namespace structlayers {

// LW: products that share a step: of so many l or, where DL = 1, of so many times 64 rows of the batch (RowTiles). JGroups: into
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
  static_assert((DL == 1 || DL == 2 || DL == 4 || DL == 8) && (!Strided || DL == 8) && (!Last || DL == 1));
  static_assert((Cluster == 1 || (Cluster == 2 && !Strided && !Last)) && RowGroups >= 1);
  static_assert(XBytes % 1024 == 0 && WPart % 1024 == 0);
};

template <typename Tile>
class Float32Registers : UnitWalk<Tile> {
  using Walk = UnitWalk<Tile>;
  using typename Walk::Place;
  using Walk::place, Walk::p, Walk::s, Walk::rank;
  static constexpr int DL = Tile::DL, LW = Tile::LW, WJ = Tile::WJ, TN = Tile::TN, Parts = Tile::StepK / 16;
  static constexpr bool Split = Tile::Split;

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

  // ---- the threads that fetch

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

  // ---- x: shared memory to registers

  const int my_j = Tile::JGroups == 2 ? group * WJ : 0;
  const int my_row = (Tile::RowGroups == 2 ? group * 64 * Tile::RowTiles : 0) + warp * 16;
  // The row, of eight, of this thread's accumulators: threads that read at a time read different banks.
  static __device__ __forceinline__ int row_of(int quad) {
    return DL == 8 ? quad : DL == 2 ? quad % 4 * 2 + quad / 4 : quad % 2 * 4 + quad / 2;
  }
  const int row = row_of(lane / 4);

  // For rows (row, row + 8), what 16 k hold for this thread: k = lane % 4 and every fourth after it, LW values of l.
  using Raw = uint32_t[2][4 * LW];
  static __device__ __forceinline__ constexpr int raw_index(int fourth, int l) {
    return DL == 1 && !Tile::Last ? l * 4 + fourth : fourth * LW + l;
  }

  __device__ __forceinline__ void load_x(Raw& raw, const uint32_t (&slots)[Tile::XSlots], int part) const {
    const int t = lane % 4;
    if constexpr (Tile::Last) {
      // Here the rows of this thread are four neighbours in n, two of either product.
      const uint32_t box = slots[0] + (group * 4 + warp) * Tile::BoxBytes + part * (16 * 128);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int k = m * 4 + t;
        uint32_t v[4];
        load_shared_16(v, box + k * 128 + (row ^ (k & 7)) * 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) raw[e % 2][raw_index(m, e / 2)] = v[e];
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int line = (my_row + row + h * 8) * 128;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if constexpr (DL == 1) {
#pragma unroll
            for (int l = 0; l < LW; ++l) {
              raw[h][raw_index(m, l)] = load_shared_4(slots[0] + line + l * (64 * 128) + ((part * 4 + m) ^ row) * 16 + t * 4);
            }
          } else if constexpr (DL == 2) {
            const uint32_t source = slots[0] + part * Tile::BoxBytes + line + ((m * 2 + t / 2) ^ row) * 16 + t % 2 * 8;
            load_shared_8(raw[h][raw_index(m, 0)], raw[h][raw_index(m, 1)], source);
          } else {
            const int chunk = DL == 4 ? m % 2 * 4 + t : 2 * t + group;
            const uint32_t box = slots[m / 2] + (DL == 8 ? m % 2 * Tile::BoxBytes : 0);
            uint32_t v[4];
            load_shared_16(v, box + line + (chunk ^ row) * 16);
#pragma unroll
            for (int l = 0; l < 4; ++l) raw[h][raw_index(m, l)] = v[l];
          }
        }
      }
    }
  }

  // The operands of 8 k: registers are (row, k), (row + 8, k), (row, k + 4), (row + 8, k + 4).
  using Operands = uint32_t[2][4];

  static __device__ __forceinline__ void split_x(Operands& upper, Operands& lower, const Raw& raw, int l) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t exact = raw[r % 2][raw_index(2 * q + r / 2, l)];
        upper[q][r] = upper_part(exact);
        lower[q][r] = lower_part(exact, upper[q][r]);
      }
    }
    ready(upper);
    ready(lower);
  }

  // The tensor core cuts off what is behind the 10 bits, so that half of the last rounds to nearest.
  static __device__ __forceinline__ void round_x(Operands& rounded, const Raw& raw, int l) {
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int r = 0; r < 4; ++r) rounded[q][r] = raw[r % 2][raw_index(2 * q + r / 2, l)] + 0x1000u;
    ready(rounded);
  }

  // Before the first product: no operand is written while products are under way.
  static __device__ __forceinline__ void ready(Operands& a) {
#pragma unroll
    for (int q = 0; q < 2; ++q) asm volatile("" : "+r"(a[q][0]), "+r"(a[q][1]), "+r"(a[q][2]), "+r"(a[q][3])::"memory");
  }

  // ---- products

  using Accumulators = float[LW][WJ / 8][4];
  using Partial = float[WJ / 8][4];
  static constexpr uint64_t LStep = DL == 1 ? 0 : Tile::TJ * Tile::WRow / 16, LowStep = Tile::WPart / 16;

  // The slots of x of one step.
  struct Step {
    uint32_t slots[Tile::XSlots], empty[Tile::XSlots];
  };

  __device__ __forceinline__ Step wait_x(Ring& x) const {
    Step step;
#pragma unroll
    for (int q = 0; q < Tile::XSlots; ++q) {
      step.slots[q] = shared + x.slot * Tile::XBytes;
      step.empty[q] = x_empty + 8 * x.slot;
      barrier_wait(x_full + 8 * x.slot, x.parity);
      x.advance(s.x_slots);
    }
    return step;
  }

  __device__ __forceinline__ void release_x(const Step& step) const {
    if constexpr (!Tile::Strided) __syncwarp();
#pragma unroll
    for (int q = 0; q < Tile::XSlots; ++q) {
      if constexpr (Tile::Cluster == 1) {
        if (Tile::Strided || lane == 0) barrier_arrive(step.empty[q]);
      } else {
        if (lane < Tile::Cluster) barrier_arrive_remote(map_to_cta(step.empty[q], lane));
      }
    }
  }

  // The products of one step of x with one slot of w, promoted; all are done at the end. Where registers allow, the operands
  // of the next batch (16 k, one l) are made, and the sums of the one before promoted, while those of one are under way.
  __device__ __forceinline__ void multiply_split(Accumulators& acc, const Step& step, uint64_t w) const {
    constexpr int Batches = Parts * LW, Buffers = LW * WJ == 256 ? 1 : 2;
    Raw raw;
    Operands upper[Buffers], lower[Buffers];
    Partial partial[Buffers];
#pragma unroll
    for (int batch = 0; batch < Batches; ++batch) {
      const int part = batch / LW, l = batch % LW;
      Operands &high = upper[batch % Buffers], &low = lower[batch % Buffers];
      Partial& out = partial[batch % Buffers];
      if (l == 0) load_x(raw, step.slots, part);
      if (Buffers == 1 && batch > 0) {
        wgmma_wait();
        promote(acc[(batch - 1) % LW], out);
      }
      split_x(high, low, raw, l);
      if (batch == Batches - 1) release_x(step);
      wgmma_fence();
      const uint64_t b = w + l * LStep + part * 4;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        WgmmaRegisters<float, WJ>::multiply(out, low[q], b + 2 * q, q == 0);
        WgmmaRegisters<float, WJ>::multiply(out, high[q], b + LowStep + 2 * q, false);
        WgmmaRegisters<float, WJ>::multiply(out, high[q], b + 2 * q, false);
      }
      wgmma_commit();
      if (Buffers == 2 && batch > 0) {
        wgmma_wait<1>();
        promote(acc[(batch - 1) % LW], partial[(batch - 1) % Buffers]);
      }
    }
    wgmma_wait();
    promote(acc[LW - 1], partial[(Batches - 1) % Buffers]);
  }

  // The same accumulated by the tensor core; the last products are still under way at the end. `before` is called where those
  // of the step before are done.
  template <typename Before>
  __device__ __forceinline__ void multiply_tf32(Accumulators& acc, const Step& step, uint64_t w, bool fresh, const Before& before) const {
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      Raw raw;
      Operands a[LW];
      load_x(raw, step.slots, part);
      wgmma_wait();
      if (part == 0) before();
#pragma unroll
      for (int l = 0; l < LW; ++l) round_x(a[l], raw, l);
      if (part == Parts - 1) release_x(step);
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int l = 0; l < LW; ++l) {
          WgmmaRegisters<float, WJ>::multiply(acc[l], a[l][q], w + l * LStep + part * 4 + 2 * q, fresh && part == 0 && q == 0);
        }
      wgmma_commit();
    }
  }

  __device__ __forceinline__ void advance_w(Ring& w) const {
#pragma unroll
    for (int q = 0; q < Tile::LGroups; ++q) w.advance(s.w_slots);
  }

  __device__ __forceinline__ void multiply() const {
    Ring x, w;
    if (Tile::LGroups == 2 && group == 1) w.advance(s.w_slots);
    Accumulators acc;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += TN) {
        const bool last_use = !s.resident || tile == at.tiles - 1;
        if constexpr (Split) clear_sums(acc);
        int w_used = -1;  // a slot of w whose products are under way, and the last of it
        const auto release_w = [&] {
          if (w_used >= 0 && lane == 0) barrier_arrive(w_empty + 8 * w_used);
          w_used = -1;
        };
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int w_part = step % Tile::WSteps;
          if (w_part == 0) barrier_wait(w_full + 8 * w.slot, w.parity);
          const uint64_t b = wgmma_descriptor<Tile::WRow>(w_base + w.slot * Tile::WBytes + my_j * Tile::WRow) + w_part * (Parts * 4);
          const Step x_step = wait_x(x);
          if constexpr (Split) multiply_split(acc, x_step, b);
          else multiply_tf32(acc, x_step, b, step == 0, release_w);
          if (w_part == Tile::WSteps - 1 || step == steps - 1) {
            if (last_use) w_used = w.slot;
            advance_w(w);
          }
          if constexpr (Split) release_w();
        }
        if constexpr (!Split) {
          wgmma_wait();
          release_w();
        }
        // The same w again.
        if (!last_use) w.parity ^= 1;
        finish(acc, at);
      }
    }
  }

  // ---- y

  // Values of y that a thread writes at a time: LE values of l of two neighbours of 8 columns, of rows (row, row + 8).
  static constexpr int LE = DL, Groups = WJ / 8 / Tile::LGroups;
  using Finished = float[LE][4];

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
    if constexpr (Tile::Last) {
      write_y_last(acc, at);
    } else {
      // Nothing that follows from it is kept in registers while products are under way.
      int thread = lane;
      asm volatile("" : "+r"(thread));
      const int column0 = Tile::LGroups == 2 ? group * (WJ / 2) : my_j, columns = min(Groups * 8, p.b - at.j0 - column0);
      const int64_t d = step_j(), feature0 = (static_cast<int64_t>(at.i) * p.b + at.j0 + column0) * d + at.l0;
#pragma unroll
      for (int m = 0; m < Tile::RowTiles; ++m) {
        // Whole eighths of columns in all rows of this warp: one path for all of it.
        const int64_t n0 = at.n0 + my_row + m * 64;
        if (p.y_aligned && n0 + 16 <= p.n && columns % 8 == 0 && feature0 + (columns - 1) * d + LE <= p.out_features) {
          write_tile<true>(acc, m, thread, n0, feature0, columns);
        } else {
          write_tile<false>(acc, m, thread, n0, feature0, columns);
        }
      }
    }
  }

  // How many features there are from a value of j to the next.
  __device__ __forceinline__ int64_t step_j() const { return Tile::Strided ? p.d : DL; }

  template <bool Whole>
  __device__ __forceinline__ void write_tile(const Accumulators& acc, int m, int thread, int64_t n0, int64_t feature0, int columns) const {
    const int64_t d = step_j(), n = n0 + row_of(thread / 4), first = feature0 + thread % 4 * 2 * d;
    float* line = static_cast<float*>(p.y) + n * p.y_stride + first;
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      Finished z;
      if constexpr (Tile::LGroups == 2) {
        exchange(z, acc, g);
      } else {
#pragma unroll
        for (int l = 0; l < LE; ++l)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[l][e] = acc[DL == 1 ? m : l][g][e];
      }
      if (Whole && g * 8 >= columns) continue;
      const int column = g * 8 + thread % 4 * 2;
      const int64_t feature = first + g * 8 * d;
      if (p.bias != nullptr) {
        const float* bias = static_cast<const float*>(p.bias) + feature;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int l = 0; l < LE; ++l) {
            const bool inside = Whole || (column + e < columns && feature + e * d + l < p.out_features);
            const float v = inside ? __ldg(bias + e * d + l) : 0.f;
            z[l][e] += v;
            z[l][2 + e] += v;
          }
      }
      if (p.activation != kNone) {
#pragma unroll
        for (int l = 0; l < LE; ++l)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[l][e] = activate(z[l][e], p.activation);
      }
      float* destination = line + g * 8 * d;
      if constexpr (Whole) {
        write_columns(z, destination, 0, thread % 2 != 0);
        write_columns(z, destination + 8 * p.y_stride, 1, thread % 2 != 0);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int l = 0; l < LE; ++l) {
              if (n + h * 8 < p.n && column + e < columns && feature + e * d + l < p.out_features) {
                destination[h * 8 * p.y_stride + e * d + l] = z[l][2 * h + e];
              }
            }
      }
    }
  }

  // A warpgroup gives its values of 8 columns of the other half of j, and gets the other l of 8 of its own half.
  __device__ __forceinline__ void exchange(Finished& z, const Accumulators& acc, int g) const {
    constexpr int Half = WJ / 16;
    const int thread = threadIdx.x % 128;
    const bool upper = group == 1;
    const uint32_t mine = y_base + group * (128 * 16 * LW) + thread * 16, theirs = y_base + (group ^ 1) * (128 * 16 * LW) + thread * 16;
    sync_threads(1, Tile::Consumers);  // what was exchanged before has been read
#pragma unroll
    for (int l = 0; l < LW; ++l) {
      uint32_t v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = __float_as_uint(upper ? acc[l][g][e] : acc[l][Half + g][e]);
      store_shared_16(mine + l * (128 * 16), v);
    }
    sync_threads(1, Tile::Consumers);
#pragma unroll
    for (int l = 0; l < LW; ++l) {
      uint32_t v[4];
      load_shared_16(v, theirs + l * (128 * 16));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float own = upper ? acc[l][Half + g][e] : acc[l][g][e], other = __uint_as_float(v[e]);
        z[l][e] = upper ? other : own;
        z[LW + l][e] = upper ? own : other;
      }
    }
  }

  // Batch-last: a thread has four neighbours in n of every j, and eight quads 128 bytes of a row of y.
  __device__ __forceinline__ void write_y_last(const Accumulators& acc, const Place& at) const {
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
  __device__ __forceinline__ void write_columns(const Finished& z, float* line, int h, bool odd) const {
    const auto bits = [&](int l, int e) { return __float_as_uint(z[l][2 * h + e]); };
    if constexpr (DL == 1) {
      *reinterpret_cast<float2*>(line) = make_float2(z[0][2 * h], z[0][2 * h + 1]);
    } else if constexpr (DL == 2) {
      store_global_16(line, {bits(0, 0), bits(1, 0), bits(0, 1), bits(1, 1)});
    } else if constexpr (DL == 4) {
      const uint32_t low[4] = {bits(0, 0), bits(1, 0), bits(2, 0), bits(3, 0)}, high[4] = {bits(0, 1), bits(1, 1), bits(2, 1), bits(3, 1)};
      float* first = odd ? line - 4 : line;
      write_pair(low, high, first, first + 8, odd);
    } else {
      const int64_t d = step_j();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t low[4] = {bits(0, e), bits(1, e), bits(2, e), bits(3, e)}, high[4] = {bits(4, e), bits(5, e), bits(6, e), bits(7, e)};
        float* first = line + e * d + (odd ? 4 - 2 * d : 0);
        write_pair(low, high, first, first + 2 * d, odd);
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
  __device__ Float32Registers(const CUtensorMap& of_x, const CUtensorMap& of_w, const Product& product, const RegisterShape& shape,
                              uint32_t base)
      : Walk(product, shape), x_map(of_x), w_map(of_w), shared(base) {}

  __device__ __forceinline__ void run() const {
    const bool prepares = Split || !p.w_aligned;
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, Tile::XArrivals);
        barrier_init(x_empty + 8 * slot, Tile::XReleases);
      }
      for (int slot = 0; slot < s.w_slots; ++slot) {
        barrier_init(w_raw + 8 * slot, 1);
        barrier_init(w_full + 8 * slot, prepares ? Tile::WThreads : 1);
        barrier_init(w_empty + 8 * slot, Tile::Consumers / 32 / Tile::LGroups);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if constexpr (Tile::Cluster > 1) cluster_sync();
    if (group < 2) {
      take_registers<216>();
      multiply();
    } else if (group == 2) {
      keep_registers<40>();
      if (warp == Tile::XWarps) {
        if (lane == 0 && p.w_aligned) fetch_w();
      } else if constexpr (Tile::Strided) {
        copy_x();
      } else if (warp == 0 && lane == 0) {
        fetch_x();
      }
      __syncwarp();
    } else {
      keep_registers<40>();
      if (!p.w_aligned) prepare_w<true>(threadIdx.x % 128);
      else if constexpr (Split) prepare_w<false>(threadIdx.x % 128);
    }
    // Nobody leaves while the other may still write here.
    if constexpr (Tile::Cluster > 1) cluster_sync();
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    float32_registers_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                             const __grid_constant__ Product p, const __grid_constant__ RegisterShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Float32Registers<Tile>(x_map, w_map, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
