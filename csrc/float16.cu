#include "launch.cuh"

namespace structlayers {

cudaError_t launch_float16(const Product& p, bool batch_last, int tile, cudaStream_t stream) {
  return launch_16bit<__half>(p, batch_last, tile, stream);
}

}  // namespace structlayers
