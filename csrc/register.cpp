// Registers the compiled kernels with PyTorch through its stable ABI. Schemas, checks and gradients live in Python
// (structlayers/ops.py, structlayers/backends/cuda.py); here a tensor becomes a Product and a tile number a launch.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "merge.h"
#include "pair.h"
#include "tiles.h"
#include "weight_grad.h"

namespace structlayers {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "structlayers: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The message is put together only where it is needed: every call makes a dozen of these checks.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

template <typename... Parts>
void require_started(cudaError_t error, const Parts&... parts) {
  if (error == cudaSuccess) return;
  // Else PyTorch's next check would report it, for a kernel of its own.
  cudaGetLastError();
  fail(parts..., " did not start: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

// libtorch_cuda is already loaded when a CUDA tensor exists; looking the symbol up there keeps the build free of it.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    require(symbol != nullptr, "this PyTorch has no aoti_torch_get_current_cuda_stream: expected a CUDA build, 2.11 or later");
    return reinterpret_cast<Get>(symbol);
  }();
  void* stream = nullptr;
  require(get(device, &stream) == AOTI_TORCH_SUCCESS, "no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A tensor on the device of `like`.
Tensor empty(const Tensor& like, int32_t dtype, int dims, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  AtenTensorHandle handle = nullptr;
  const bool done = aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, like.get_device_index(), &handle) == AOTI_TORCH_SUCCESS;
  require(done, "could not allocate an output of ", sizes[0] * strides[0], " elements");
  return Tensor(handle);
}

// A contiguous matrix of the dtype and device of `like`.
Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  int32_t dtype = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  return empty(like, dtype, 2, sizes, strides);
}

// x (N, in) or, batch-last, (in, N), the last dimension with stride 1; weight (a, d, b, c) contiguous; bias (out,) or none.
// Returns (N, out) or (out, N), contiguous.
Tensor cuda_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                    bool batch_last, int64_t activation, bool split, int64_t tile) {
  require(x.is_cuda() && x.dim() == 2 && weight.dim() == 4, "cuda_product expects a CUDA matrix and a weight (a, d, b, c)");
  require(weight.is_contiguous(), "cuda_product expects a contiguous weight");
  const int64_t a = weight.size(0), d = weight.size(1), b = weight.size(2), c = weight.size(3);
  require(!bias.has_value() || bias->is_contiguous(), "cuda_product expects a contiguous bias");
  const int64_t most = std::numeric_limits<int32_t>::max();
  require(a * b * d <= most && a * c * d <= most, "more than 2^31 - 1 features");
  const int64_t in_features = x.size(batch_last ? 0 : 1), n = x.size(batch_last ? 1 : 0);
  require(in_features <= a * c * d && out_features <= a * b * d, "more features than the factor has");
  // Without elements, any strides count as contiguous.
  require(n == 0 || x.size(1) <= 1 || x.stride(1) == 1, "cuda_product expects stride 1 in the last dimension of x");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  Tensor y = batch_last ? empty_matrix(x, out_features, n) : empty_matrix(x, n, out_features);
  if (n == 0) return y;

  Product p{};
  p.x = x.data_ptr();
  p.w = weight.data_ptr();
  p.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.n = n;
  p.x_stride = x.stride(0);
  p.y_stride = batch_last ? n : out_features;
  p.in_features = in_features;
  p.out_features = out_features;
  p.a = static_cast<int>(a);
  p.b = static_cast<int>(b);
  p.c = static_cast<int>(c);
  p.d = static_cast<int>(d);
  p.activation = static_cast<int>(activation);

  const ScalarType type = x.scalar_type();
  const int64_t e = type == ScalarType::Float ? 4 : 8;  // elements in 16 bytes
  p.w_aligned = aligned(p.w) && c % e == 0;
  if (batch_last) {
    p.x_aligned = aligned(p.x) && p.x_stride % e == 0;
    p.y_aligned = aligned(p.y) && p.y_stride % e == 0;
  } else {
    p.x_aligned = aligned(p.x) && p.x_stride % e == 0 && (a == 1 || c * d % e == 0);
    p.y_aligned = aligned(p.y) && p.y_stride % e == 0 && (a == 1 || b * d % e == 0);
  }
  const cudaStream_t stream = current_stream(device);
  cudaError_t error = cudaErrorInvalidValue;
  if (type == ScalarType::Float) {
    error = split ? launch_float32_split(p, batch_last, tile, stream) : launch_float32(p, batch_last, tile, stream);
  } else if (type == ScalarType::Half) {
    error = launch_float16(p, batch_last, tile, stream);
  } else if (type == ScalarType::BFloat16) {
    error = launch_bfloat16(p, batch_last, tile, stream);
  } else {
    require(false, "cuda_product knows float32, float16 and bfloat16");
  }
  require_started(error, "tile ", tile, " of pattern (", a, ",", b, ",", c, ",", d, ")");
  return y;
}

