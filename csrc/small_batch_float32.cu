#include "launch_small_batch.cuh"

namespace structlayers {

template cudaError_t launch_small_batch<float, false>(const Product& p, bool batch_last, cudaStream_t stream);

}  // namespace structlayers
