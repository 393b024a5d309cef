// Two chainable factors in one pass: the intermediate stays in the shared memory of a CTA, or of a cluster (sm_90a, 16-bit,
// batch-first).
//
// Contract: pair.h.
//
// Index map: a tile is 64 rows n of one group i, worked on by a cluster of C CTAs (C = 1, 2, 4, 8). CTA q multiplies by
// the right blocks s of its share of alpha, and by the left blocks l of its share of delta. Two warpgroups multiply, one
// warp fetches. The grid is persistent.
//
//   phase 1, for s (or two s at once where rank = 1), for a run of l:
//       x [n][m] (64 x 64)   *   right [l][rho][m]        -> t[l][n][k], at the CTA that owns l
//   phase 2, for a run of j, for LG neighbouring l:
//       t[l][n][k]           *   left  [l][j][k]           -> y [n][j][l] through shared memory, contiguous runs of l
//
// Both operands of every product are K-major. Weights and x have rows of 64 or 128 bytes, swizzled as the copy engine does it.
// t is [l][k / 8][n][8], each l 16 bytes further than that, so that neighbouring lanes write to other banks, and what a warp
// sends to another CTA are runs of 128 bytes.
//
// Shared memory: t: delta/C * (64 * 2 * (alpha*rank rounded up to t_k) + 16) bytes; stages * stage_bytes; y: 64 rows of pair_y_pitch bytes, once or twice.
// Preconditions (host): compute capability 9.0; 16-byte aligned operands; c, alpha*rank multiples of 8; delta 1, 2, 4 or a
// multiple of 8; C > 1: delta a multiple of 8*C, alpha of C.
// Source: the decomposition of a chainable pair is that of arXiv:2411.04506; the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "pair.h"
#include "product.h"
#include "tile.cuh"
#include "wgmma.cuh"

namespace structlayers {

// How a launch cuts the work; pair_shape (launch_pair.cuh) derives it.
struct PairShape {
  int cluster, own_alpha, own_delta;
  int x_k, t_k;                        // elements of K in a row of a tile: 32 or 64
  int rank_magic, owner_magic;         // column / ranks = column * rank_magic >> 16; l / own_delta likewise
  int ranks, runs, rank_tiles, run_tiles;  // rho and l in a tile of right, and how many of them
  int x_steps, t_blocks;               // tiles of K
  int left_l, left_j;                  // l (LG of the kernel) and j in a tile of left
  bool flat_x;                         // x is fetched by features, not by blocks: logical padding
  bool two_areas;                      // y passes through two areas of shared memory in turn
  int stages, stage_bytes, t_stride, t_bytes, y_bytes;  // t_stride: from t[l] to t[l + 1]
};

struct PairMaps {
  CUtensorMap x, right, left;
};

// Bytes of a row of y in shared memory: its `rows` elements, and what puts the rows of eight lanes into different banks.
__host__ __device__ constexpr int pair_y_pitch(int rows, int left_l) {
  const int elements = left_l == 1 ? rows / 2 : rows;
  return (elements * 2 + 127) / 128 * 128 + (left_l == 4 ? 32 : left_l == 8 ? 64 : 16);
}

constexpr int kPairChunk = 64 * 16;  // bytes of 8 neighbouring k of t: 64 rows of 16 bytes
constexpr int kPairRows = 64, kPairConsumers = 256, kPairThreads = kPairConsumers + 32;

// The link rank. Of 1 and 2, 8 neighbours in k are gathered before they leave for t; of a multiple of 8, the 8 columns that a
// warp holds together lie in one l; other even ranks leave by two, odd ones one by one.
enum class Rank { kOne, kTwo, kEights, kEven, kOdd };

// Rows1: columns of right in a stage. Rows2: rows of left in a stage. LW: values of l that a thread holds together. LG: neighbouring l that
// leave together; where it is 2 * LW, each warpgroup holds half of them, else half of the values of j.
template <typename T, int Rows1, int Rows2, int LW, int LG, Rank R, bool Clustered>
class PairKernel {
  static constexpr int SP = R == Rank::kOne ? 2 : 1;  // values of s at once
  static constexpr int N1 = Rows1 / 2 / SP, N2 = Rows2 / 2 / LW, Columns = Rows1 / SP;
  static constexpr bool Gathers = R == Rank::kOne || R == Rank::kTwo;
  static constexpr int Chunk = R == Rank::kOne ? 8 : R == Rank::kTwo ? 4 : 1;  // values of s that leave for t together
  static constexpr bool SplitsL = LG == 2 * LW;
  static_assert(N2 >= 8 && N1 >= 32 && (LG == LW || SplitsL));

