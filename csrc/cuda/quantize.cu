// NF4 quantize: a block's absmax, and how many midpoints lie below weight * (1 / max(absmax, 1e-38)) in fp32.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "nf4.cuh"

namespace qsharded {
namespace {

#ifndef QTHREADS
#define QTHREADS 256
#endif
#ifndef QVECTORS
#define QVECTORS 8
#endif
constexpr int kThreads = QTHREADS;
constexpr int kVectors = QVECTORS;  // 16-byte loads of a thread, all in flight before the first is used
constexpr int kMidpoints = 15;

// [-1, 1] in 32 bins narrower than any two midpoints are apart: a bin has one midpoint at most, so one comparison ends
// the search. Each table has one entry a bank, so no look-up waits for another.
struct Bins {
  float midpoint[32];   // infinity where the bin has none
  unsigned below[32];   // midpoints in the bins below
};

// Four times the bin: 0, 4, .. 124, never falling as `scaled` grows. NaN has a bin too.
__device__ inline unsigned bin_offset(float scaled) {
  constexpr float kAdjust = 0x1p23f + 62;  // beside 2^23 a float's last bit is 1
  return __float_as_uint(fmaf(scaled, 62.0f, kAdjust)) & 124u;
}

// By one warp.
__device__ void fill(Bins* bins, const float* midpoints) {
  const unsigned lane = threadIdx.x;
  const float own = lane < kMidpoints ? __ldg(midpoints + lane) : 0;
  float midpoint = INFINITY;
  unsigned below = 0;
#pragma unroll
  for (int i = 0; i < kMidpoints; ++i) {
    const float other = __shfl_sync(~0u, own, i);
    const unsigned bin = bin_offset(other) / 4;
    if (bin == lane) midpoint = other;
    below += bin < lane;
  }
  bins->midpoint[lane] = midpoint;
  bins->below[lane] = below;
}

__device__ inline unsigned code_of(float scaled, const Bins* bins) {
  const unsigned offset = bin_offset(scaled);
  const auto entry = [offset](const void* table) { return static_cast<const char*>(table) + offset; };
  const float midpoint = *reinterpret_cast<const float*>(entry(bins->midpoint));
  const unsigned below = *reinterpret_cast<const unsigned*>(entry(bins->below));
  // the sign of a difference is exact
  return below + (__float_as_uint(__fsub_rn(midpoint, scaled)) >> 31);
}

// Without their sign bits floats order as integers do, and NaN is the largest.
__device__ inline unsigned largest(unsigned a, unsigned b) { return max(a, b); }

// 16 bytes of weights: their fp32 values, and the bits of the largest magnitude in a form that `merge` reduces.
template <typename In>
struct Weights;

template <>
struct Weights<float> {
  static constexpr int kCount = 4;
  using Magnitude = unsigned;
  static __device__ Magnitude magnitude(const uint4& v) {
    constexpr unsigned kNoSign = 0x7FFFFFFFu;
    return max(max(v.x & kNoSign, v.y & kNoSign), max(v.z & kNoSign, v.w & kNoSign));
  }
  static __device__ Magnitude merge(Magnitude a, Magnitude b) { return max(a, b); }
  static __device__ float value(Magnitude m) { return __uint_as_float(m); }
  static __device__ float2 pair(const uint4& v, int i) {
    return i == 0 ? make_float2(__uint_as_float(v.x), __uint_as_float(v.y))
                  : make_float2(__uint_as_float(v.z), __uint_as_float(v.w));
  }
};

__device__ inline unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <typename Pair>
__device__ inline Pair as_pair(unsigned bits) {
  return *reinterpret_cast<Pair*>(&bits);
}

// Two weights a word; the maxima of both halves are carried side by side.
template <typename Pair>
struct HalfWeights {
  static constexpr int kCount = 8;
  using Magnitude = unsigned;
  static __device__ Magnitude merge(Magnitude a, Magnitude b) {
    Pair larger = __hmax2_nan(as_pair<Pair>(a), as_pair<Pair>(b));
    return *reinterpret_cast<unsigned*>(&larger);
  }
  static __device__ Magnitude magnitude(const uint4& v) {
    constexpr unsigned kNoSigns = 0x7FFF7FFFu;
    return merge(merge(v.x & kNoSigns, v.y & kNoSigns), merge(v.z & kNoSigns, v.w & kNoSigns));
  }
};

template <>
struct Weights<__nv_bfloat16> : HalfWeights<__nv_bfloat162> {
  static __device__ float2 pair(const uint4& v, int i) {
    return make_float2(__uint_as_float(word(v, i) << 16), __uint_as_float(word(v, i) & 0xFFFF0000u));
  }
  static __device__ float value(Magnitude m) { return __uint_as_float(max(m << 16, m & 0xFFFF0000u)); }
};

template <>
struct Weights<__half> : HalfWeights<__half2> {
  static __device__ float2 pair(const uint4& v, int i) { return __half22float2(as_pair<__half2>(word(v, i))); }
  static __device__ float value(Magnitude m) {
    const unsigned larger = max(m & 0xFFFFu, m >> 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(larger)));
  }
};

// Two codes a byte, the first in the high nibble.
template <typename In>
__device__ unsigned encode(const uint4& weights, float scale, const Bins* bins) {
  unsigned codes = 0;
#pragma unroll
  for (int i = 0; i < Weights<In>::kCount / 2; ++i) {
    const float2 pair = Weights<In>::pair(weights, i);
    codes += code_of(__fmul_rn(pair.x, scale), bins) << (8 * i + 4);
    codes += code_of(__fmul_rn(pair.y, scale), bins) << (8 * i);
  }
  return codes;
}

template <typename In>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const uint4* weight, unsigned blocks, const float* midpoints, uint8_t* codes, float* absmax) {
  using W = Weights<In>;
  constexpr int kLanes = kBlock / W::kCount;  // that share a block
  constexpr int kVectorBytes = W::kCount / 2;
  __shared__ Bins bins;
  const int64_t vectors = static_cast<int64_t>(blocks) * kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  uint4 loaded[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector = first + i * kThreads;
    loaded[i] = vector < vectors ? __ldcs(weight + vector) : uint4{};
  }
  if (threadIdx.x < kWarp) fill(&bins, midpoints);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t vector = first + i * kThreads;
    typename W::Magnitude magnitude = W::magnitude(loaded[i]);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      magnitude = W::merge(magnitude, __shfl_xor_sync(~0u, magnitude, step));
    }
    const float own_absmax = W::value(magnitude);
    const unsigned packed = encode<In>(loaded[i], reciprocal(own_absmax), &bins);
    if (vector >= vectors) continue;
    if constexpr (kVectorBytes == 4) {
      reinterpret_cast<uint32_t*>(codes)[vector] = packed;
    } else {
      reinterpret_cast<uint16_t*>(codes)[vector] = static_cast<uint16_t>(packed);
    }
    if (vector % kLanes == 0) absmax[vector / kLanes] = own_absmax;
  }
}

