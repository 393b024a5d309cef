// Weight gradient of one Kronecker-sparse factor on Hopper's tensor cores (wgmma, sm_90a), 16-bit, batch-first, where all l of
// the pattern lie together in a run: d = 2, 4, 8.
//
// Contract: weight_grad.h. Any a, b, N < 2^31, c a multiple of 8; float32 accumulation in the tensor core; the same bits in every run.
// What the host promises: launch_weight_grad_hopper.cuh.
//
// Index map: a CTA owns one i, all d = DL values of l, TJ = 128 values of j and TK of k, and the rows n of one split; it walks
// over its rows, Rows a step. CTAs of a cluster are neighbours in k: each fetches a part of what all of them take in of dy.
//
//   raw dy, raw x    boxes of 128 bytes of every row [j][l], [k][l], 16-byte pieces swizzled by the row, as the copy engine writes
//   separated x      for every l: rows n of TK values of k (boxes of up to 64), swizzled likewise; wgmma reads it transposed
//
// n is the "K" of the product. dy goes to registers, the first operand: two warpgroups of 64 j each; a thread reads two
// values of j (all l) of rows 2t, 2t + 1, 2t + 8, 2t + 9, and permutes pairs of rows into pairs of n. A third warpgroup
// separates x by l, where rows stay rows, and a fourth fetches.
//
// Shared memory: DyStages * DyBytes + XStages * XBytes + SeparatedStages * XBytes + BarrierBytes.
// Source: new.
#pragma once

#include "asynchronous.cuh"
#include "tile.cuh"
#include "weight_grad.h"
#include "wgmma.cuh"

namespace structlayers {

template <typename T_, int DL_, int Cluster_>
struct HopperGradTile {
  using T = T_;
  static constexpr int DL = DL_, Cluster = Cluster_, TJ = 128, TK = 256 / DL, Rows = DL == 8 ? 16 : 32, Parts = Rows / 16;
  static constexpr int Threads = 512, BoxBytes = Rows * 128, DyBoxes = TJ * DL / 64, XBoxes = TK * DL / 64;
  static constexpr int DyBytes = DyBoxes * BoxBytes, XBytes = XBoxes * BoxBytes;
  static constexpr int DyStages = DL == 2 ? 5 : 4, XStages = DL == 2 ? 4 : DL == 4 ? 3 : 6, SeparatedStages = XStages;
  // Separated x: bytes of a row of one box, values of k in a box, bytes of one l.
  static constexpr int RowBytes = TK < 64 ? TK * 2 : 128, BoxK = RowBytes / 2, LBytes = Rows * TK * 2;
  // Sums leave in boxes of so many values of k.
  template <typename Out>
  static constexpr int OutK = TK * sizeof(Out) < 128 ? TK : 128 / sizeof(Out);
  static constexpr int BarrierBytes = 2 * (DyStages + XStages + SeparatedStages) * 8;
  static constexpr int SharedBytes = DyStages * DyBytes + (XStages + SeparatedStages) * XBytes + BarrierBytes;
  static_assert((DL == 2 || DL == 4 || DL == 8) && DyBoxes % Cluster == 0 && SharedBytes <= 227 * 1024);
  static_assert(4 * DL * TJ * TK <= SharedBytes - BarrierBytes);
};

struct HopperGradMaps {
  CUtensorMap dy, x;  // [n][1][features], boxes of 64 features and Rows rows
  CUtensorMap out;    // partial sums, or dw: [split][i] in one dimension, [l][j][k], boxes of 16 j
};

template <typename Tile>
class HopperGradKernel {
  using T = typename Tile::T;
  static constexpr int DL = Tile::DL, TK = Tile::TK, Rows = Tile::Rows;

  const HopperGradMaps& maps;
  const WeightGrad& p;
  const uint32_t shared;
  const uint32_t x_base = shared + Tile::DyStages * Tile::DyBytes, separated_base = x_base + Tile::XStages * Tile::XBytes;
  const uint32_t dy_full = separated_base + Tile::SeparatedStages * Tile::XBytes, dy_empty = dy_full + 8 * Tile::DyStages;
  const uint32_t x_full = dy_empty + 8 * Tile::DyStages, x_empty = x_full + 8 * Tile::XStages;
  const uint32_t separated_full = x_empty + 8 * Tile::XStages, separated_empty = separated_full + 8 * Tile::SeparatedStages;
  // The shuffles tell the compiler that a warp agrees on it.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  // The corner of this CTA's tile, its split and its steps.
  int i, j0, k0, steps;
  unsigned split;
  int n0;