  const PairMaps& maps;
  const Pair& p;
  const PairShape& s;
  const uint32_t shared;
  const int rank = cluster_rank();
  const int x_row = s.x_k * 2, t_row = s.t_k * 2;
  const uint32_t stages = shared + s.t_bytes, staging = stages + s.stages * s.stage_bytes;
  const uint32_t full = staging + s.y_bytes, empty = full + 8 * s.stages, t_full = empty + 8 * s.stages, t_empty = t_full + 8;
  const unsigned n_tiles = static_cast<unsigned>((p.n + kPairRows - 1) / kPairRows) * p.groups;
  const unsigned clusters = gridDim.x / s.cluster, first = blockIdx.x / s.cluster;

  // The half of a wgmma descriptor that says where; it moves by 2 for every 16 of K.
  __device__ static __forceinline__ uint32_t descriptor(uint32_t address) { return static_cast<uint32_t>(wgmma_descriptor<128>(address)); }

  __device__ __forceinline__ int tiles_j() const { return (p.b + s.left_j - 1) / s.left_j; }

  // ---- the warp that fetches

  __device__ __forceinline__ uint32_t acquire(const Ring& ring, uint32_t bytes) const {
    barrier_wait(empty + 8 * ring.slot, ring.parity ^ 1);
    barrier_expect(full + 8 * ring.slot, bytes);
    return stages + ring.slot * s.stage_bytes;
  }

  __device__ __forceinline__ void fetch_right(Ring& ring, int i, int n0, int s0, int s_end, int run, int rho) const {
    const int x_bytes = kPairRows * x_row, right_bytes = s.ranks * s.runs * x_row;
    for (int step = 0; step < s.x_steps; ++step) {
      const uint32_t stage = acquire(ring, SP * (x_bytes + right_bytes)), barrier = full + 8 * ring.slot;
#pragma unroll
      for (int u = 0; u < SP; ++u) {
        // Past the last s, the last one again: its products are not used.
        const int block = i * p.alpha + min(s0 + u, s_end - 1), k = step * s.x_k;
        if (s.flat_x) copy_box(stage + u * x_bytes, maps.x, barrier, block * p.c + k, 0, n0);
        else copy_box(stage + u * x_bytes, maps.x, barrier, k, block, n0);
        copy_box(stage + SP * x_bytes + u * Columns * x_row, maps.right, barrier, k, rho * s.ranks, run * s.runs, block);
      }
      ring.advance(s.stages);
    }
  }

  __device__ __forceinline__ void fetch() const {
    Ring ring;
    const int s_end = (rank + 1) * s.own_alpha;
    for (unsigned tile = first; tile < n_tiles; tile += clusters) {
      const int i = tile % p.groups, n0 = tile / p.groups * kPairRows;
      for (int chunk = rank * s.own_alpha; chunk < s_end; chunk += Chunk) {
        for (int run = 0; run < s.run_tiles; ++run) {
          for (int s0 = chunk; s0 < min(chunk + Chunk, s_end); s0 += SP) {
            for (int rho = 0; rho < s.rank_tiles; ++rho) fetch_right(ring, i, n0, s0, s_end, run, rho);
          }
        }
      }
      for (int jt = 0; jt < tiles_j(); ++jt) {
        for (int l = 0; l < s.own_delta; l += s.left_l) {
          for (int kb = 0; kb < s.t_blocks; ++kb) {
            const uint32_t stage = acquire(ring, Rows2 * t_row);
            copy_box(stage, maps.left, full + 8 * ring.slot, kb * s.t_k, jt * s.left_j, rank * s.own_delta + l, i);
            ring.advance(s.stages);
          }
        }
      }
    }
  }

  // ---- the warpgroups that multiply

