// How W comes to a ring of stages in shared memory: boxes of codes and of absmax, brought by the TMA of sm_90 and later, so
// that the load-store pipe, which bounds these kernels, is left to the look-ups.
//
// A box of codes is a tile of rows times a k-tile of 256 columns, rows of 128 bytes in the TMA's swizzle.
#pragma once

#include <type_traits>

#include "linear_weight.cuh"
#include "tensor_map.cuh"

// Shared memory for a ring: sm_90 to sm_110 have 227 KB, sm_120 and sm_121 99. Kernels on rings are empty there, which spares a
// library four fifths of its code for sm_120.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define QSHARDED_HAS_RINGS 1
#endif

namespace qsharded {

constexpr int kMostRingBytes = 227 << 10;  // of shared memory
constexpr int kBoxAlignment = 1024;        // of boxes that are swizzled
constexpr int kCodeRow = kKTile / 2;       // bytes of a box's row of codes
constexpr int kAbsmaxRow = 16;             // and of absmax, most of which others will want

// What absmax are, and how they come.
enum class Absmax {
  kFloats,      // by loads
  kCodes,       // double-quantized, by loads
  kBoxedCodes,  // double-quantized, in boxes
};

// Tensor maps take rows that are multiples of 16 bytes apart and do not overlap.
inline Absmax absmax_of(const PackedWeight& w) {
  if (!w.absmax_scales) return Absmax::kFloats;
  const bool fits = w.absmax_row_stride >= w.blocks_per_row && w.absmax_row_stride % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(w.absmax) % 16 == 0;
  return fits ? Absmax::kBoxedCodes : Absmax::kCodes;
}

// What `kernel` gives for a weight's Absmax, which it takes as a constant.
template <typename Kernel>
auto by_absmax(const PackedWeight& w, Kernel kernel) {
  switch (absmax_of(w)) {
    case Absmax::kBoxedCodes:
      return kernel(std::integral_constant<Absmax, Absmax::kBoxedCodes>{});
    case Absmax::kCodes:
      return kernel(std::integral_constant<Absmax, Absmax::kCodes>{});
    default:
      return kernel(std::integral_constant<Absmax, Absmax::kFloats>{});
  }
}

struct WeightMaps {
  CUtensorMap codes;   // [rows, bytes of codes]
  CUtensorMap absmax;  // [rows, entries], of kBoxedCodes
};

inline cudaError_t encode_weight(const PackedWeight& w, cuuint32_t box_rows, WeightMaps* maps) {
  const cuuint64_t rows = w.rows, blocks = w.blocks_per_row, stride = w.absmax_row_stride;
  const BoxedTensor<2> codes = {CU_TENSOR_MAP_DATA_TYPE_UINT8, w.codes, {blocks * (kBlock / 2), rows},
                                {blocks * (kBlock / 2)}, {kCodeRow, box_rows}, CU_TENSOR_MAP_SWIZZLE_128B};
  const BoxedTensor<2> absmax = {CU_TENSOR_MAP_DATA_TYPE_UINT8, w.absmax, {blocks, rows}, {stride},
                                 {kAbsmaxRow, box_rows}, CU_TENSOR_MAP_SWIZZLE_NONE};
  const cudaError_t error = codes.encode(&maps->codes);
  return error == cudaSuccess && absmax_of(w) == Absmax::kBoxedCodes ? absmax.encode(&maps->absmax) : error;
}

// The absmax of the lane's own block in kCount rows, each eight below the one before. What no box brings comes by loads, a
// unit ahead; the second level whenever it changes, for 256 blocks share an entry.
template <int kCount, Absmax kAbsmax>
struct RowsAbsmax {
  float scales[kCount] = {};  // or kFloats themselves
  uint32_t codes[kCount] = {};
  unsigned rows[kCount];
  unsigned first_blocks[kCount];  // of all blocks
  unsigned loaded[kCount];        // which scales these are

  __device__ RowsAbsmax() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) loaded[i] = ~0u;
  }

  // Rows beyond the weight's last are computed and not written.
  __device__ void begin(const PackedWeight& w, unsigned first_row) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      rows[i] = min(first_row + i * 8, static_cast<unsigned>(w.rows - 1));
      first_blocks[i] = rows[i] * w.blocks_per_row;
    }
  }

  __device__ void load(const PackedWeight& w, unsigned block, bool inside) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto at = [&] { return rows[i] * w.absmax_row_stride + block; };
      if constexpr (kAbsmax == Absmax::kFloats) {
        load_if(scales[i], static_cast<const float*>(w.absmax) + at(), inside);
        continue;
      }
      if constexpr (kAbsmax == Absmax::kCodes) load_if(codes[i], static_cast<const uint8_t*>(w.absmax) + at(), inside);
      const unsigned entry = (first_blocks[i] + block) / kAbsmaxBlock;
      const bool changes = inside && entry != loaded[i];
      load_if(scales[i], w.absmax_scales + entry, changes);
      loaded[i] = changes ? entry : loaded[i];
    }
  }

  // box: the box's row that row i is. Beyond the last column zero: the codes there are no codes.
  __device__ float of_row(int i, const uint8_t* box, unsigned block, bool inside, const float* map, float offset) const {
    if constexpr (kAbsmax == Absmax::kFloats) return inside ? scales[i] : 0;
    const uint32_t code = kAbsmax == Absmax::kBoxedCodes ? box[block % kAbsmaxRow] : codes[i];
    return inside ? decode_absmax(map[code], scales[i], offset) : 0;
  }
};

#if QSHARDED_HAS_RINGS
// Where a producer is in a ring. The phase is the parity of the one it waits for: of the one before the first, in the
// beginning, when every stage is empty.
template <int kStages>
struct PipelineState {
  unsigned stage = 0, phase = 1;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// What copy_weight brings, of so many rows.
template <Absmax kAbsmax>
__device__ constexpr int weight_bytes(int rows) {
  return rows * (kCodeRow + (kAbsmax == Absmax::kBoxedCodes ? kAbsmaxRow : 0));
}

template <Absmax kAbsmax>
__device__ inline void copy_weight(uint8_t* codes, uint8_t* absmax, const WeightMaps& maps, int row, int block,
                                   uint64_t* barrier) {
  if constexpr (kAbsmax == Absmax::kBoxedCodes) {
    tma_load(absmax, maps.absmax, block / kAbsmaxRow * kAbsmaxRow, row, barrier);  // as boxes must begin
  }
  tma_load(codes, maps.codes, block * (kBlock / 2), row, barrier);
}

__device__ inline uint2 load_shared_8(uint32_t address) {
  uint2 loaded;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(loaded.x), "=r"(loaded.y) : "r"(address));
  return loaded;
}

__device__ inline uint4 load_shared_16(uint32_t address) {
  uint4 loaded;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "r"(address));
  return loaded;
}

__device__ inline uint32_t row_swizzle() { return threadIdx.x % kWarp / 4 * 16; }  // of rows of 128 bytes

// Each of the four lanes of a row begins with another pair of its block's words, and so finds it in other banks.
__device__ inline int own_pair(int pair) { return pair ^ threadIdx.x % 4; }

// Where a lane's pair of words lies in its row of a box.
__device__ inline uint32_t words_at(int own_pair) {
  return (threadIdx.x % 4 * (kBlock / 2) + own_pair * 8) ^ row_swizzle();
}
#endif

}  // namespace qsharded
