// Two chainable factors in one pass: the intermediate stays in registers, as it leaves the first products (sm_90a, 16-bit,
// batch-first).
//
// Contract: pair.h; of the pairs, those that pair_fits_registers takes.
//
// Index map: a tile is 64 rows n of one group i in one CTA, all j or one part of them. Two warpgroups multiply; each holds all rows
// and half of the left blocks l. One warp fetches, one writes y. The grid is persistent.
//
//   phase 1, for every right block s:   x_s [n][m]  *  right [l][rho][m]  ->  t[l] [n][k = s*rank + rho]
//   phase 2, for J values of j:         t[l] [n][k] *  left  [l][j][k]    ->  y [n][j][l]
//
// What a thread holds of 16 columns of an accumulator is, rounded to 16 bits, what wgmma asks of it of a first operand of
// 16 of K: columns 2 (t % 4) and the next of each eight, rows t / 4 and 8 below. So t never leaves its thread, and the
// warpgroups meet nowhere but at the stages of x and weights and at the pieces of y.
//
// Shared memory: Stages * StageBytes, rows of 64 of K swizzled as the copy engine does it; YSlots * YBytes, 16 j of all rows, likewise.
// Source: the decomposition of a chainable pair is that of arXiv:2411.04506; the kernel is new.
#pragma once

#include <algorithm>

#include "asynchronous.cuh"
#include "pair.h"
#include "product.h"
#include "tile.cuh"
#include "wgmma.cuh"

namespace structlayers {

// Blocks: the link rank, in eights.
template <typename T_, int Blocks_>
struct PairRegisterTile {
  using T = T_;
  static constexpr int Blocks = Blocks_, Rank = 8 * Blocks;
  static constexpr int Alpha = 4, Delta = 4, LW = Delta / 2, K = Alpha * Rank, J = Blocks <= 4 ? LW * Rank : Rank;
  static constexpr int Rows = 64, Consumers = 256, Threads = Consumers + 128;
  static constexpr int RowBytes = 128, RowK = RowBytes / 2;
  // Of the weights, what one warpgroup multiplies by.
  static constexpr int XBytes = Rows * RowBytes, RightBytes = LW * Rank * RowBytes, LeftBytes = LW * J * RowBytes;
  static constexpr int StageBytes = std::max(XBytes + 2 * RightBytes, 2 * LeftBytes);
  static constexpr int YJ = RowK / Delta, YBytes = Rows * RowBytes;
  static constexpr int SharedBytes = 227 * 1024, Room = SharedBytes - 1024;
  static constexpr int Stages = std::min(12, (Room - 2 * YBytes) / StageBytes);
  static constexpr int YSlots = std::min(8, (Room - Stages * StageBytes) / YBytes);
  static_assert(K % 16 == 0 && StageBytes % 1024 == 0 && Stages >= 3 && YSlots >= 2);
  // Boxes of y that a warpgroup hands over together; the warp that writes keeps one back.
  static constexpr int YBatch = YSlots == 3 ? 1 : J / YJ == 3 ? 3 : 2;
  static_assert(YSlots > YBatch && J / YJ % YBatch == 0);
};

struct PairRegisterMaps {
  CUtensorMap x, right, left, y;
};

// Every part of `part_j` of the j is a unit of its own, which computes t again: for batches whose tiles are fewer than the CTAs. A
// kernel of its own, since at rank 64 what it knows of its part costs registers that spill.
struct PairRegisterCut {
  int parts, part_j;
  bool flat_x;  // x is not described by blocks
};

template <typename Tile, bool Parts>
class PairRegisters {
  using T = typename Tile::T;
  static constexpr int LW = Tile::LW, Blocks = Tile::Blocks, J = Tile::J, K = Tile::K;
  using Intermediate = uint32_t[LW][K / 16][4];
  // Of both phases. The compiler finds room, and keeps products in flight, only where those of both phases have accumulators of one
  // size in the same registers: hence as many j as a product of phase 1 has columns, all of this warpgroup's or those of one l.
  static constexpr int Together = J / Tile::Rank;
  static constexpr int Held = std::max(LW * Blocks, LW * J / 8);
  using Accumulators = float[Held][4];