  // The shuffle tells the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int row = warp * 16 + lane / 4;  // of the accumulators, and the row 8 below

  __device__ __forceinline__ void release(int stage) const {
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  }

  // Tells every CTA of the cluster that t was written, or that it was read.
  __device__ __forceinline__ void arrive_everywhere(uint32_t barrier) const {
    __syncwarp();
    if constexpr (Clustered) {
      if (lane < s.cluster) barrier_arrive_cluster(map_to_cta(barrier, lane));
    } else {
      if (lane == 0) barrier_arrive(barrier);
    }
  }

  __device__ __forceinline__ void wait_for_everybody(uint32_t barrier, uint32_t parity) const {
    if constexpr (Clustered) barrier_wait_cluster(barrier, parity);
    else barrier_wait(barrier, parity);
  }

  // Between ordinary stores to t and the tensor cores' reads of it.
  __device__ static __forceinline__ void fence_t() {
    if constexpr (Clustered) asm volatile("fence.proxy.async;\n" ::: "memory");
    else fence_shared_for_wgmma();
  }


  // Where t[l] begins, at the CTA that holds it.
  __device__ __forceinline__ uint32_t t_of(int l) const {
    int owner = 0;
    if constexpr (Clustered) {
      owner = l * s.owner_magic >> 16;
      l -= owner * s.own_delta;
    }
    const uint32_t base = shared + l * s.t_stride;
    if constexpr (Clustered) return map_to_cta(base, owner);
    else return base;
  }

  // From the beginning of t[l] to element k of this thread's row.
  __device__ __forceinline__ uint32_t t_offset(int k) const { return (k >> 3) * kPairChunk + row * 16 + (k & 7) * 2; }

  __device__ static __forceinline__ void store_t_4(uint32_t place, uint32_t v) {
    if constexpr (Clustered) store_cluster_4(place, v);
    else store_shared_4(place, v);
  }

  __device__ static __forceinline__ void store_t_16(uint32_t place, const uint32_t (&v)[4]) {
    if constexpr (Clustered) store_cluster_16(place, v);
    else store_shared_16(place, v);
  }

  __device__ static __forceinline__ void store_t_2(uint32_t place, uint32_t v) {
    if constexpr (Clustered) store_cluster_2(place, v);
    else store_shared_element<2>(place, v);
  }

  static constexpr uint32_t below = 8 * 16;  // from a row of t to the row 8 below
  static constexpr int Held = Gathers ? N1 / 8 * SP * 2 : 1;  // pairs (row, l) of a thread

  // Two neighbours in k for every (row, l) that this thread holds, of the `part`-th of four pairs.
  __device__ __forceinline__ void gather(uint32_t (&held)[Held][4], const float (&acc)[SP][N1 / 8][4], int part, bool second) const {
#pragma unroll
    for (int g = 0; g < N1 / 8; ++g) {
#pragma unroll
      for (int e = 0; e < 2 * SP; ++e) {
        // Rank 1: e is (half, column), the two s are neighbours in k. Rank 2: e is the half, the two columns are.
        if constexpr (R == Rank::kOne) held[g * 4 + e][part] = pack_two<T>(acc[0][g][e], second ? acc[1][g][e] : 0.f);
        else held[g * 2 + e][part] = pack_two<T>(acc[0][g][2 * e], acc[0][g][2 * e + 1]);
      }
    }
  }

  __device__ __forceinline__ void write_gathered(const uint32_t (&held)[Held][4], int chunk, int l0) const {
    constexpr int Lefts = R == Rank::kOne ? 8 : 4;  // values of l in 8 columns; one CTA owns them all
    const int end = min(s.runs, p.delta - l0), mine = lane % 4 * SP;
    const uint32_t offset = t_offset(chunk * p.rank) + mine * s.t_stride;
#pragma unroll
    for (int g = 0; g < N1 / 8; ++g) {
      const int l = (group * (N1 / 8) + g) * Lefts;
      if (l >= end) break;
      const uint32_t place = t_of(l0 + l) + offset;
#pragma unroll
      for (int odd = 0; odd < SP; ++odd) {
        if (l + mine + odd >= end) continue;
        store_t_16(place + odd * s.t_stride, held[g * 2 * SP + odd]);
        store_t_16(place + odd * s.t_stride + below, held[g * 2 * SP + SP + odd]);
      }
    }
  }

