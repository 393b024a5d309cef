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
// was measured (VERSIONS.md); the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "float32_fetch.cuh"
#include "float32_output.cuh"
#include "float32_tile.cuh"
#include "product.h"
#include "split.cuh"
#include "wgmma.cuh"

namespace structlayers {

template <typename Tile_>
class Float32Registers : Float32Output<Float32Fetch<Float32Frame<Tile_>>> {
  using Base = Float32Output<Float32Fetch<Float32Frame<Tile_>>>;
  using typename Base::Tile, typename Base::Place, typename Base::Accumulators;
  using Base::place, Base::p, Base::s, Base::shared, Base::steps, Base::w_base, Base::x_full, Base::x_empty, Base::w_raw, Base::w_full, Base::w_empty,
      Base::lane, Base::group, Base::warp, Base::my_j, Base::my_row, Base::row, Base::DL, Base::LW, Base::WJ, Base::TN;
  using Base::finish, Base::fetch_x, Base::copy_x, Base::copy_x_last, Base::fetch_w, Base::copy_w, Base::split_w;
  static constexpr int Parts = Tile::StepK / 16;
  static constexpr bool Split = Tile::Split;

  // ---- x: shared memory to registers

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

  static __device__ __forceinline__ void round_x(Operands& rounded, const Raw& raw, int l) {
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int r = 0; r < 4; ++r) rounded[q][r] = rounded_by_cutting(raw[r % 2][raw_index(2 * q + r / 2, l)]);
    ready(rounded);
  }

  // Before the first product: no operand is written while products are under way.
  static __device__ __forceinline__ void ready(Operands& a) {
#pragma unroll
    for (int q = 0; q < 2; ++q) asm volatile("" : "+r"(a[q][0]), "+r"(a[q][1]), "+r"(a[q][2]), "+r"(a[q][3])::"memory");
  }

  // ---- products

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

 public:
  using Base::Base;

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
      } else if constexpr (Tile::Strided && Tile::Last) {
        copy_x_last();
      } else if constexpr (Tile::Strided) {
        copy_x();
      } else if (warp == 0 && lane == 0) {
        fetch_x();
      }
      __syncwarp();
    } else {
      keep_registers<40>();
      if (!p.w_aligned) copy_w(threadIdx.x % 128);
      else if constexpr (Split) split_w(threadIdx.x % 128);
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
