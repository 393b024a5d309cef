// Batch-last product with one Kronecker-sparse factor on Hopper, 16-bit types: one product of matrices for every i and l, w from
// shared memory to the registers that wgmma takes its first operand from, x as it lies as the transposed second one (sm_90a).
//
// Contract: product.h with y[(i*b + j)*d + l, n] = ...: features are rows, the batch is contiguous. What the host promises:
// register_shape in launch_registers.cuh, and that rows of x, w and y are whole 16-byte pieces, unless Strided.
//
// Index map: units and the persistent grid are those of unit_walk.cuh with DL = 1; a tile is TN columns n and TJ values of j. Two
// warpgroups multiply, each 64 values of j and WN n: they cut the j (JGroups = 2) or, where b is small, the n. Of a third, one
// thread fetches x and one fetches w, or, where rows begin anywhere, its four warps (batch_last_rows.cuh). A cluster of two CTAs
// takes two neighbouring tiles along j; each fetches half of x for both.
//
//   x in shared memory: boxes of 64 n (128 bytes) of every k, [k][n], swizzled     w [j][k], rows of WK values, swizzled
//   y leaves by way of shared memory (batch_last_output.cuh)
//
// Shared memory: x_slots * XBytes + w_slots * WBytes + RawBytes + YBytes + BarrierBytes.
// Source: the pattern is that of arXiv:2405.15013; the kernel is new.
#pragma once

#include "batch_last_output.cuh"
#include "batch_last_rows.cuh"
#include "batch_last_tile.cuh"

namespace structlayers {

// x and w by the copy engine.
template <typename Tile>
struct LastPieces : LastFrame<Tile> {
  using Frame = LastFrame<Tile>;
  using typename Frame::Place;
  using Frame::Frame, Frame::place, Frame::p, Frame::s, Frame::rank, Frame::steps, Frame::x_map, Frame::w_map, Frame::shared, Frame::w_base;
  using Frame::x_full, Frame::x_empty, Frame::w_full, Frame::w_empty, Frame::warp, Frame::lane;

  __device__ __forceinline__ void fetch_x() const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile) {
        const int n = static_cast<int>(at.n0) + tile * Tile::TN;
        for (int step = 0; step < steps; ++step) {
          const uint32_t full = x_full + 8 * ring.slot;
          if constexpr (Tile::Cluster == 1) barrier_wait(x_empty + 8 * ring.slot, ring.parity ^ 1);
          else barrier_wait_cluster(x_empty + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::XBytes);
#pragma unroll
          for (int b = 0; b < Tile::Boxes / Tile::Cluster; ++b) {
            const int box = rank * (Tile::Boxes / Tile::Cluster) + b;
            const uint32_t destination = shared + ring.slot * Tile::XBytes + box * Tile::BoxBytes;
            if constexpr (Tile::Cluster == 1) copy_box(destination, x_map, full, n + box * Tile::BoxN, at.l0, step * Tile::XK, at.i);
            else copy_box_to(3, destination, x_map, full, n + box * Tile::BoxN, at.l0, step * Tile::XK, at.i);
          }
          ring.advance(s.x_slots);
        }
      }
    }
  }

  __device__ __forceinline__ void fetch() const {
    if (warp == 0 && lane == 0) fetch_x();
    if (warp == 1 && lane == 0) this->fetch_w(w_map, w_base, w_full, w_empty);
    __syncwarp();
  }
};

template <typename Tile>
using LastFetch = std::conditional_t<Tile::Strided, LastRows<Tile>, LastPieces<Tile>>;

template <typename Tile>
class BatchLastRegisters : LastOutput<LastFetch<Tile>> {
  using Base = LastOutput<LastFetch<Tile>>;
  using typename Base::T, typename Base::Place, typename Base::Accumulators;
  using Base::place, Base::p, Base::s, Base::steps, Base::shared, Base::w_base, Base::x_full, Base::x_empty, Base::w_full, Base::w_empty;
  using Base::lane, Base::group, Base::warp, Base::my_j, Base::my_n, Base::finish, Base::end_output;

  // ---- the warpgroups that multiply

