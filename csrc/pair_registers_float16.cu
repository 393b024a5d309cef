#include "launch_pair_registers.cuh"

namespace structlayers {

cudaError_t launch_pair_registers_float16(const Pair& p, int parts, cudaStream_t stream) {
  return launch_pair_registers<__half>(p, parts, stream);
}

}  // namespace structlayers
