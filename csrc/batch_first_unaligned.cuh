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
#include "unaligned_fetch.cuh"
#include "unaligned_output.cuh"
#include "unaligned_tile.cuh"
#include "wgmma.cuh"

namespace structlayers {

template <typename Tile_>
class BatchFirstUnaligned : UnalignedOutput<UnalignedFetch<UnalignedFrame<Tile_>>> {
  using Base = UnalignedOutput<UnalignedFetch<UnalignedFrame<Tile_>>>;
  using typename Base::Tile, typename Base::T, typename Base::Place, typename Base::Accumulators;
  using Base::place, Base::p, Base::s, Base::tn, Base::tj, Base::w_part, Base::w_block, Base::steps, Base::w_base, Base::x_base, Base::x_slot,
      Base::x_full, Base::x_empty, Base::lane, Base::group, Base::warp, Base::my_j, Base::my_row, Base::row, Base::block_features, Base::first_of_two,
      Base::DL, Base::WJ, Base::XK, Base::Size, Base::E;
  using Base::copy_x, Base::load_w, Base::finish;

  // ---- 16 bits: x from shared memory to registers, and the products

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
        upper[q][r] = Tile::Split ? upper_part(exact) : rounded_by_cutting(exact);
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

  // ---- the warpgroups that multiply

  __device__ __forceinline__ void sync_consumers() const { sync_threads(1, Tile::Consumers); }

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
  using Base::Base;

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