  // ---- the threads that fetch

  __device__ __forceinline__ void fetch_dy() const {
    const int rank = Tile::Cluster == 1 ? 0 : static_cast<int>(cluster_rank()), feature = (i * p.dy.block + j0) * DL;
    Ring ring;
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = dy_full + 8 * ring.slot;
      barrier_wait(dy_empty + 8 * ring.slot, ring.parity ^ 1);
      barrier_expect(full, Tile::DyBytes);
#pragma unroll
      for (int q = 0; q < Tile::DyBoxes / Tile::Cluster; ++q) {
        const int box = q * Tile::Cluster + rank;
        const uint32_t destination = shared + ring.slot * Tile::DyBytes + box * Tile::BoxBytes;
        if constexpr (Tile::Cluster == 1) copy_box(destination, maps.dy, full, feature + box * 64, 0, n0 + step * Rows);
        else copy_box_to((1 << Tile::Cluster) - 1, destination, maps.dy, full, feature + box * 64, 0, n0 + step * Rows);
      }
      ring.advance(Tile::DyStages);
    }
  }

  __device__ __forceinline__ void fetch_x() const {
    const int feature = (i * p.x.block + k0) * DL;
    Ring ring;
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = x_full + 8 * ring.slot;
      barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
      barrier_expect(full, Tile::XBytes);
#pragma unroll
      for (int box = 0; box < Tile::XBoxes; ++box) {
        copy_box(x_base + ring.slot * Tile::XBytes + box * Tile::BoxBytes, maps.x, full, feature + box * 64, 0, n0 + step * Rows);
      }
      ring.advance(Tile::XStages);
    }
  }

  // ---- the warpgroup that separates x

  // 8 values of k of row `row`, all l: DL pieces become a piece for every l.
  __device__ __forceinline__ void separate_unit(uint32_t raw_slot, uint32_t slot, int row, int unit) const {
    uint32_t raw[DL][4];
    const int chunk = unit * DL;
    const uint32_t line = raw_slot + chunk / 8 * Tile::BoxBytes + row * 128;
#pragma unroll
    for (int m = 0; m < DL; ++m) load_shared_16(raw[m], line + (((chunk % 8 + m) ^ (row & 7)) << 4));
    const uint32_t box = slot + unit * 8 / Tile::BoxK * (Rows * Tile::RowBytes);
    const uint32_t place = box + swizzled<Tile::RowBytes / 16>(row, unit % (Tile::BoxK / 8));
#pragma unroll
    for (int l = 0; l < DL; ++l) {
      uint32_t out[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int first = (2 * r * DL + l) / 2, second = ((2 * r + 1) * DL + l) / 2;
        out[r] = __byte_perm(raw[first / 4][first % 4], raw[second / 4][second % 4], l % 2 ? 0x7632 : 0x5410);
      }
      store_shared_16(place + l * Tile::LBytes, out);
    }
  }

  __device__ __forceinline__ void separate_x() const {
    constexpr int Units = Rows * TK / 8;
    Ring in, out;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_wait(x_full + 8 * in.slot, in.parity);
      barrier_wait(separated_empty + 8 * out.slot, out.parity ^ 1);
#pragma unroll
      for (int q = 0; q < (Units + 127) / 128; ++q) {
        const int unit = q * 128 + warp * 32 + lane;
        if (Units % 128 != 0 && unit >= Units) break;
        separate_unit(x_base + in.slot * Tile::XBytes, separated_base + out.slot * Tile::XBytes, unit % Rows, unit / Rows);
      }
      fence_shared_for_wgmma();
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(x_empty + 8 * in.slot);
        barrier_arrive(separated_full + 8 * out.slot);
      }
      in.advance(Tile::XStages);
      out.advance(Tile::SeparatedStages);
    }
  }

  // ---- the warpgroups that multiply

  using Accumulators = float[DL][TK / 8][4];
  using Operands = uint32_t[DL][4];

  // 16 rows of dy: rows 2t, 2t + 1, 2t + 8, 2t + 9, of the two values of j of this thread: 2g and 2g + 1, or g and g + 8 (DL = 8)
  // of the 16 of its warp. They become rows g and g + 8 of the first operand.
  __device__ __forceinline__ void load_dy(Operands& a, uint32_t slot, int part) const {
    const int g = lane / 4, t = lane % 4;
    uint32_t raw[4][DL];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = 2 * t + r % 2;
      const uint32_t line = slot + row * 128 + (part * 16 + r / 2 * 8) * 128;
      if constexpr (DL == 2) {
        const int chunk = warp % 2 * 4 + g / 2;
        load_shared_8(raw[r], line + (group * 2 + warp / 2) * Tile::BoxBytes + ((chunk ^ row) << 4) + g % 2 * 8);
      } else if constexpr (DL == 4) {
        load_shared_16(raw[r], line + (group * 4 + warp) * Tile::BoxBytes + ((g ^ row) << 4));
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v[4];
          load_shared_16(v, line + ((group * 4 + warp) * 2 + half) * Tile::BoxBytes + ((g ^ row) << 4));
#pragma unroll
          for (int m = 0; m < 4; ++m) raw[r][half * 4 + m] = v[m];
        }
      }
    }
