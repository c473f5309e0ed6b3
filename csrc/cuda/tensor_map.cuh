// Matrices as the TMA of sm_90 and later knows them: one thread's instruction brings a box of one to shared memory.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include "bulk_copy.cuh"

namespace qsharded {

using EncodeTensorMap = PFN_cuTensorMapEncodeTiled_v12000;

// The driver's function, or null where the driver is too old to have it.
inline EncodeTensorMap tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return found;
}

// A tensor of kRank dimensions, the innermost first; the strides of the others in bytes, multiples of 16. What a box holds
// beyond the tensor's end comes as 0.
template <int kRank>
struct BoxedTensor {
  CUtensorMapDataType type;
  const void* at;
  cuuint64_t sizes[kRank];
  cuuint64_t strides[kRank - 1];
  cuuint32_t box[kRank];
  CUtensorMapSwizzle swizzle;

  cudaError_t encode(CUtensorMap* map) const {
    cuuint32_t every[kRank];
    for (cuuint32_t& step : every) step = 1;
    const CUresult result = tensor_map_encoder()(map, type, kRank, const_cast<void*>(at), sizes, strides, box, every,
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
  }
};

#if __CUDA_ARCH__ >= 900
// Boxes begin at multiples of 16 bytes: elsewhere the instruction is illegal.
__device__ inline void tma_load(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ inline void tma_load(void* to, const CUtensorMap& map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
#endif

}  // namespace qsharded