  const PairRegisterMaps& maps;
  const Pair& p;
  const uint32_t shared;
  const uint32_t y_base = shared + Tile::Stages * Tile::StageBytes;
  const uint32_t full = y_base + Tile::YSlots * Tile::YBytes, empty = full + 8 * Tile::Stages;
  const uint32_t y_full = empty + 8 * Tile::Stages, y_empty = y_full + 8 * Tile::YSlots;
  const int x_steps = (p.c + Tile::RowK - 1) / Tile::RowK;
  // A unit is a tile and one part of its j; parts of a tile follow each other, so that they find x in the L2.
  const PairRegisterCut& cut;
  const unsigned step = gridDim.x, first = blockIdx.x;
  const unsigned n_units = static_cast<unsigned>((p.n + Tile::Rows - 1) / Tile::Rows) * p.groups * (Parts ? cut.parts : 1);
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  // Of a unit: the group, the first row, and the values of j.
  __device__ __forceinline__ unsigned tile_of(unsigned unit) const { return Parts ? unit / cut.parts : unit; }
  __device__ __forceinline__ int group_of(unsigned unit) const { return static_cast<int>(tile_of(unit) % p.groups); }
  __device__ __forceinline__ int first_row(unsigned unit) const { return static_cast<int>(tile_of(unit) / p.groups) * Tile::Rows; }
  __device__ __forceinline__ int first_j(unsigned unit) const { return Parts ? static_cast<int>(unit % cut.parts) * cut.part_j : 0; }
  __device__ __forceinline__ int end_j(unsigned unit) const { return Parts ? min(p.b, first_j(unit) + cut.part_j) : p.b; }

  // ---- the warp that fetches

  __device__ __forceinline__ uint32_t acquire(const Ring& ring, uint32_t bytes) const {
    barrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
    barrier_expect(full + 8 * ring.slot, bytes);
    return shared + ring.slot * Tile::StageBytes;
  }

  // The weights of all l: of every warpgroup `bytes`.
  __device__ __forceinline__ void fetch_weights(uint32_t destination, int bytes, const CUtensorMap& map, uint32_t barrier, int k, int row,
                                                int block) const {
    copy_box(destination, map, barrier, k, row, 0, block);
    copy_box(destination + bytes, map, barrier, k, row, LW, block);
  }

  __device__ __forceinline__ void fetch() const {
    Ring ring;
    for (unsigned index = first; index < n_units; index += step) {
      const int i = group_of(index), n0 = first_row(index), j0 = first_j(index), j_end = end_j(index);
      for (int s = 0; s < Tile::Alpha; ++s) {
        const int block = i * Tile::Alpha + s;
        for (int k = 0; k < p.c; k += Tile::RowK) {
          const uint32_t stage = acquire(ring, Tile::XBytes + 2 * Tile::RightBytes), barrier = full + 8 * ring.slot;
          if (cut.flat_x) copy_box(stage, maps.x, barrier, block * p.c + k, 0, n0);
          else copy_box(stage, maps.x, barrier, k, block, n0);
          fetch_weights(stage + Tile::XBytes, Tile::RightBytes, maps.right, barrier, k, 0, block);
          ring.advance(Tile::Stages);
        }
      }
      for (int j = j0; j < j_end; j += J) {
        for (int k = 0; k < K; k += Tile::RowK) {
          const uint32_t stage = acquire(ring, 2 * Tile::LeftBytes);
          fetch_weights(stage, Tile::LeftBytes, maps.left, full + 8 * ring.slot, k, j, i);
          ring.advance(Tile::Stages);
        }
      }
    }
  }

  // ---- the warp that writes

  __device__ __forceinline__ void write() const {
    Ring y;
    int earlier = -1;
    for (unsigned index = first; index < n_units; index += step) {
      const int i = group_of(index), n0 = first_row(index), j0 = first_j(index), j_end = end_j(index);
      for (int j = j0; j < j_end; j += Tile::YJ) {
        barrier_wait(y_full + 8 * y.slot, y.parity);
        store_box(maps.y, y_base + y.slot * Tile::YBytes, j * Tile::Delta, i, n0);
        store_box_commit();
        // The one before has left shared memory.
        store_box_wait_read<1>();
        if (earlier >= 0) barrier_arrive(y_empty + 8 * earlier);
        earlier = y.slot;
        y.advance(Tile::YSlots);
      }
    }
    store_box_wait_read();
  }

  // ---- the warpgroups that multiply

  // The half of a wgmma descriptor that says where; it moves by 2 for every 16 of K.
  __device__ static __forceinline__ uint64_t descriptor(uint32_t address) { return wgmma_descriptor<Tile::RowBytes>(address); }

  __device__ __forceinline__ void release(int slot) const {
    if (lane == 0) barrier_arrive(empty + 8 * slot);
  }

