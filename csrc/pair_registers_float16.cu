#include "launch_pair_registers.cuh"

namespace structlayers {

cudaError_t launch_pair_registers_float16(const Pair& p, cudaStream_t stream) {
  return launch_pair_registers<__half>(p, stream);
}

}  // namespace structlayers
