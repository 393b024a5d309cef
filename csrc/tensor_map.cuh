// Descriptions of tensors in global memory for Hopper's copy engine, made on the host. No torch here.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace structlayers {

// The driver's function, without linking to the driver; null where it has none.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

struct TensorMapDimension {
  int64_t size, stride;  // elements; the first dimension has stride 1
  int box;
};

// False where the tensor has no map: an address or a stride that is no multiple of 16 bytes, say.
inline bool make_tensor_map(CUtensorMap& map, CUtensorMapDataType type, int element_bytes, const void* base,
                            CUtensorMapSwizzle swizzle, std::initializer_list<TensorMapDimension> dimensions) {
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5];
  int rank = 0;
  for (const TensorMapDimension& dimension : dimensions) {
    sizes[rank] = static_cast<cuuint64_t>(dimension.size);
    strides[rank] = static_cast<cuuint64_t>(dimension.stride * element_bytes);
    box[rank] = static_cast<cuuint32_t>(dimension.box);
    steps[rank++] = 1;
  }
  const auto encode = tensor_map_encoder();
  return encode != nullptr &&
         encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes, strides + 1, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace structlayers
