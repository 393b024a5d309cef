// From a product of a small batch to a launch of small_batch.cuh: how the work is cut. Included once per element type.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "device.h"
#include "small_batch.cuh"
#include "small_batch.h"

namespace structlayers {

constexpr int kSmallBatchSharedBytes = 96 * 1024, kSmallBatchWarps = 16;

// A cut with its kernel (8-row tiles, x straight to registers), its shared memory and about what it takes.
struct SmallBatchChoice {
  SmallBatchCut cut;
  int tiles_n;  // of 8 rows, in one CTA
  bool direct;
  int warps, shared_bytes;
  int64_t ctas;
  double time_ns;
};

// Whether neighbouring l may be turned `group` at a time: runs are whole 16-byte pieces, or all l of the pattern lie together.
inline int small_batch_group(const Product& p, bool batch_last, int run, int e) {
  if (batch_last || !p.x_aligned) return 0;
  if (run % e == 0 && p.d % e == 0) return e;
  return p.d == run && run < e ? run : 0;
}

inline bool small_batch_choice(const Product& p, bool batch_last, int size, int run_log, int warps_j_log, int warps_k, int tiles_n,
                               SmallBatchChoice& choice) {
  const int e = 16 / size, chunk = 4 * e, run = 1 << run_log, tj = 16 << warps_j_log, tn = 8 * tiles_n;
  const int warps = warps_k << (run_log + warps_j_log);
  if (warps > kSmallBatchWarps) return false;
  SmallBatchCut& cut = choice.cut;
  cut = {};
  cut.run_log = run_log;
  cut.warps_j_log = warps_j_log;
  cut.warps_k = warps_k;
  cut.group = small_batch_group(p, batch_last, run, e);
  cut.tiles_n = static_cast<unsigned>(ceil_div(p.n, tn));
  cut.tiles_j = static_cast<unsigned>(ceil_div(p.b, tj));
  cut.tiles_l = static_cast<unsigned>(ceil_div(p.d, run));
  cut.x_n = batch_last ? 1 : p.x_stride;
  cut.x_feature = batch_last ? p.x_stride : 1;
  cut.y_n = batch_last ? 1 : p.y_stride;
  cut.y_feature = batch_last ? p.y_stride : 1;
  cut.batch_last = batch_last;
  // Neighbouring rows of x begin 64 bytes apart modulo 128, so that 8 lanes (two rows, four pieces) read all banks.
  const int64_t chunks = ceil_div(p.c, chunk);
  const auto pitch_of = [](int64_t n_chunks) { return (n_chunks % 2 ? n_chunks : n_chunks + 1) * 64; };
  choice.direct = p.d == 1 && cut.group == 1 && p.w_aligned && p.in_features % e == 0 && tiles_n <= 2;
  int64_t step_chunks = chunks;
  if (!choice.direct) {
    const int64_t most = kSmallBatchSharedBytes / (int64_t{run} * tn * 64) - 1;
    if (step_chunks > most) step_chunks = most / warps_k * warps_k;
    if (step_chunks <= 0) return false;
  }
  // Whole chunks, also where a sum is so long that it is cut only lest 32 bits overflow: pieces stay aligned.
  cut.k_step = static_cast<int>(std::min<int64_t>(step_chunks * chunk, std::numeric_limits<int>::max() / 2 / chunk * chunk));
  cut.x_pitch = static_cast<int>(pitch_of(step_chunks));
  // What a warp reads of the partial sums, l fastest, falls in different banks.
  cut.l_pitch = tn * (tj + 4) + 32 / run;
  const int64_t sums = int64_t{4} * warps_k * run * cut.l_pitch, x_area = choice.direct ? 0 : int64_t{run} * tn * cut.x_pitch;
  if (std::max(sums, x_area) > kSmallBatchSharedBytes) return false;
  choice.tiles_n = tiles_n;
  choice.warps = warps;
  choice.shared_bytes = static_cast<int>(std::max(sums, x_area));
  choice.ctas = int64_t{cut.tiles_n} * cut.tiles_j * cut.tiles_l * p.a;
  // About what it takes, up to a launch: what an SM takes in and what all take from the L2 (runs shorter than 32 bytes cost
  // whole sectors, and Direct reads x once for every 16 values of j); what a warp does one after the other: loads of x,
  // chunks, outputs; and CTAs that have to wait for others, by their registers. Fitted to 1,100 cuts of 20 products on one
  // H100: what is chosen takes 1.03 times (mean; worst 1.2) what the best of them does.
  const double rows = static_cast<double>(std::min<int64_t>(p.n, tn)), threads = 32.0 * warps, ctas = static_cast<double>(choice.ctas);
  const double sms = multiprocessors(), per_sm = std::max(1.0, ctas / sms), crowd = std::max(1.0, per_sm * warps / 64);
  const double w_bytes = static_cast<double>(run) * std::min(tj, p.b) * p.c * size;
  const double x_width = p.d > run && run * size < 32 ? 32 : run * size;
  const double x_bytes = rows * static_cast<double>(p.c) * x_width * (choice.direct ? 1 << warps_j_log : 1);
  const double units = rows * static_cast<double>(chunks) * 4 * run / std::max(cut.group, 1);
  const double unit_rounds = choice.direct ? 0 : std::ceil(units / (threads * (cut.group == 1 ? 4 : cut.group == 2 ? 2 : 1)));
  const double warp_chunks = static_cast<double>(ceil_div(chunks, warps_k));
  const double steps = choice.direct ? 1 : static_cast<double>(ceil_div(chunks, step_chunks));
  const double outputs = std::ceil(rows * run * tj / (threads * 4)), waves = std::ceil(ctas / (sms * (kSmallBatchWarps / warps)));
  choice.time_ns = std::max(per_sm * (w_bytes + x_bytes) / 60, ctas * (w_bytes + x_bytes) / 5000) +
                   crowd * (300 * unit_rounds + (20 + 30 * tiles_n) * warp_chunks + 800 * outputs) +
                   per_sm * static_cast<double>(sums) / 60 + 600 * (waves - 1) + 600 * (steps - 1) +
                   90 * std::max(0.0, std::log2(std::min(p.d, 16) / static_cast<double>(run))) +
                   (cut.group == 0 ? 0.12 * per_sm * rows * static_cast<double>(p.c) * run : 0);
  return true;
}

inline SmallBatchChoice choose_small_batch(const Product& p, bool batch_last, int size) {
  SmallBatchChoice best{}, next{};
  best.time_ns = std::numeric_limits<double>::max();
  const int64_t tiles_n = ceil_div(p.n, 8), chunks = ceil_div(p.c, 64 / size);
  for (int n = 1; n <= 8 && (n == 1 || n < 2 * tiles_n); n *= 2) {
    // More than four CTAs for the same weights are never worth it.
    if (n < 8 && tiles_n > 4 * n) continue;
    for (int run_log = 0; run_log <= 4 && (run_log == 0 || (1 << run_log) < 2 * p.d); ++run_log) {
      for (int j_log = 0; j_log <= 2 && (j_log == 0 || (8 << j_log) < p.b); ++j_log) {
        for (int warps_k = 1; warps_k <= 16 && (warps_k == 1 || warps_k < 2 * chunks); warps_k *= 2) {
          if (small_batch_choice(p, batch_last, size, run_log, j_log, warps_k, n, next) && next.time_ns < best.time_ns) best = next;
        }
      }
    }
  }
  return best;
}

template <auto Kernel>
cudaError_t start_small_batch(const Product& p, const SmallBatchChoice& choice, cudaStream_t stream) {
  if (choice.ctas > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_bytes<Kernel>(kSmallBatchSharedBytes); error != cudaSuccess) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(choice.ctas));
  config.blockDim = dim3(static_cast<unsigned>(32 * choice.warps));
  config.dynamicSmemBytes = static_cast<size_t>(choice.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  // Only code that was compiled for 9.0 waits for its predecessors: other code runs from the PTX of 8.0.
  config.numAttrs = has_wgmma() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, Kernel, p, choice.cut);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <typename T, bool Split>
cudaError_t launch_small_batch(const Product& p, bool batch_last, cudaStream_t stream) {
  const SmallBatchChoice choice = choose_small_batch(p, batch_last, sizeof(T));
  switch (choice.tiles_n * 2 + choice.direct) {
    case 2: return start_small_batch<small_batch_kernel<T, Split, 1, false>>(p, choice, stream);
    case 3: return start_small_batch<small_batch_kernel<T, Split, 1, true>>(p, choice, stream);
    case 4: return start_small_batch<small_batch_kernel<T, Split, 2, false>>(p, choice, stream);
    case 5: return start_small_batch<small_batch_kernel<T, Split, 2, true>>(p, choice, stream);
    case 8: return start_small_batch<small_batch_kernel<T, Split, 4, false>>(p, choice, stream);
    case 16: return start_small_batch<small_batch_kernel<T, Split, 8, false>>(p, choice, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace structlayers