  __device__ __forceinline__ void write_t(const float (&acc)[SP][N1 / 8][4], int s0, int l0, int rho0) const {
    const int column0 = group * N1 + lane % 4 * 2, columns = s.ranks * s.runs, k0 = s0 * p.rank + rho0;
    if constexpr (R == Rank::kEights) {
#pragma unroll
      for (int g = 0; g < N1 / 8; ++g) {
        const int column = group * N1 + g * 8, dl = column * s.rank_magic >> 16, rho = column - dl * s.ranks;
        if (column >= columns || l0 + dl >= p.delta || rho0 + rho >= p.rank) break;
        const uint32_t place = t_of(l0 + dl) + t_offset(k0 + rho) + lane % 4 * 4;
        store_t_4(place, pack_two<T>(acc[0][g][0], acc[0][g][1]));
        store_t_4(place + below, pack_two<T>(acc[0][g][2], acc[0][g][3]));
      }
    } else {
#pragma unroll
      for (int g = 0; g < N1 / 8; ++g) {
        // Of an odd rank the two columns may lie in different l, and never form an aligned pair.
#pragma unroll
        for (int odd = 0; odd < (R == Rank::kOdd ? 2 : 1); ++odd) {
          const int column = column0 + g * 8 + odd, dl = column * s.rank_magic >> 16, rho = column - dl * s.ranks;
          if (column >= columns || l0 + dl >= p.delta || rho0 + rho >= p.rank) continue;
          const uint32_t place = t_of(l0 + dl) + t_offset(k0 + rho);
          if constexpr (R == Rank::kEven) {
            store_t_4(place, pack_two<T>(acc[0][g][0], acc[0][g][1]));
            store_t_4(place + below, pack_two<T>(acc[0][g][2], acc[0][g][3]));
          } else {
            store_t_2(place, pack_two<T>(acc[0][g][odd], 0.f));
            store_t_2(place + below, pack_two<T>(acc[0][g][2 + odd], 0.f));
          }
        }
      }
    }
  }

  // Products of one stage, 16 of K at a time; one straight line, which the compiler needs to keep them in flight together.
  // From one step to the next, a moves by AStep bytes; AHigh is the upper half of its descriptors, 0 where it is as b's.
  template <int Steps, int N, int AStep = 32, uint32_t AHigh = 0, int Tiles>
  __device__ static __forceinline__ void multiply_tile(float (&acc)[Tiles][N / 8][4], const uint32_t (&a)[Tiles],
                                                       const uint32_t (&b)[Tiles], bool fresh) {
    constexpr uint64_t BMode = wgmma_descriptor<Steps * 32>(0) >> 32 << 32, AMode = AHigh == 0 ? BMode : uint64_t{AHigh} << 32;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Steps; ++k)
#pragma unroll
      for (int u = 0; u < Tiles; ++u) Wgmma<T, N>::multiply(acc[u], AMode | (a[u] + (AStep >> 4) * k), BMode | (b[u] + 2 * k), fresh && k == 0);
    wgmma_commit();
  }

  // The products of `steps` stages. Those of a second one begin while those of the first are under way, unless that would
  // leave too few stages to fetch into.
  template <typename Issue>
  __device__ __forceinline__ void multiply_stages(Ring& ring, int steps, const Issue& issue) const {
    int step = 0;
    if (s.stages > 3) {
#pragma unroll 1
      for (; step + 1 < steps; step += 2) {
        const int first = ring.slot;
        barrier_wait(full + 8 * ring.slot, ring.parity);
        issue(step, stages + ring.slot * s.stage_bytes);
        ring.advance(s.stages);
        barrier_wait(full + 8 * ring.slot, ring.parity);
        issue(step + 1, stages + ring.slot * s.stage_bytes);
        wgmma_wait<1>();
        release(first);
        wgmma_wait();
        release(ring.slot);
        ring.advance(s.stages);
      }
    }
#pragma unroll 1
    for (; step < steps; ++step) {
      barrier_wait(full + 8 * ring.slot, ring.parity);
      issue(step, stages + ring.slot * s.stage_bytes);
      wgmma_wait();
      release(ring.slot);
      ring.advance(s.stages);
    }
  }

