// The fused product's plain C interface: which kernel serves which sizes.
#include <algorithm>
#include <atomic>

#include "linear_mma.cuh"
#include "linear_stream.cuh"
#include "linear_vector.cuh"
#include "linear_vector_small.cuh"
#include "linear_wgmma.cuh"

namespace qsharded {
namespace {

constexpr int64_t kMostColumns = 1 << 20;  // offsets within a tile are 32-bit
constexpr int64_t kMostM = 1 << 15;        // of a grid's second axis
// numbers of weights
constexpr int64_t kTiniest = 1 << 23, kTiny = 1 << 24, kSmall = 1 << 25, kMedium = 1 << 26, kLarge = 1 << 27;

std::atomic<int> most_shared_bytes{INT32_MAX};  // see qsharded_cuda_nf4_linear_assume

template <typename T>
struct Kernel {
  int64_t most_m;  // in a launch
  int64_t (*workspace)(const LinearSizes&);
  cudaError_t (*launch)(const LinearArguments<T>&, cudaStream_t);
};

template <typename T>
Kernel<T> vector_kernel() {
  return {1, vector_workspace, launch_vector<T>};
}

template <typename T>
Kernel<T> vector_small_kernel() {
  return {1, [](const LinearSizes&) { return int64_t{0}; }, launch_vector_small<T>};
}

template <typename T, typename Config>
Kernel<T> mma_kernel() {
  using Shape = MmaShape<Config>;
  return {kMostM, mma_workspace<Shape>, launch_mma<Shape, T>};
}

template <typename T, typename Config>
Kernel<T> stream_kernel() {
  using Shape = StreamShape<Config>;
  return {kMostM, mma_workspace<Shape>, launch_stream<Shape, T>};
}

template <typename T, typename Config>
Kernel<T> wgmma_kernel() {
  using Shape = WgmmaShape<Config>;
  return {Shape::kM, wgmma_workspace<Shape>, launch_wgmma<Shape, T>};
}

using MostWgmma = WgmmaShape<Wgmma256>;

// Whether setmaxnreg finds the registers that consumers ask for. Kernels that are built for other targets are empty, and
// have none to hand over.
template <typename T, Absmax kAbsmax>
bool fits_setmaxnreg() {
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, linear_wgmma_kernel<MostWgmma, T, kAbsmax>) != cudaSuccess) {
    cudaGetLastError();  // no later launch is to find it
    return false;
  }
  const int allocated = (found.numRegs + 7) / 8 * 8;  // as the hardware does
  return allocated * MostWgmma::kThreads >= MostWgmma::kRegisters;
}

template <typename T>
bool wgmma_is_built() {
  return fits_setmaxnreg<T, Absmax::kFloats>() && fits_setmaxnreg<T, Absmax::kCodes>() &&
         fits_setmaxnreg<T, Absmax::kBoxedCodes>();
}

// Devices that have so much shared memory are those for which kernels on rings are built.
bool has_rings(const Device& device) {
  return device.major >= 9 && device.shared_bytes >= kMostRingBytes && tensor_map_encoder() != nullptr;
}

bool has_wgmma(const Device& device) {
  if (device.major != 9 || device.minor != 0 || !has_rings(device)) return false;
  static const bool built = wgmma_is_built<__nv_bfloat16>() && wgmma_is_built<__half>();
  return built;
}

// Smaller weights have too few tiles for CTAs of more warpgroups.
template <typename T>
Kernel<T> choose_wgmma(int64_t m, int64_t weights) {
  const bool large = weights >= kLarge;
  if (m <= 32) return large ? wgmma_kernel<T, Wgmma32Large>() : wgmma_kernel<T, Wgmma32>();
  if (m <= 64) return large ? wgmma_kernel<T, Wgmma64Large>() : wgmma_kernel<T, Wgmma64>();
  return m <= 128 ? wgmma_kernel<T, Wgmma128>() : wgmma_kernel<T, Wgmma256>();
}

// Tiles of such height that whole ones fill the SMs, where one does; higher ones spare loads of x. More than 16 rows of x
// take several tiles, which share the SMs.
template <typename T>
Kernel<T> choose_stream(const LinearSizes& s, int64_t weights) {
  const auto fills = [&](int tile_rows) {
    return Partition::fills(ceil_div(s.rows, tile_rows), std::max<int>(s.sms / ceil_div(s.m, 16), 1));
  };
  if (s.m <= 8) {
    if (weights >= kLarge) return stream_kernel<T, Stream128x8>();
    if (fills(112)) return stream_kernel<T, Stream112x8>();
    if (fills(64)) return stream_kernel<T, Stream64x8>();
    return weights < kSmall ? stream_kernel<T, Stream32x8>() : stream_kernel<T, Stream128x8>();
  }
  if (weights < kTiny && (s.m > 32 || (s.m > 16 && weights < kTiniest))) return stream_kernel<T, Stream64x32>();
  if (weights < kLarge && fills(112)) return stream_kernel<T, Stream112x16>();
  if (fills(64)) return stream_kernel<T, Stream64x16>();
  return weights >= kMedium ? stream_kernel<T, Stream128x16>() : stream_kernel<T, Stream32x16>();
}