// x (N, in), stride 1 in the last dimension; left (a, d, b, rank*alpha) and right (a*alpha, 1, rank*d, c), a chainable pair,
// contiguous; bias (out,) or none; float16 or bfloat16. Returns (N, out), contiguous. `tile` as launch_pair_float16 takes it.
Tensor cuda_pair(const Tensor& x, const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias, int64_t out_features,
                 bool batch_last, int64_t activation, bool, int64_t tile) {
  require(x.is_cuda() && x.dim() == 2 && left.dim() == 4 && right.dim() == 4, "cuda_pair expects a CUDA matrix and two weights");
  require(!batch_last, "cuda_pair expects the batch in the first dimension");
  require(left.is_contiguous() && right.is_contiguous() && (!bias.has_value() || bias->is_contiguous()),
          "cuda_pair expects contiguous weights and bias");
  const int64_t a = left.size(0), delta = left.size(1), b = left.size(2), k = left.size(3);
  const int64_t blocks = right.size(0), rows = right.size(2), c = right.size(3);
  require(right.size(1) == 1, "cuda_pair expects a right factor with d = 1");
  require(a > 0 && delta > 0 && blocks % a == 0 && rows % delta == 0 && a * k * delta == blocks * rows,
          "cuda_pair expects a chainable pair");
  const int64_t most = std::numeric_limits<int32_t>::max();
  require(a * b * delta <= most && blocks * c <= most && blocks * rows <= most, "more than 2^31 - 1 features");
  const int64_t in_features = x.size(1), n = x.size(0);
  require(in_features <= blocks * c && out_features <= a * b * delta, "more features than the pair has");
  require(n <= most - 64, "more than 2^31 - 65 rows");
  require(n == 0 || in_features <= 1 || x.stride(1) == 1, "cuda_pair expects stride 1 in the last dimension of x");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = empty_matrix(x, n, out_features);
  if (n == 0) return y;

  Pair p{};
  p.x = x.data_ptr();
  p.left = left.data_ptr();
  p.right = right.data_ptr();
  p.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.n = n;
  p.x_stride = x.stride(0);
  p.y_stride = out_features;
  p.in_features = in_features;
  p.out_features = out_features;
  p.groups = static_cast<int>(a);
  p.alpha = static_cast<int>(blocks / a);
  p.delta = static_cast<int>(delta);
  p.rank = static_cast<int>(rows / delta);
  p.b = static_cast<int>(b);
  p.c = static_cast<int>(c);
  p.activation = static_cast<int>(activation);
  p.y_aligned = aligned(p.y) && p.y_stride % 8 == 0;
  require(aligned(p.x) && aligned(p.left) && aligned(p.right) && p.x_stride % 8 == 0 && c % 8 == 0 && k % 8 == 0,
          "cuda_pair expects rows of whole 16-byte pieces");
  require(delta == 1 || delta == 2 || delta == 4 || delta % 8 == 0, "cuda_pair expects d of left to be 1, 2, 4 or a multiple of 8");
  const cudaStream_t stream = current_stream(device);
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Half || type == ScalarType::BFloat16, "cuda_pair knows float16 and bfloat16");
  const cudaError_t error = type == ScalarType::Half ? launch_pair_float16(p, static_cast<int>(tile), stream)
                                                     : launch_pair_bfloat16(p, static_cast<int>(tile), stream);
  require_started(error, "tile ", tile, " of the pair (", a, ",", b, ",", k, ",", delta, ")(", blocks, ",", rows, ",", c, ",1)");
  return y;
}