  __device__ __forceinline__ void multiply_right(Ring& ring, float (&acc)[SP][N1 / 8][4]) const {
    multiply_stages(ring, s.x_steps, [&](int step, uint32_t stage) {
      const uint32_t x = stage, w = x + SP * kPairRows * x_row + group * N1 * x_row;
      uint32_t x_tile[SP], w_tile[SP];
#pragma unroll
      for (int u = 0; u < SP; ++u) {
        x_tile[u] = descriptor(x + u * kPairRows * x_row);
        w_tile[u] = descriptor(w + u * Columns * x_row);
      }
      if (x_row == 128) multiply_tile<4, N1>(acc, x_tile, w_tile, step == 0);
      else multiply_tile<2, N1>(acc, x_tile, w_tile, step == 0);
    });
  }

  // Phase 1 for one run of l: the values of s from `chunk` on that leave together.
  __device__ __forceinline__ void fill_t(Ring& ring, int chunk, int s_end, int l0) const {
    float acc[SP][N1 / 8][4];
    if constexpr (Gathers) {
      uint32_t held[Held][4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int s0 = chunk + part * SP;
        if (s0 < s_end) {
          multiply_right(ring, acc);
          gather(held, acc, part, s0 + 1 < s_end);
        } else {
#pragma unroll
          for (int h = 0; h < Held; ++h) held[h][part] = 0;
        }
      }
      write_gathered(held, chunk, l0);
    } else {
      for (int rho = 0; rho < s.rank_tiles; ++rho) {
        multiply_right(ring, acc);
        write_t(acc, chunk, l0, rho * s.ranks);
      }
    }
  }

