// Whether this library can run here, and what went wrong where it cannot.
#include "nf4.cuh"

namespace qsharded {
namespace {

__global__ void probe_kernel() {}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_probe(void) {
  // fails for want of a driver, for one older than this runtime, and for a device that no code here was built for
  cudaFuncAttributes attributes;
  return result_of(cudaFuncGetAttributes(&attributes, probe_kernel));
}

const char* qsharded_cuda_error_string(int result) {
  return cudaGetErrorString(static_cast<cudaError_t>(result - QSHARDED_CUDA_ERROR));
}