// dy (N, out) and x (N, in) or, batch-last, (out, N) and (in, N), the last dimension with stride 1; up to a*b*d and a*c*d
// features. Returns dw (a, d, b, c), contiguous; the batch is summed in `splits` parts, always in the same order.
Tensor cuda_weight_grad(const Tensor& dy, const Tensor& x, int64_t a, int64_t b, int64_t c, int64_t d, bool batch_last, bool split,
                        int64_t tile, int64_t splits) {
  require(dy.is_cuda() && x.is_cuda() && dy.dim() == 2 && x.dim() == 2, "cuda_weight_grad expects two CUDA matrices");
  require(dy.scalar_type() == x.scalar_type() && dy.get_device_index() == x.get_device_index(),
          "cuda_weight_grad expects one dtype and one device");
  const int64_t most = std::numeric_limits<int32_t>::max();
  require(a > 0 && b > 0 && c > 0 && d > 0 && a * b * d <= most && a * c * d <= most, "more than 2^31 - 1 features, or none");
  const int feature_axis = batch_last ? 0 : 1, batch_axis = batch_last ? 1 : 0;
  const int64_t n = x.size(batch_axis);
  require(dy.size(batch_axis) == n, "cuda_weight_grad expects one batch");
  require(dy.size(feature_axis) <= a * b * d && x.size(feature_axis) <= a * c * d, "more features than the factor has");
  require(n == 0 || ((dy.size(1) <= 1 || dy.stride(1) == 1) && (x.size(1) <= 1 || x.stride(1) == 1)),
          "cuda_weight_grad expects stride 1 in the last dimension");
  require(splits > 0 && splits <= most, "cuda_weight_grad expects at least one split");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  const ScalarType type = x.scalar_type();
  const int64_t e = type == ScalarType::Float ? 4 : 8;  // elements in 16 bytes
  const auto operand = [&](const Tensor& tensor, int64_t block) {
    GradOperand o{};
    o.data = tensor.data_ptr();
    o.stride = tensor.stride(0);
    o.features = tensor.size(feature_axis);
    o.block = static_cast<int>(block);
    o.aligned = aligned(o.data) && o.stride % e == 0 && (batch_last || a == 1 || block * d % e == 0);
    return o;
  };
  const int64_t sizes[4] = {a, d, b, c}, strides[4] = {d * b * c, b * c, c, 1};
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  Tensor dw = empty(x, dtype, 4, sizes, strides);
  WeightGrad p{};
  p.dy = operand(dy, b);
  p.x = operand(x, c);
  p.dw = dw.data_ptr();
  p.n = n;
  p.splits = static_cast<int>(splits);
  p.a = static_cast<int>(a);
  p.d = static_cast<int>(d);
  std::optional<Tensor> partial;
  if (splits > 1) {
    const int64_t partial_sizes[2] = {splits, a * d * b * c}, partial_strides[2] = {a * d * b * c, 1};
    partial = empty(x, aoti_torch_dtype_float32(), 2, partial_sizes, partial_strides);
    p.partial = static_cast<float*>(partial->data_ptr());
  }
  const cudaStream_t stream = current_stream(device);
  cudaError_t error = cudaErrorInvalidValue;
  if (type == ScalarType::Float) {
    error = split ? launch_weight_grad_float32_split(p, batch_last, tile, stream) : launch_weight_grad_float32(p, batch_last, tile, stream);
  } else if (type == ScalarType::Half) {
    error = launch_weight_grad_float16(p, batch_last, tile, stream);
  } else if (type == ScalarType::BFloat16) {
    error = launch_weight_grad_bfloat16(p, batch_last, tile, stream);
  } else {
    require(false, "cuda_weight_grad knows float32, float16 and bfloat16");
  }
  require_started(error, "tile ", tile, " of the weight gradient of pattern (", a, ",", b, ",", c, ",", d, ")");
  return dw;
}