#pragma unroll
    for (int l = 0; l < DL; ++l) {
      const unsigned pair = l % 2 ? 0x7632 : 0x5410;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = (half * DL + l) / 2;
        a[l][half] = __byte_perm(raw[0][m], raw[1][m], pair);
        a[l][2 + half] = __byte_perm(raw[2][m], raw[3][m], pair);
      }
    }
    // All operands are ready before the first product: none is written once products are under way.
#pragma unroll
    for (int l = 0; l < DL; ++l) asm volatile("" : "+r"(a[l][0]), "+r"(a[l][1]), "+r"(a[l][2]), "+r"(a[l][3])::"memory");
  }

  __device__ __forceinline__ void release_dy(int slot) const {
    __syncwarp();
    if constexpr (Tile::Cluster == 1) {
      if (lane == 0) barrier_arrive(dy_empty + 8 * slot);
    } else {
      if (lane < Tile::Cluster) barrier_arrive_remote(map_to_cta(dy_empty + 8 * slot, lane));
    }
  }

  __device__ __forceinline__ void products(Accumulators& acc, const Operands& a, uint32_t slot, int part) const {
    wgmma_fence();
#pragma unroll
    for (int l = 0; l < DL; ++l) {
      const uint32_t place = slot + l * Tile::LBytes + part * 16 * Tile::RowBytes;
      uint64_t b;
      if constexpr (TK > Tile::BoxK) b = wgmma_descriptor_wide(place, Rows * Tile::RowBytes);
      else b = wgmma_descriptor<Tile::RowBytes>(place);
      WgmmaRegisters<T, TK, true>::multiply(acc[l], a[l], b, false);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply(Accumulators& acc) const {
    Ring dy, x;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t dy_slot = shared + dy.slot * Tile::DyBytes, x_slot = separated_base + x.slot * Tile::XBytes;
      Operands a[Tile::Parts];
      barrier_wait(dy_full + 8 * dy.slot, dy.parity);
      load_dy(a[0], dy_slot, 0);
      barrier_wait(separated_full + 8 * x.slot, x.parity);
#pragma unroll
      for (int part = 0; part < Tile::Parts; ++part) {
        products(acc, a[part], x_slot, part);
        if (part + 1 < Tile::Parts) load_dy(a[part + 1], dy_slot, part + 1);
        else release_dy(dy.slot);
      }
      wgmma_wait();
      if (lane == 0) barrier_arrive(separated_empty + 8 * x.slot);
      dy.advance(Tile::DyStages);
      x.advance(Tile::SeparatedStages);
    }
  }

  // The 16 values of j of a warp, every l by itself, to shared memory as boxes of OutK values of k, which the copy engine writes.
  template <typename Out>
  __device__ __forceinline__ void write_sums(const Accumulators& acc) const {
    constexpr int OutK = Tile::template OutK<Out>, RowBytes = OutK * sizeof(Out), OutBoxBytes = 16 * RowBytes, Boxes = TK / OutK;
    const uint32_t area = shared + (group * 4 + warp) * (DL * Boxes * OutBoxBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = DL == 8 ? lane / 4 + 8 * half : lane / 4 * 2 + half, t = lane % 4;
#pragma unroll
      for (int q = 0; q < OutK / 8; ++q) {
        const int byte = (q * 8 + 2 * t) * static_cast<int>(sizeof(Out));
        const uint32_t place = area + swizzled<RowBytes / 16>(row, byte / 16) + byte % 16;
#pragma unroll
        for (int l = 0; l < DL; ++l) {
#pragma unroll
          for (int box = 0; box < Boxes; ++box) {
            const float v0 = acc[l][box * (OutK / 8) + q][2 * half], v1 = acc[l][box * (OutK / 8) + q][2 * half + 1];
            const uint32_t to = place + (l * Boxes + box) * OutBoxBytes;
            if constexpr (sizeof(Out) == 4) store_shared_8(to, __float_as_uint(v0), __float_as_uint(v1));
            else store_shared_4(to, pack_two<Out>(v0, v1));
          }
        }
      }
    }
    fence_shared_for_wgmma();
    __syncwarp();
    if (lane == 0) {
      const int j = j0 + group * 64 + warp * 16;
      for (int q = 0; q < DL * Boxes; ++q) {
        store_box(maps.out, area + q * OutBoxBytes, k0 + q % Boxes * OutK, j, q / Boxes, static_cast<int>(split) * p.a + i);
      }
      store_box_commit();
      store_box_wait_read();
    }
    __syncwarp();
  }

 public:
  __device__ __forceinline__ HopperGradKernel(const HopperGradMaps& maps_, const WeightGrad& p_, uint32_t base)
      : maps(maps_), p(p_), shared(base) {
    // CTAs that read the same rows run together: tiles of one split are neighbours. Whole clusters cover k.
    const unsigned tiles_k = (p.x.block + TK * Tile::Cluster - 1) / (TK * Tile::Cluster) * Tile::Cluster;
    const unsigned tiles_j = (p.dy.block + Tile::TJ - 1) / Tile::TJ;
    unsigned tile = blockIdx.x;
    k0 = static_cast<int>(tile % tiles_k) * TK;
    tile /= tiles_k;
    j0 = static_cast<int>(tile % tiles_j) * Tile::TJ;
    tile /= tiles_j;
    i = static_cast<int>(tile % p.a);
    split = tile / p.a;
    const int64_t first = split * p.rows_per_split;
    n0 = static_cast<int>(min(first, p.n));
    steps = static_cast<int>((min(p.n - n0, p.rows_per_split) + Rows - 1) / Rows);
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      prefetch_map(maps.dy);
      prefetch_map(maps.x);
      prefetch_map(maps.out);
      for (int slot = 0; slot < Tile::DyStages; ++slot) {
        barrier_init(dy_full + 8 * slot, 1);
        barrier_init(dy_empty + 8 * slot, 8 * Tile::Cluster);
      }
      for (int slot = 0; slot < Tile::XStages; ++slot) {
        barrier_init(x_full + 8 * slot, 1);
        barrier_init(x_empty + 8 * slot, 4);
      }
      for (int slot = 0; slot < Tile::SeparatedStages; ++slot) {
        barrier_init(separated_full + 8 * slot, 4);
        barrier_init(separated_empty + 8 * slot, 8);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if constexpr (Tile::Cluster > 1) cluster_sync();
    if (group == 3) {
      keep_registers<32>();
      if (lane == 0 && warp == 0) fetch_dy();
      if (lane == 0 && warp == 1) fetch_x();
      __syncwarp();
    } else if (group == 2) {
      keep_registers<Tile::DL == 8 ? 80 : 64>();
      separate_x();
    } else {
      take_registers<Tile::DL == 8 ? 200 : 208>();
      Accumulators acc = {};
      multiply(acc);
      // All that was copied has arrived and been read, once both warpgroups are here.
      sync_threads(1, 256);
      if (p.partial != nullptr) write_sums<float>(acc);
      else write_sums<T>(acc);
    }
    // Nobody leaves while others may still write here.
    if constexpr (Tile::Cluster > 1) cluster_sync();
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    weight_grad_hopper_kernel(const __grid_constant__ HopperGradMaps maps, const __grid_constant__ WeightGrad p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  HopperGradKernel<Tile>(maps, p, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
