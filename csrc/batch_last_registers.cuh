// Batch-last product with one Kronecker-sparse factor on Hopper, 16-bit types: one product of matrices for every i and l, w from
// shared memory to the registers that wgmma takes its first operand from, x as it lies as the transposed second one (sm_90a).
//
// Contract: product.h with y[(i*b + j)*d + l, n] = ...: features are rows, the batch is contiguous. What the host promises:
// register_shape in launch_registers.cuh, and that rows of y are whole 16-byte pieces.
//
// Index map: units and the persistent grid are those of unit_walk.cuh with DL = 1; a tile is TN columns n and TJ values of j. Two
// warpgroups multiply, each 64 values of j and 256 n: they cut the j (JGroups = 2) or, where b is small, the n. Of a third, one
// thread fetches x and one fetches w. A cluster of two CTAs takes two neighbouring tiles along j; each fetches half of x for both.
//
//   x in shared memory: boxes of 64 n (128 bytes) of every k, [k][n], swizzled     w [j][k], rows of 128 bytes, swizzled
//   y leaves in parts of 64 n: a warp writes whole lines of its 16 rows
//
// Shared memory: x_slots * XBytes + w_slots * WBytes + YBytes + BarrierBytes.
// Source: the pattern is that of arXiv:2405.15013; the kernel is new.
#pragma once

#include "asynchronous.cuh"
#include "product.h"
#include "tile.cuh"
#include "unit_walk.cuh"
#include "wgmma.cuh"

namespace structlayers {

template <typename T_, int JGroups_, int Cluster_ = 1>
struct LastRegisterTile {
  using T = T_;
  static constexpr bool Grouped = true, Strided = false, Last = true;
  static constexpr int DL = 1, Cluster = Cluster_, JGroups = JGroups_, WJ = 64, WN = 256, TJ = WJ * JGroups, TN = WN * 2 / JGroups;
  static constexpr int Consumers = 256, Threads = Consumers + 128;
  // A slot of x holds XK values of k, one of w WK.
  static constexpr int XK = 32, BoxN = 64, BoxRows = XK, Boxes = TN / BoxN, BoxBytes = XK * 128, XBytes = Boxes * BoxBytes;
  static constexpr int WK = 64, WRow = WK * 2, WBytes = TJ * WRow, WSteps = WK / XK;
  static constexpr int YPitch = BoxN * 2 + 16, YBytes = Consumers / 32 * 16 * YPitch;
  static constexpr int MaxSlots = 16, BarrierBytes = 4 * MaxSlots * 8;
  static_assert(sizeof(T) == 2 && (JGroups == 1 || JGroups == 2) && WSteps == 2 && Boxes % Cluster == 0);
};

template <typename Tile>
class BatchLastRegisters : UnitWalk<Tile> {
  using Walk = UnitWalk<Tile>;
  using typename Walk::Place;
  using Walk::place, Walk::p, Walk::s, Walk::rank, Walk::steps;
  using T = typename Tile::T;

  const CUtensorMap &x_map, &w_map;
  const uint32_t shared;
  const uint32_t w_base = shared + s.x_slots * Tile::XBytes, y_base = w_base + s.w_slots * Tile::WBytes;
  const uint32_t x_full = y_base + Tile::YBytes, x_empty = x_full + 8 * Tile::MaxSlots;
  const uint32_t w_full = x_empty + 8 * Tile::MaxSlots, w_empty = w_full + 8 * Tile::MaxSlots;
  // The shuffles tell the compiler that a warp agrees on it: descriptors then live in uniform registers.
  const int lane = threadIdx.x % 32, group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int my_j = Tile::JGroups == 2 ? group * Tile::WJ : 0, my_n = Tile::JGroups == 2 ? 0 : group * Tile::WN;

  // ---- the threads that fetch

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

  __device__ __forceinline__ void fetch_w() const {
    Ring ring;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      const Place at = place(unit);
      const int times = s.resident ? min(at.tiles, 1) : at.tiles;
      for (int tile = 0; tile < times; ++tile) {
        for (int k = 0; k < p.c; k += Tile::WK) {
          const uint32_t full = w_full + 8 * ring.slot;
          barrier_wait(w_empty + 8 * ring.slot, ring.parity ^ 1);
          barrier_expect(full, Tile::WBytes);
          copy_box(w_base + ring.slot * Tile::WBytes, w_map, full, k, at.j0, at.i * p.d + at.l0);
          ring.advance(s.w_slots);
        }
      }
    }
  }

  // ---- y

  // Two products of 128 n, [8 n][4].
  using Accumulators = float[2][16][4];

  // A part of 64 n to this warp's area, [j][n]; values of j are those of this thread's rows (row, row + 8).
  __device__ __forceinline__ void stage_y(const Accumulators& acc, int part, uint32_t area, const float (&bias)[2]) const {
    const uint32_t place = area + lane / 4 * Tile::YPitch + lane % 4 * 4;
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      const float(&z)[4] = acc[part / 2][part % 2 * 8 + g];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_shared_4(place + h * 8 * Tile::YPitch + g * 16, pack_two<T>(z[2 * h] + bias[h], z[2 * h + 1] + bias[h]));
      }
    }
  }

  __device__ __forceinline__ void finish(const Accumulators& acc, const Place& at) const {
    // Nothing that follows from it is kept in registers while products are under way.
    int thread = lane;
    asm volatile("" : "+r"(thread));
    const uint32_t area = y_base + (group * 4 + warp) * (16 * Tile::YPitch);
    const int j0 = at.j0 + my_j + warp * 16, rows = min(16, p.b - j0);
    const int64_t feature0 = (static_cast<int64_t>(at.i) * p.b + j0) * p.d + at.l0;
    const auto exists = [&](int row) { return row < rows && feature0 + static_cast<int64_t>(row) * p.d < p.out_features; };
    float bias[2] = {0.f, 0.f};
    if (p.bias != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = thread / 4 + 8 * h;
        if (exists(row)) bias[h] = to_float(static_cast<const T*>(p.bias)[feature0 + static_cast<int64_t>(row) * p.d]);
      }
    }
    const int chunk = thread % 8, first = thread / 8;