// The product of every run of neighbours: `lengths` says how many of `weights` (a, d, b, c), contiguous, of one dtype and
// device, in written order and chainable, each run has. Returns one contiguous weight a run.
std::vector<Tensor> cuda_merge(const std::vector<Tensor>& weights, const std::vector<int64_t>& lengths) {
  require(!weights.empty() && !lengths.empty() && lengths.size() <= kMostMergeRuns, "cuda_merge expects 1 to ", kMostMergeRuns,
          " runs of weights");
  const Tensor& like = weights.front();
  const int64_t most = std::numeric_limits<int32_t>::max();
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int32_t dtype = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  MergeRuns runs{};
  std::vector<Tensor> products;
  size_t used = 0;
  for (const int64_t length : lengths) {
    require(length > 0 && length <= kMostMergedFactors && used + length <= weights.size(), "cuda_merge expects runs of 1 to ",
            kMostMergedFactors, " of the weights");
    MergeRun& run = runs.runs[runs.count++];
    run.count = static_cast<int>(length);
    for (int q = 0; q < run.count; ++q) {
      const Tensor& w = weights[used++];
      require(w.is_cuda() && w.dim() == 4 && w.is_contiguous() && w.scalar_type() == like.scalar_type() && w.get_device_index() == device,
              "cuda_merge expects contiguous CUDA weights (a, d, b, c) of one dtype on one device");
      const int64_t a = w.size(0), d = w.size(1), b = w.size(2), c = w.size(3);
      require(a > 0 && b > 0 && c > 0 && d > 0 && a * b * d <= most && a * c * d <= most, "a factor with more than 2^31 - 1 features, or none");
      run.factors[q] = {w.data_ptr(), static_cast<int>(a), static_cast<int>(b), static_cast<int>(c), static_cast<int>(d)};
      if (q == 0) continue;
      const MergeFactor &left = run.factors[q - 1], &right = run.factors[q];
      require(int64_t{left.a} * left.c * left.d == int64_t{right.a} * right.b * right.d && right.a % left.a == 0 &&
                  left.d % right.d == 0 && int64_t{left.a} * left.c % right.a == 0,
              "cuda_merge expects chainable neighbours");
    }
    const MergeFactor &first = run.factors[0], &last = run.factors[run.count - 1];
    const int64_t b = int64_t{first.b} * first.d / last.d, c = int64_t{last.a} * last.c / first.a;
    const int64_t sizes[4] = {first.a, last.d, b, c}, strides[4] = {last.d * b * c, b * c, c, 1};
    products.push_back(empty(like, dtype, 4, sizes, strides));
    run.out = products.back().data_ptr();
  }
  require(used == weights.size(), "cuda_merge expects lengths that add up to the number of weights");
  const cudaStream_t stream = current_stream(device);
  const ScalarType type = like.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
          "cuda_merge knows float32, float16 and bfloat16");
  const cudaError_t error = type == ScalarType::Float  ? launch_merge<float>(runs, stream)
                            : type == ScalarType::Half ? launch_merge<__half>(runs, stream)
                                                       : launch_merge<__nv_bfloat16>(runs, stream);
  require_started(error, "a product of ", weights.size(), " factors");
  return products;
}

}  // namespace
}  // namespace structlayers

// Whether the binary holds code for Hopper's wgmma; read by structlayers/_extension.py.
extern "C" int structlayers_built_for_sm90a() {
#ifdef STRUCTLAYERS_SM90A
  return 1;
#else
  return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(structlayers, CUDA, library) {
  library.impl("cuda_product", TORCH_BOX(&structlayers::cuda_product));
  library.impl("cuda_pair", TORCH_BOX(&structlayers::cuda_pair));
  library.impl("cuda_merge", TORCH_BOX(&structlayers::cuda_merge));
  library.impl("cuda_weight_grad", TORCH_BOX(&structlayers::cuda_weight_grad));
}