  // The accumulators begin with the bias.
  __device__ __forceinline__ void load_bias(float (&acc)[LW][N2 / 8][4], int i, int j0, int l0) const {
    const int64_t first_feature = (static_cast<int64_t>(i) * p.b + j0) * p.delta + l0;
#pragma unroll
    for (int g = 0; g < N2 / 8; ++g) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int j = g * 8 + lane % 4 * 2 + odd;
        const int64_t feature = first_feature + static_cast<int64_t>(j) * p.delta;
#pragma unroll
        for (int u = 0; u < LW; ++u) {
          const bool inside = j0 + j < p.b && feature + u < p.out_features;
          const float bias = inside ? to_float(static_cast<const T*>(p.bias)[feature + u]) : 0.f;
          acc[u][g][odd] = bias;
          acc[u][g][2 + odd] = bias;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_left(Ring& ring, int i, int64_t n0, int j0, int l_own, bool last, int turn) const {
    float acc[LW][N2 / 8][4];
    const bool biased = p.bias != nullptr;
    const int l_mine = SplitsL ? group * LW : 0, j_mine = SplitsL ? 0 : group * N2, l0 = rank * s.own_delta + l_own;
    const int t_step = s.t_stride >> 4, w_step = s.left_j * t_row >> 4;
    if (biased) load_bias(acc, i, j0 + j_mine, l0 + l_mine);
    multiply_stages(ring, s.t_blocks, [&](int kb, uint32_t stage) {
      uint32_t w_tiles[LW], t_tiles[LW];
      w_tiles[0] = descriptor(stage + (l_mine * s.left_j + j_mine) * t_row);
      const uint32_t t = shared + (l_own + l_mine) * s.t_stride + kb * (s.t_k / 8 * kPairChunk);
      t_tiles[0] = (t & 0x3ffff) >> 4 | kPairChunk >> 4 << 16;
#pragma unroll
      for (int u = 1; u < LW; ++u) {
        w_tiles[u] = w_tiles[0] + u * w_step;
        t_tiles[u] = t_tiles[0] + u * t_step;
      }
      // t is not swizzled: 8 rows of 16 bytes lie together, the next 8 rows behind them, the next 8 of k a chunk further.
      constexpr uint32_t Next8Rows = 8 * 16 >> 4;
      if (t_row == 128) multiply_tile<4, N2, 2 * kPairChunk, Next8Rows>(acc, t_tiles, w_tiles, kb == 0 && !biased);
      else multiply_tile<2, N2, 2 * kPairChunk, Next8Rows>(acc, t_tiles, w_tiles, kb == 0 && !biased);
    });
    if (last) arrive_everywhere(t_empty);
    write_y(acc, i, n0, j0 + j_mine, l0, turn);
  }

  __device__ __forceinline__ void write_y(const float (&acc)[LW][N2 / 8][4], int i, int64_t n0, int j0, int l0, int turn) const {
    // In shared memory a row is [half][j][LW], the halves of the two warpgroups, or just [j] of one.
    constexpr int Elements = SplitsL ? Rows2 : Rows2 / 2, Pitch = pair_y_pitch(Rows2, LG), Threads = SplitsL ? 256 : 128;
    const int barrier = SplitsL ? 3 : 1 + group;
    const uint32_t area = staging + turn * (s.y_bytes >> 1) + (SplitsL ? 0 : group * (kPairRows * Pitch));
    const uint32_t corner = area + row * Pitch + (SplitsL ? group * Elements : 0) + lane % 4 * (4 * LW);
    // Everybody has read what was here before: with two areas, before the last barrier.
    if (!s.two_areas) sync_threads(barrier, Threads);
#pragma unroll
    for (int g = 0; g < N2 / 8; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Two neighbouring j, LW values of l each.
        uint32_t v[LW];
        if constexpr (LW == 1) {
          v[0] = pack_two<T>(acc[0][g][2 * half], acc[0][g][2 * half + 1]);
        } else {
#pragma unroll
          for (int w = 0; w < LW; ++w) {
            const int odd = w / (LW / 2), u = w % (LW / 2) * 2;
            v[w] = pack_two<T>(acc[u][g][2 * half + odd], acc[u + 1][g][2 * half + odd]);
          }
        }
        const uint32_t place = corner + half * 8 * Pitch + g * (16 * LW);
        if constexpr (LW == 1) {
          store_shared_4(place, v[0]);
        } else if constexpr (LW == 2) {
          store_shared_8(place, v[0], v[1]);
        } else {
#pragma unroll
          for (int w = 0; w < LW; w += 4) {
            const uint32_t piece[4] = {v[w], v[w + 1], v[w + 2], v[w + 3]};
            store_shared_16(place + w * 4, piece);
          }
        }
      }
    }
    sync_threads(barrier, Threads);
    // A thread writes one 16-byte piece of every RowStep-th row.
    constexpr int Pieces = Elements / 8, RowStep = Threads / Pieces;
    const int thread = threadIdx.x % Threads, e = thread % Pieces * 8, j = j0 + e / LG;
    if (j >= p.b || thread >= RowStep * Pieces) return;
    const int64_t feature = (static_cast<int64_t>(i) * p.b + j) * p.delta + l0 + e % LG;
    const int64_t left = LG >= 8 ? int64_t{8} : static_cast<int64_t>(p.b - j) * LG;
    const int valid = static_cast<int>(min(min(left, p.out_features - feature), int64_t{8}));
    const bool whole = p.y_aligned && feature % 8 == 0 && valid == 8;
    const int rows = static_cast<int>(min(p.n - n0, int64_t{kPairRows}));
    T* destination = static_cast<T*>(p.y) + (n0 + thread / Pieces) * p.y_stride + feature;
    uint32_t source = area + thread / Pieces * Pitch + (!SplitsL ? e * 2 : LW == 8 ? e / 16 * 16 + e % 16 / 8 * Elements : e);
    if (whole && rows == kPairRows && p.activation == kNone) {
      constexpr int Turns = (kPairRows + RowStep - 1) / RowStep;
      const int last_turn = (kPairRows - 1 - thread / Pieces) / RowStep;
      uint32_t v[Turns][4];
#pragma unroll
      for (int u = 0; u < Turns; ++u)
        if (u < Turns - 1 || u <= last_turn) load_piece(v[u], source + u * RowStep * Pitch);
#pragma unroll
      for (int u = 0; u < Turns; ++u)
        if (u < Turns - 1 || u <= last_turn) store_global_16(destination + u * RowStep * p.y_stride, v[u]);
      return;
    }
#pragma unroll 1
    for (int n = thread / Pieces; n < rows; n += RowStep) {
      uint32_t v[4];
      load_piece(v, source);
      if (p.activation != kNone) activate_piece<T>(v, p.activation);
      if (whole) {
        store_global_16(destination, v);
      } else {
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          const uint16_t bits = static_cast<uint16_t>(v[m / 2] >> (m % 2 * 16));
          if (m < valid) reinterpret_cast<uint16_t*>(destination)[m] = bits;
        }
      }
      destination += RowStep * p.y_stride;
      source += RowStep * Pitch;
    }
  }