  // The operand is in its registers from here on.
  __device__ static __forceinline__ void hold(uint32_t (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
  }

  template <int Count>
  __device__ static __forceinline__ float (&part(Accumulators& acc, int first))[Count][4] {
    return reinterpret_cast<float(&)[Count][4]>(acc[first]);
  }

  // x goes through registers, so that all of this warpgroup's l share one read of shared memory, which binds. All of it is there
  // before the first product; then one straight line, which the compiler needs to keep products in flight together.
  __device__ __forceinline__ void multiply_right(Accumulators& acc, int slot, bool fresh) const {
    constexpr int Steps = Tile::RowK / 16;
    const uint32_t stage = shared + slot * Tile::StageBytes;
    const uint64_t w = descriptor(stage + Tile::XBytes + group * Tile::RightBytes);
    const int row = warp * 16 + lane % 16;
    uint32_t x[Steps][4];
#pragma unroll
    for (int k = 0; k < Steps; ++k) load_matrix_x4(x[k], stage + row * Tile::RowBytes + ((k * 2 + lane / 16) ^ row % 8) * 16);
#pragma unroll
    for (int k = 0; k < Steps; ++k) hold(x[k]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
#pragma unroll
      for (int l = 0; l < LW; l += Together) {
        constexpr int N = Together * Blocks;
        const uint64_t w_l = w + l * (Tile::Rank * Tile::RowBytes / 16) + 2 * k;
        WgmmaRegisters<T, 8 * N>::multiply(part<N>(acc, l * Blocks), x[k], w_l, fresh && k == 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void fill_t(Accumulators& acc, Intermediate& t, Ring& ring) const {
#pragma unroll
    for (int s = 0; s < Tile::Alpha; ++s) {
      int step = 0;
      // The products of a second stage begin while those of the first are under way.
#pragma unroll 1
      for (; step + 1 < x_steps; step += 2) {
        const int earlier = ring.slot;
        barrier_wait(full + 8 * ring.slot, ring.parity);
        multiply_right(acc, ring.slot, step == 0);
        ring.advance(Tile::Stages);
        barrier_wait(full + 8 * ring.slot, ring.parity);
        multiply_right(acc, ring.slot, false);
        wgmma_wait<1>();
        release(earlier);
        wgmma_wait();
        release(ring.slot);
        ring.advance(Tile::Stages);
      }
      if (step < x_steps) {
        barrier_wait(full + 8 * ring.slot, ring.parity);
        multiply_right(acc, ring.slot, step == 0);
        wgmma_wait();
        release(ring.slot);
        ring.advance(Tile::Stages);
      }
#pragma unroll
      for (int l = 0; l < LW; ++l) {
#pragma unroll
        for (int g = 0; g < Blocks; ++g) {
          const int block = s * Blocks + g;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float(&a)[4] = acc[l * Blocks + g];
            t[l][block / 2][block % 2 * 2 + h] = pack_two<T>(a[2 * h], a[2 * h + 1]);
          }
        }
      }
    }
    // All of it is there before products read it.
#pragma unroll
    for (int l = 0; l < LW; ++l) {
#pragma unroll
      for (int k = 0; k < K / 16; ++k) hold(t[l][k]);
    }
  }

  // The accumulators begin with the bias.
  __device__ __forceinline__ void load_bias(Accumulators& acc, int i, int j0) const {
    const int64_t first_feature = (static_cast<int64_t>(i) * p.b + j0) * Tile::Delta + group * LW;
#pragma unroll
    for (int g = 0; g < J / 8; ++g) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int j = g * 8 + lane % 4 * 2 + odd;
        const int64_t feature = first_feature + j * Tile::Delta;
        const bool inside = j0 + j < p.b && feature < p.out_features;
        const uint32_t two = inside ? __ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + feature)) : 0;
#pragma unroll
        for (int l = 0; l < LW; ++l) {
          const uint16_t bits = static_cast<uint16_t>(two >> (l * 16));
          const float bias = to_float(reinterpret_cast<const T&>(bits));
          acc[l * (J / 8) + g][odd] = bias;
          acc[l * (J / 8) + g][2 + odd] = bias;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_left(Accumulators& acc, const Intermediate& t, Ring& ring, int i, int j0) const {
    constexpr int Steps = (K + Tile::RowK - 1) / Tile::RowK;
    const bool biased = p.bias != nullptr;
    if (biased) load_bias(acc, i, j0);
    int earlier = 0;
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
      barrier_wait(full + 8 * ring.slot, ring.parity);
      const uint64_t w = descriptor(shared + ring.slot * Tile::StageBytes + group * Tile::LeftBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::RowK / 16; ++k) {
        const int at = step * (Tile::RowK / 16) + k;
        if (at >= K / 16) break;
#pragma unroll
        for (int l = 0; l < LW; ++l) {
          const uint64_t w_l = w + l * (J * Tile::RowBytes / 16) + 2 * k;
          WgmmaRegisters<T, J>::multiply(part<J / 8>(acc, l * (J / 8)), t[l][at], w_l, !biased && at == 0);
        }
      }
      wgmma_commit();
      if (step > 0) {
        wgmma_wait<1>();
        release(earlier);
      }
      earlier = ring.slot;
      ring.advance(Tile::Stages);
    }
    wgmma_wait();
    release(earlier);
  }

  // Rounded, to the pieces of y that the writing warp takes. Of the four l of a j, this warpgroup has two.
  __device__ __forceinline__ void hand_over(const Accumulators& acc, Ring& y, int j0) const {
    const int row = lane / 4;
    // Lanes of odd rows write their second j first, so that half of the lanes meet other banks.
    const bool swapped = row % 2;
#pragma unroll
    for (int batch = 0; batch < J / Tile::YJ; batch += Tile::YBatch) {
      const int first_slot = y.slot;
#pragma unroll
      for (int part = batch; part < batch + Tile::YBatch; ++part) {
        if (j0 + part * Tile::YJ >= p.b) break;
        barrier_wait(y_empty + 8 * y.slot, y.parity ^ 1);
        const uint32_t corner = y_base + y.slot * Tile::YBytes + (warp * 16 + row) * Tile::RowBytes + group * 4 + swapped * 8;
#pragma unroll
        for (int q = 0; q < Tile::YJ / 8; ++q) {
          const int g = part * (Tile::YJ / 8) + q;
          uint32_t v[4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) v[h * 2 + odd] = pack_two<T>(acc[g][2 * h + odd], acc[J / 8 + g][2 * h + odd]);
          }
          if (p.activation != kNone) activate_piece<T>(v, p.activation);
          const uint32_t place = corner + ((q * 4 + lane % 4) ^ row) * 16;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            store_shared_4(place + h * 8 * Tile::RowBytes, swapped ? v[2 * h + 1] : v[2 * h]);
            store_shared_4((place ^ 8) + h * 8 * Tile::RowBytes, swapped ? v[2 * h] : v[2 * h + 1]);
          }
        }
        y.advance(Tile::YSlots);
      }
      fence_shared_for_wgmma();
      __syncwarp();
      if (lane < Tile::YBatch && j0 + (batch + lane) * Tile::YJ < p.b) barrier_arrive(y_full + 8 * ((first_slot + lane) % Tile::YSlots));
    }
  }

  __device__ __forceinline__ void multiply() const {
    Ring ring, y;
    Accumulators acc;
    for (unsigned index = first; index < n_units; index += step) {
      Intermediate t;
      fill_t(acc, t, ring);
#pragma unroll 1
      for (int j = first_j(index); j < end_j(index); j += J) {
        multiply_left(acc, t, ring, group_of(index), j);
        hand_over(acc, y, j);
      }
    }
  }

 public:
  __device__ PairRegisters(const PairRegisterMaps& maps, const Pair& p, const PairRegisterCut& cut, uint32_t shared)
      : maps(maps), p(p), cut(cut), shared(shared) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (const CUtensorMap* map : {&maps.x, &maps.right, &maps.left, &maps.y}) prefetch_map(*map);
      for (int slot = 0; slot < Tile::Stages; ++slot) {
        barrier_init(full + 8 * slot, 1);
        barrier_init(empty + 8 * slot, Tile::Consumers / 32);
      }
      for (int slot = 0; slot < Tile::YSlots; ++slot) {
        barrier_init(y_full + 8 * slot, Tile::Consumers / 32);
        barrier_init(y_empty + 8 * slot, 1);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if (group == Tile::Consumers / 128) {
      keep_registers<40>();
      if (lane == 0 && warp == 0) fetch();
      if (lane == 0 && warp == 1) write();
      __syncwarp();
    } else {
      take_registers<232>();
      multiply();
    }
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile, bool Parts>
__global__ void __launch_bounds__(Tile::Threads, 1)
    pair_registers_kernel(const __grid_constant__ PairRegisterMaps maps, const __grid_constant__ Pair p,
                          const __grid_constant__ PairRegisterCut cut) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  PairRegisters<Tile, Parts>(maps, p, cut, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
