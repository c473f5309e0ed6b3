// NF4 dequantize: out = levels[code] * absmax in fp32, rounded once; absmax of 8 bits is decoded in the same pass.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4.cuh"

namespace qsharded {
namespace {

#ifndef THREADS
#define THREADS 128
#endif
#ifndef STORE
#define STORE(pointer, value) __stcs(pointer, value)
#endif
#ifndef LOAD
#define LOAD(pointer) __ldcs(pointer)
#endif
constexpr int kThreads = THREADS;
constexpr int kWarps = kThreads / kWarp;

// A thread writes 16 bytes at a time, so that a warp's stores are whole lines, and reads the codes that make them.
template <typename Out>
struct Vector {
  static constexpr int kWeights = 8;
  using Codes = uint32_t;
};
template <>
struct Vector<float> {
  static constexpr int kWeights = 4;
  using Codes = uint16_t;
};

struct Absmax {
  const void* values;  // fp32 where scales is null, else 8-bit codes
  int64_t row_stride;
  unsigned blocks_per_row;
  const float* scales;
  const float* offset;
  const float* map;

  template <bool kDoubleQuant>
  __device__ float at(unsigned block) const {
    int64_t index = block;
    if (row_stride != blocks_per_row) index += block / blocks_per_row * (row_stride - blocks_per_row);
    if constexpr (!kDoubleQuant) return static_cast<const float*>(values)[index];
    const float entry = __ldg(map + static_cast<const uint8_t*>(values)[index]);
    return __fadd_rn(__fmul_rn(entry, __ldg(scales + block / kAbsmaxBlock)), __ldg(offset));
  }
};

__device__ inline void store_pair(__nv_bfloat162* out, float first, float second) {
  *out = __floats2bfloat162_rn(first, second);
}
__device__ inline void store_pair(__half2* out, float first, float second) { *out = __floats2half2_rn(first, second); }
__device__ inline void store_pair(float2* out, float first, float second) { *out = make_float2(first, second); }

template <typename Out>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<float> {
  using type = float2;
};

// 16 bytes of weights. levels lies in shared memory: its 16 entries are in 16 banks, so no look-up waits for another.
template <typename Out>
__device__ uint4 decode(uint32_t codes, float absmax, const float* levels) {
  // every nibble times four: a byte's offset into levels
  const uint32_t first = codes >> 2 & 0x3C3C3C3Cu;
  const uint32_t second = codes << 2 & 0x3C3C3C3Cu;
  const auto level = [levels](uint32_t offsets, int byte) {
    const char* base = reinterpret_cast<const char*>(levels);
    return *reinterpret_cast<const float*>(base + __byte_perm(offsets, 0, 0x4440 + byte));
  };
  uint4 out;
  auto* pairs = reinterpret_cast<typename PairOf<Out>::type*>(&out);
#pragma unroll
  for (int i = 0; i < Vector<Out>::kWeights / 2; ++i) {
    store_pair(pairs + i, __fmul_rn(level(first, i), absmax), __fmul_rn(level(second, i), absmax));
  }
  return out;
}

// A warp decodes 32 blocks, each lane the absmax of one of them, and needs no other warp: no barrier, and while one
// waits for memory the others write.
template <typename Out, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const typename Vector<Out>::Codes* codes, unsigned blocks, Absmax absmax, const float* levels,
                      uint4* out) {
  constexpr int kLanes = kBlock / Vector<Out>::kWeights;  // that share a block
  constexpr int kRounds = kLanes;                         // 32 blocks of kLanes vectors over 32 lanes
  __shared__ float own_levels[kWarps][16];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned first_block = (blockIdx.x * kWarps + warp) * kWarp;
  const int64_t first_vector = static_cast<int64_t>(first_block) * kLanes + lane;
  // how far this lane's vectors reach, in strides of a warp; beyond the last block not at all
  const int64_t left = static_cast<int64_t>(blocks) * kLanes - first_vector;
  const int inside = static_cast<int>(min(max(left, int64_t{0}), int64_t{kRounds * kWarp}));
  codes += first_vector;
  out += first_vector;

  typename Vector<Out>::Codes loaded[kRounds];  // all in flight before the first is used
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    loaded[i] = i * kWarp < inside ? LOAD(codes + i * kWarp) : 0;
  }
  if (lane < 16) own_levels[warp][lane] = __ldg(levels + lane);
  const unsigned block = first_block + lane;
  const float own_absmax = block < blocks ? absmax.template at<kDoubleQuant>(block) : 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const float its_absmax = __shfl_sync(~0u, own_absmax, (i * kWarp + lane) / kLanes);
    const uint4 weights = decode<Out>(loaded[i], its_absmax, own_levels[warp]);
    if (i * kWarp < inside) STORE(out + i * kWarp, weights);
  }
}

template <typename Out>
int dequantize(const uint8_t* codes, unsigned blocks, const Absmax& absmax, const float* levels, void* out,
               cudaStream_t stream) {
  const auto kernel = absmax.scales ? dequantize_kernel<Out, true> : dequantize_kernel<Out, false>;
  kernel<<<ceil_div(blocks, kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<const typename Vector<Out>::Codes*>(codes), blocks, absmax, levels, static_cast<uint4*>(out));
  return launch_result();
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_nf4_dequantize(const uint8_t* codes, int64_t rows, int64_t blocks_per_row, const void* absmax,
                                 int64_t absmax_row_stride, const float* absmax_scales, const float* absmax_offset,
                                 const float* absmax_map, const float* levels, void* out, int dtype, void* stream) {
  const int64_t blocks = rows * blocks_per_row;
  if (blocks == 0) return QSHARDED_OK;
  if (blocks > kMostBlocks) return QSHARDED_BAD_SIZE;
  const Absmax source = {absmax, absmax_row_stride, static_cast<unsigned>(blocks_per_row), absmax_scales,
                         absmax_offset, absmax_map};
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  if (dtype == QSHARDED_BFLOAT16) return dequantize<__nv_bfloat16>(codes, count, source, levels, out, on);
  if (dtype == QSHARDED_FLOAT16) return dequantize<__half>(codes, count, source, levels, out, on);
  if (dtype == QSHARDED_FLOAT32) return dequantize<float>(codes, count, source, levels, out, on);
  return QSHARDED_BAD_DTYPE;
}