  // Eight neighbouring elements of y from the halves of the two warpgroups.
  __device__ static __forceinline__ void load_piece(uint32_t (&v)[4], uint32_t source) {
    if constexpr (!SplitsL || LW == 8) {
      load_shared_16(v, source);
    } else {
      uint32_t low[2], high[2];
      load_shared_8(low, source);
      load_shared_8(high, source + Rows2);
      if constexpr (LW == 4) {
        v[0] = low[0], v[1] = low[1], v[2] = high[0], v[3] = high[1];
      } else if constexpr (LW == 2) {
        v[0] = low[0], v[1] = high[0], v[2] = low[1], v[3] = high[1];
      } else {
#pragma unroll
        for (int m = 0; m < 4; ++m) v[m] = __byte_perm(low[m / 2], high[m / 2], m % 2 ? 0x7632 : 0x5410);
      }
    }
  }

  __device__ __forceinline__ void multiply() const {
    Ring ring;
    uint32_t t_parity = 0;
    int turn = 0;
    for (unsigned tile = first; tile < n_tiles; tile += clusters) {
      const int i = tile % p.groups;
      const int64_t n0 = static_cast<int64_t>(tile / p.groups) * kPairRows;
      // Nobody reads t of the tile before any longer.
      if (tile != first) wait_for_everybody(t_empty, t_parity ^ 1);
      const int s_end = (rank + 1) * s.own_alpha;
      for (int chunk = rank * s.own_alpha; chunk < s_end; chunk += Chunk)
        for (int run = 0; run < s.run_tiles; ++run) fill_t(ring, chunk, s_end, run * s.runs);
      fence_t();
      arrive_everywhere(t_full);
      wait_for_everybody(t_full, t_parity);
      if constexpr (Clustered) fence_t();
      for (int jt = 0; jt < tiles_j(); ++jt) {
        for (int l = 0; l < s.own_delta; l += s.left_l) {
          const bool last = jt + 1 == tiles_j() && l + s.left_l >= s.own_delta;
          multiply_left(ring, i, n0, jt * s.left_j, l, last, turn);
          turn ^= s.two_areas;
        }
      }
      t_parity ^= 1;
    }
  }

 public:
  __device__ PairKernel(const PairMaps& maps, const Pair& p, const PairShape& s, uint32_t shared)
      : maps(maps), p(p), s(s), shared(shared) {}

  __device__ __forceinline__ void run() const {
    // What lies beyond alpha*rank in a row of t stays zero.
    const uint32_t zeros[4] = {0, 0, 0, 0};
    for (int at = threadIdx.x * 16; at < s.t_bytes; at += kPairThreads * 16) store_shared_16(shared + at, zeros);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < s.stages; ++stage) {
        barrier_init(full + 8 * stage, 1);
        barrier_init(empty + 8 * stage, kPairConsumers / 32);
      }
      barrier_init(t_full, s.cluster * (kPairConsumers / 32));
      barrier_init(t_empty, s.cluster * (kPairConsumers / 32));
      barrier_init_fence();
    }
    cluster_sync();
    if (group == kPairConsumers / 128) {
      if (lane == 0) fetch();
      __syncwarp();
    } else {
      multiply();
    }
    // Others may still write to, or arrive in, the shared memory of this CTA.
    cluster_sync();
  }
};

template <typename T, int Rows1, int Rows2, int LW, int LG, Rank R, bool Clustered>
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_kernel(const __grid_constant__ PairMaps maps, const __grid_constant__ Pair p, const __grid_constant__ PairShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  PairKernel<T, Rows1, Rows2, LW, LG, R, Clustered>(maps, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
