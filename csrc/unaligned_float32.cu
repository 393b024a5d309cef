#include "launch_unaligned.cuh"

namespace structlayers {

template cudaError_t launch_unaligned<float, false>(const Product& p, cudaStream_t stream, bool& taken);

}  // namespace structlayers
