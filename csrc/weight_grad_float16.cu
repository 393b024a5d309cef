#include "launch_weight_grad.cuh"

namespace structlayers {

cudaError_t launch_weight_grad_float16(const WeightGrad& p, bool batch_last, int tile, cudaStream_t stream) {
  return launch_weight_grad<__half>(p, batch_last, tile, stream);
}

}  // namespace structlayers