template <typename In>
int quantize(const void* weight, unsigned blocks, const float* midpoints, uint8_t* codes, float* absmax,
             cudaStream_t stream) {
  constexpr int kBlocks = kThreads * kVectors * Weights<In>::kCount / kBlock;
  quantize_kernel<In><<<ceil_div(blocks, kBlocks), kThreads, 0, stream>>>(static_cast<const uint4*>(weight), blocks,
                                                                          midpoints, codes, absmax);
  return launch_result();
}

}  // namespace
}  // namespace qsharded

using namespace qsharded;

int qsharded_cuda_nf4_quantize(const void* weight, int dtype, int64_t blocks, const float* midpoints, uint8_t* codes,
                               float* absmax, void* stream) {
  if (blocks == 0) return QSHARDED_OK;
  if (blocks > kMostBlocks) return QSHARDED_BAD_SIZE;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  if (dtype == QSHARDED_BFLOAT16) return quantize<__nv_bfloat16>(weight, count, midpoints, codes, absmax, on);
  if (dtype == QSHARDED_FLOAT16) return quantize<__half>(weight, count, midpoints, codes, absmax, on);
  if (dtype == QSHARDED_FLOAT32) return quantize<float>(weight, count, midpoints, codes, absmax, on);
  return QSHARDED_BAD_DTYPE;
}