#pragma unroll
    for (int part = 0; part < Tile::WN / Tile::BoxN; ++part) {
      const int64_t n = at.n0 + my_n + part * Tile::BoxN + chunk * 8;
      __syncwarp();  // the part before has left
      stage_y(acc, part, area, bias);
      __syncwarp();
#pragma unroll
      for (int row = first; row < 16; row += 4) {
        if (!exists(row) || n >= p.n) continue;
        uint32_t v[4];
        load_shared_16(v, area + row * Tile::YPitch + chunk * 16);
        if (p.activation != kNone) activate_piece<T>(v, p.activation);
        T* destination = static_cast<T*>(p.y) + (feature0 + static_cast<int64_t>(row) * p.d) * p.y_stride + n;
        if (n + 8 <= p.n) {
          store_global_16(destination, v);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (n + e < p.n) reinterpret_cast<uint16_t*>(destination)[e] = static_cast<uint16_t>(v[e / 2] >> (e % 2 * 16));
        }
      }
    }
  }

  // ---- the warpgroups that multiply

  __device__ __forceinline__ void release_x(int slot) const {
    if constexpr (Tile::Cluster == 1) {
      if (lane == 0) barrier_arrive(x_empty + 8 * slot);
    } else {
      if (lane < Tile::Cluster) barrier_arrive_remote(map_to_cta(x_empty + 8 * slot, lane));
    }
  }

  __device__ __forceinline__ void multiply() const {
    constexpr int Products = Tile::XK / 16;
    // Of 16 values of k of w: this thread's row of ldmatrix.
    const int w_row = my_j + warp * 16 + lane % 16;
    Ring x, w;
    Accumulators acc;
    for (unsigned unit = blockIdx.x / Tile::Cluster; unit < s.units; unit += gridDim.x / Tile::Cluster) {
      Place at = place(unit);
      for (int tile = 0; tile < at.tiles; ++tile, at.n0 += Tile::TN) {
        const bool last_use = !s.resident || tile == at.tiles - 1;
        int x_used = -1;  // the slot of x whose products are under way
#pragma unroll 1
        for (int step = 0; step < steps;) {
          barrier_wait(w_full + 8 * w.slot, w.parity);
          // Each part of a slot of w has registers of its own: those of one step are loaded while products of the step before
          // read theirs.
          uint32_t a[Tile::WSteps][Products][4];
#pragma unroll
          for (int part = 0; part < Tile::WSteps; ++part) {
            if (part > 0 && step == steps) break;
#pragma unroll
            for (int product = 0; product < Products; ++product) {
              const int chunk = (part * Products + product) * 2 + lane / 16;
              load_matrix_x4(a[part][product], w_base + w.slot * Tile::WBytes + swizzled<8>(w_row, chunk));
            }
            barrier_wait(x_full + 8 * x.slot, x.parity);
            wgmma_fence();
#pragma unroll
            for (int product = 0; product < Products; ++product) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const uint32_t source = shared + x.slot * Tile::XBytes + (my_n / Tile::BoxN + half * 2) * Tile::BoxBytes + product * (16 * 128);
                WgmmaRegisters<T, 128, true>::multiply(acc[half], a[part][product], wgmma_descriptor_wide(source, Tile::BoxBytes),
                                                       step == 0 && product == 0);
              }
            }
            wgmma_commit();
            // The products of the step before are done with their registers and their slot of x.
            wgmma_wait<1>();
            if (x_used >= 0) release_x(x_used);
            x_used = x.slot;
            x.advance(s.x_slots);
            ++step;
          }
          // In registers: the slot of w is free.
          if (last_use && lane == 0) barrier_arrive(w_empty + 8 * w.slot);
          w.advance(s.w_slots);
        }
        wgmma_wait();
        if (x_used >= 0) release_x(x_used);
        // The same w again.
        if (!last_use) w.parity ^= 1;
        finish(acc, at);
      }
    }
  }

 public:
  __device__ BatchLastRegisters(const CUtensorMap& of_x, const CUtensorMap& of_w, const Product& product, const RegisterShape& shape,
                                uint32_t base)
      : Walk(product, shape), x_map(of_x), w_map(of_w), shared(base) {}

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < s.x_slots; ++slot) {
        barrier_init(x_full + 8 * slot, 1);
        barrier_init(x_empty + 8 * slot, Tile::Consumers / 32 * Tile::Cluster);
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
      if (warp == 0 && lane == 0) fetch_x();
      if (warp == 1 && lane == 0) fetch_w();
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
    batch_last_registers_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                                const __grid_constant__ Product p, const __grid_constant__ RegisterShape s) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  BatchLastRegisters<Tile>(x_map, w_map, p, s, shared_address(dynamic_shared)).run();
#endif
}

}  // namespace structlayers
