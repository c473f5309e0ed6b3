// How one row of x meets W: a slice of 256 columns is a warp's, eight columns a lane's; rows of W come eight at a time.
#pragma once

#include "linear_arguments.cuh"

namespace qsharded {

constexpr int kSliceBlocks = 4;
constexpr int kSlice = kSliceBlocks * kBlock;
constexpr int kRowBatch = 8;

inline int slices_of(int blocks_per_row) { return ceil_div(blocks_per_row, kSliceBlocks); }

// Of two values a lane keeps one and gets its partner's share of it.
__device__ inline float exchange(float low, float high, int distance) {
  const bool upper = threadIdx.x & distance;
  return (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, distance);
}

// Eight rows of a slice: a word of codes each, and the absmax of row lane % 8 and block lane / 8.
struct RowBatch {
  uint32_t codes[kRowBatch];
  uint32_t absmax_bits;
  float scale;  // or, not double-quantized, the absmax itself

  // Lanes beyond the last column load what their neighbours do.
  template <bool kDoubleQuant>
  __device__ void load(const PackedWeight& w, int64_t first_row, int slice) {
    const int lane = threadIdx.x % kWarp, stride = w.blocks_per_row * (kBlock / 2);
    const uint8_t* from = w.codes + first_row * stride + min(slice * (kSlice / 2) + lane * 4, stride - 4);
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i, from += stride) {
      asm volatile("ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];" : "=r"(codes[i]) : "l"(from));
    }
    const int64_t row = first_row + lane % 8;
    const int block = min(slice * kSliceBlocks + lane / 8, w.blocks_per_row - 1);
    const int64_t at = row * w.absmax_row_stride + block;
    if constexpr (kDoubleQuant) {
      absmax_bits = __ldg(static_cast<const uint8_t*>(w.absmax) + at);
      scale = __ldg(w.absmax_scales + static_cast<unsigned>(row * w.blocks_per_row + block) / kAbsmaxBlock);
    } else {
      scale = __ldg(static_cast<const float*>(w.absmax) + at);
    }
  }

  // Of the lanes' sums of each row: lane 8 b + r is left with row r over the lanes of block b, times its absmax.
  template <bool kDoubleQuant>
  __device__ float scaled_sum(float (&rows)[kRowBatch], const float* map, float offset, bool inside) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = exchange(rows[i], rows[i + 4], 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[i] = exchange(rows[i], rows[i + 2], 2);
    float absmax = scale;
    if constexpr (kDoubleQuant) absmax = decode_absmax(map[absmax_bits], scale, offset);
    return __fmul_rn(exchange(rows[0], rows[1], 1), inside ? absmax : 0);
  }
};

}  // namespace qsharded