  __device__ __forceinline__ void release_x(int slot) const {
    if constexpr (Tile::Cluster == 1) {
      if (lane == 0) barrier_arrive(x_empty + 8 * slot);
    } else {
      if (lane < Tile::Cluster) barrier_arrive_remote(map_to_cta(x_empty + 8 * slot, lane));
    }
  }

  // Until all but the last `Pending` steps of products are done with their registers and their slot of x.
  template <int Pending = 0>
  __device__ __forceinline__ void end_products(int x_used) const {
    wgmma_wait<Pending>();
    if (x_used >= 0) release_x(x_used);
  }

  __device__ __forceinline__ void multiply() const {
    constexpr int Halves = Tile::WN / 128, Products = Tile::XK / 16;
    // Of 16 values of k of w: this thread's row of ldmatrix.
    const int w_row = my_j + warp * 16 + lane % 16;
    Ring x, w;
    Accumulators acc;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += Tile::TN) {
        const bool last_use = !s.resident || tile == at.tiles - 1;
        int x_used = -1;  // the slot of x of the step before, whose products are under way
#pragma unroll 1
        for (int step = 0; step < steps;) {
          // Every other step has registers of its own: they are loaded while products of the step before read theirs.
          uint32_t a[2][Products][4];
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            if (part > 0 && step == steps) break;
            const int w_part = part % Tile::WSteps;
            if (w_part == 0) barrier_wait(w_full + 8 * w.slot, w.parity);
#pragma unroll
            for (int product = 0; product < Products; ++product) {
              const int chunk = (w_part * Products + product) * 2 + lane / 16;
              load_matrix_x4(a[part][product], w_base + w.slot * Tile::WBytes + swizzled<Tile::WRow / 16>(w_row, chunk));
            }
            barrier_wait(x_full + 8 * x.slot, x.parity);
            // All operands are ready before the first product.
#pragma unroll
            for (int product = 0; product < Products; ++product) {
              uint32_t(&v)[4] = a[part][product];
              asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])::"memory");
            }
            wgmma_fence();
#pragma unroll
            for (int product = 0; product < Products; ++product) {
#pragma unroll
              for (int half = 0; half < Halves; ++half) {
                const uint32_t source = shared + x.slot * Tile::XBytes + (my_n / Tile::BoxN + half * 2) * Tile::BoxBytes + product * (16 * 128);
                WgmmaRegisters<T, 128, true>::multiply(acc[half], a[part][product], wgmma_descriptor_wide(source, Tile::BoxBytes),
                                                       step == 0 && product == 0);
              }
            }
            wgmma_commit();
            end_products<1>(x_used);
            x_used = x.slot;
            x.advance(s.x_slots);
            ++step;
            if (w_part == Tile::WSteps - 1 || step == steps) {
              // In registers: the slot of w is free.
              if (last_use && (Tile::Strided || lane == 0)) barrier_arrive(w_empty + 8 * w.slot);
              w.advance(s.w_slots);
            }
          }
        }
        end_products(x_used);
        // The same w again.
        if (!last_use) w.parity ^= 1;
        finish(acc, at);
      }
    }
    end_output();
  }

 public:
  using Base::Base;

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, Tile::Fills);
        barrier_init(x_empty + 8 * slot, Tile::XReleases);
      }
      for (int slot = 0; slot < s.w_slots; ++slot) {
        barrier_init(w_full + 8 * slot, Tile::Fills);
        barrier_init(w_empty + 8 * slot, Tile::WReleases);
      }
      barrier_init_fence();
    }
    __syncthreads();
    if constexpr (Tile::Cluster > 1) cluster_sync();
    // What threads keep and take adds up to the 168 registers that each of the three warpgroups was launched with.
    if (group == 2) {
      keep_registers<Tile::Strided ? 88 : 40>();
      this->fetch();
    } else {
      take_registers<Tile::Strided ? 208 : 232>();
      multiply();
    }
    // Nobody leaves while the other may still write here.
    if constexpr (Tile::Cluster > 1) cluster_sync();
  }
};

// The products exist only in code for sm_90a; the host launches this kernel on such devices alone.
template <typename Tile>
__global__ void __launch_bounds__(Tile::Threads, 1)
    batch_last_registers_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                                const __grid_constant__ Product p, const __grid_constant__ RegisterShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchLastRegisters<Tile>(x_map, w_map, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
