#include "launch.cuh"

namespace structlayers {

cudaError_t launch_bfloat16(const Product& p, bool batch_last, int tile, cudaStream_t stream) {
  return launch_16bit<__nv_bfloat16>(p, batch_last, tile, stream);
}

}  // namespace structlayers