// Of H100 and H200, where more rows are the faster by wgmma from some number of weights on.
bool prefers_stream(int64_t m, int64_t weights) { return m <= 16 || weights < (m <= 32 ? kSmall : kTiny); }

// From benchmarks on an H200. Devices with 99 KB of shared memory (sm_86, 89, 120) get linear_vector_small.cuh and
// linear_mma.cuh; no other device but sm_90 gets wgmma.
template <typename T>
Kernel<T> choose(const LinearSizes& s, const Device& device) {
  const int64_t weights = s.rows * s.blocks_per_row * kBlock;
  const bool rings = has_rings(device), wgmma = has_wgmma(device);
  if (s.m == 1 && s.rows >= kRowBatch && weights < (rings ? kTiny : kSmall)) return vector_small_kernel<T>();
  if (rings && (!wgmma || prefers_stream(s.m, weights))) return choose_stream<T>(s, weights);
  if (wgmma) return choose_wgmma<T>(s.m, weights);
  if (s.m == 1 && s.rows >= kBatch && device.shared_bytes >= kVectorSharedBytes) return vector_kernel<T>();
  return s.m <= 8 ? mma_kernel<T, Mma128x8>() : mma_kernel<T, Mma128x16>();
}

// The current one, as choices are to see it.
Device assumed_device() {
  Device device = Device::current();
  device.shared_bytes = std::min<int>(device.shared_bytes, most_shared_bytes);
  return device;
}

template <typename T>
int run(const void* x, int64_t m, const PackedWeight& w, const void* bias, void* y, void* workspace, void* stream) {
  const Device device = assumed_device();
  const Kernel<T> kernel = choose<T>({m, w.rows, w.blocks_per_row, device.sms}, device);
  LinearArguments<T> a = {w, nullptr, 0, nullptr, static_cast<const T*>(bias), static_cast<uint8_t*>(workspace),
                          device.sms};
  for (int64_t m0 = 0; m0 < m; m0 += kernel.most_m) {
    a.m = static_cast<int>(m - m0 < kernel.most_m ? m - m0 : kernel.most_m);
    a.x = static_cast<const T*>(x) + m0 * w.blocks_per_row * kBlock;
    a.y = static_cast<T*>(y) + m0 * w.rows;
    const cudaError_t error = kernel.launch(a, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return result_of(error);
  }
  return QSHARDED_OK;
}

template <typename T>
int64_t workspace_bytes(int64_t m, int64_t rows, int64_t blocks_per_row) {
  const Device device = assumed_device();
  LinearSizes sizes = {m, rows, static_cast<int>(blocks_per_row), device.sms};
  const Kernel<T> kernel = choose<T>(sizes, device);
  sizes.m = std::min(m, kernel.most_m);
  return kernel.workspace(sizes);
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

void qsharded_cuda_nf4_linear_assume(int shared_bytes) { most_shared_bytes = shared_bytes; }

int64_t qsharded_cuda_nf4_linear_workspace(int dtype, int64_t m, int64_t rows, int64_t blocks_per_row) {
  if (m == 0 || rows == 0) return 0;
  return dtype == QSHARDED_FLOAT16 ? workspace_bytes<__half>(m, rows, blocks_per_row)
                                   : workspace_bytes<__nv_bfloat16>(m, rows, blocks_per_row);
}

int qsharded_cuda_nf4_linear(const void* x, int dtype, int64_t m, const uint8_t* codes, int64_t rows,
                             int64_t blocks_per_row, const void* absmax, int64_t absmax_row_stride,
                             const float* absmax_scales, const float* absmax_offset, const float* absmax_map,
                             const float* codebook, float factor, const void* bias, void* y, void* workspace,
                             void* stream) {
  if (m == 0 || rows == 0) return QSHARDED_OK;
  if (rows * blocks_per_row > kMostBlocks || blocks_per_row * kBlock > kMostColumns || m > INT32_MAX) {
    return QSHARDED_BAD_SIZE;
  }
  const PackedWeight w = {codes, absmax, absmax_row_stride, absmax_scales, absmax_offset, absmax_map, codebook, factor,
                          rows, static_cast<int>(blocks_per_row)};
  if (dtype == QSHARDED_BFLOAT16) return run<__nv_bfloat16>(x, m, w, bias, y, workspace, stream);
  if (dtype == QSHARDED_FLOAT16) return run<__half>(x, m, w, bias, y, workspace, stream);
  return QSHARDED_BAD_DTYPE;
}
