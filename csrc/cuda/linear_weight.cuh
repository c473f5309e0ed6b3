// How the fused product reads W: codes decoded, on their way through registers, to the bf16 or fp16 pairs that the tensor
// cores take as their A operand. Two ways:
//
//   CodebookTable  a weight is fp32 value * absmax rounded once, as dequantize has it, so both give the same bits.
//   PairTable      a weight is value * factor rounded; accumulators are scaled by absmax / factor once a block. Half the
//                  bytes are looked up, and no weight is multiplied. The factor is such that rounding errs less than it
//                  does above (qsharded/quant/own_kernels.py).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4.cuh"

namespace qsharded {

constexpr int kKTileBlocks = 4;  // a lane of four each
constexpr int kKTile = kKTileBlocks * kBlock;
constexpr int kWords = kBlock / 8;  // of a block's codes, 32 bits each
constexpr int kMapBytes = 256 * 4;

struct PackedWeight {
  const uint8_t* codes;
  const void* absmax;  // fp32 where scales is null, else 8-bit codes
  int64_t absmax_row_stride;
  const float* absmax_scales;
  const float* absmax_offset;
  const float* absmax_map;
  const float* codebook;
  float factor;  // of values that are rounded before they meet absmax
  int64_t rows;
  int blocks_per_row;
};

// Where the condition is false the register stays. Predicates in place of branches: at a branch the compiler would wait
// for the wgmma under way.
__device__ inline void load_if(uint4& loaded, const uint8_t* codes, bool condition) {
  // a sector is read in two halves, one after the other, and then no more
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::evict_first.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(loaded.x), "+r"(loaded.y), "+r"(loaded.z), "+r"(loaded.w)
      : "l"(codes), "r"(static_cast<int>(condition)));
}

__device__ inline void load_if(uint32_t& loaded, const uint8_t* from, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.nc.u8 %0, [%1];\n}"
               : "+r"(loaded)
               : "l"(from), "r"(static_cast<int>(condition)));
}

__device__ inline void load_if(float& loaded, const float* from, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p ld.global.nc.f32 %0, [%1];\n}"
               : "+f"(loaded)
               : "l"(from), "r"(static_cast<int>(condition)));
}

// Where a tile's rows begin, and the two of them that a lane has. Rows beyond the weight's last are computed and not
// written. Within a tile 32 bits reach.
template <bool kDoubleQuant>
struct TileRows {
  const uint8_t* codes;
  const uint8_t* absmax;
  unsigned number;  // of the first row's first block
  unsigned upper, lower;

  // own_row: from the tile's first; the other is eight rows below.
  __device__ TileRows(const PackedWeight& w, int64_t first, int own_row) {
    const unsigned last = static_cast<unsigned>(min(w.rows - 1 - first, int64_t{0xFFFF}));
    codes = w.codes + first * w.blocks_per_row * (kBlock / 2);
    absmax = static_cast<const uint8_t*>(w.absmax) + first * w.absmax_row_stride * (kDoubleQuant ? 1 : 4);
    number = static_cast<unsigned>(first) * w.blocks_per_row;
    upper = min(static_cast<unsigned>(own_row), last), lower = min(own_row + 8u, last);
  }
};

// One row's block, as a lane holds it: 128 codes in two halves, which come and go separately.
struct Block {
  uint4 half[2];
  uint32_t absmax_bits;  // 8 of them
  float scale;           // or, not double-quantized, the absmax itself

  // Half 0 brings the absmax too.
  template <bool kDoubleQuant, int kHalf>
  __device__ void load(const PackedWeight& w, const TileRows<kDoubleQuant>& tile, unsigned row, unsigned block,
                       bool inside) {
    const unsigned G = w.blocks_per_row;
    load_if(half[kHalf], tile.codes + (row * G + block) * (kBlock / 2) + kHalf * 16, inside);
    if constexpr (kHalf == 0) {
      const unsigned at = row * static_cast<unsigned>(w.absmax_row_stride) + block;
      if constexpr (kDoubleQuant) {
        load_if(absmax_bits, tile.absmax + at, inside);
        load_if(scale, w.absmax_scales + (tile.number + row * G + block) / kAbsmaxBlock, inside);
      } else {
        load_if(scale, reinterpret_cast<const float*>(tile.absmax) + at, inside);
      }
    }
  }

  // Beyond the last column zero, whatever the map holds: the codes there are no codes.
  template <bool kDoubleQuant>
  __device__ float absmax(const float* map, float offset, bool inside) const {
    float absmax = scale;
    if constexpr (kDoubleQuant) absmax = decode_absmax(map[absmax_bits], scale, offset);
    return inside ? absmax : 0;
  }

  __device__ uint32_t word(int i) const {
    const uint4& of = half[i / 4];
    return i % 4 == 0 ? of.x : i % 4 == 1 ? of.y : i % 4 == 2 ? of.z : of.w;
  }
};

// The map of 8-bit absmax and their offset. Loaded first and stored later, for the first loads of a kernel take long.
template <bool kDoubleQuant>
struct AbsmaxMap {
  float entry = 0, offset = 0;

  __device__ explicit AbsmaxMap(const PackedWeight& w) {
    if constexpr (!kDoubleQuant) return;
    if (threadIdx.x < 256) entry = __ldg(w.absmax_map + threadIdx.x);
    offset = __ldg(w.absmax_offset);
  }

  __device__ void store(float* map) const {
    if (threadIdx.x < 256) map[threadIdx.x] = entry;
  }
};

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};
template <>
struct Pair<__half> {
  static __device__ uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// In shared memory, every byte's two codebook, in 16 copies, so that the 16 lanes that shared memory serves at a time find
// theirs in different banks.
struct CodebookTable {
  static constexpr int kCopies = 16;
  static constexpr int kRow = kCopies * 8;  // bytes
  static constexpr int kBytes = 256 * kRow;

  uint32_t own;  // this lane's copy of the first entry

  __device__ explicit CodebookTable(const uint8_t* table)
      : own(static_cast<uint32_t>(__cvta_generic_to_shared(table)) + threadIdx.x % kCopies * 8) {}

  // All loads are under way before the first store.
  template <int kFewestThreads>
  static __device__ void fill(uint8_t* table, const float* codebook, int threads = kFewestThreads) {
    constexpr int kVectors = kRow / 16, kRounds = (256 * kVectors + kFewestThreads - 1) / kFewestThreads;
    float2 pairs[kRounds];
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int byte = (threadIdx.x + j * threads) / kVectors % 256;
      pairs[j] = make_float2(__ldg(codebook + (byte >> 4)), __ldg(codebook + (byte & 15)));
    }
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int i = threadIdx.x + j * threads;
      const float4 vector = make_float4(pairs[j].x, pairs[j].y, pairs[j].x, pairs[j].y);
      if (i < 256 * kVectors) *reinterpret_cast<float4*>(table + i * 16) = vector;
    }
  }

  // The values of a word's four bytes.
  __device__ void look_up(uint32_t word, float2 (&pairs)[4]) const {
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t entry = __dp4a(word, static_cast<uint32_t>(kRow) << 8 * byte, own);  // own + kRow * the byte
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pairs[byte].x), "=f"(pairs[byte].y) : "r"(entry));
    }
  }

  // The word's weights, as dequantize has them.
  template <typename T>
  __device__ void decode(uint32_t word, float absmax, uint32_t (&weights)[4]) const {
    float2 pairs[4];
    look_up(word, pairs);
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      weights[byte] = Pair<T>::pack(__fmul_rn(pairs[byte].x, absmax), __fmul_rn(pairs[byte].y, absmax));
    }
  }
};

// In shared memory, every byte's two values times the factor, in x's type, in a copy for each lane: no two lanes meet in a
// bank.
template <typename T>
struct PairTable {
  static constexpr int kRow = kWarp * 4;  // bytes
  static constexpr int kBytes = 256 * kRow;

  uint32_t own;  // this lane's copy of the first entry

  __device__ explicit PairTable(const uint8_t* table)
      : own(static_cast<uint32_t>(__cvta_generic_to_shared(table)) + threadIdx.x % kWarp * 4) {}

  // All loads are under way before the first store.
  template <int kThreads>
  static __device__ void fill(uint8_t* table, const float* codebook, float factor) {
    constexpr int kVectors = kRow / 16, kRounds = (256 * kVectors + kThreads - 1) / kThreads;
    float2 values[kRounds];
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int byte = (threadIdx.x + j * kThreads) / kVectors % 256;
      values[j] = make_float2(__ldg(codebook + (byte >> 4)), __ldg(codebook + (byte & 15)));
    }
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int i = threadIdx.x + j * kThreads;
      const uint32_t pair = Pair<T>::pack(__fmul_rn(values[j].x, factor), __fmul_rn(values[j].y, factor));
      if (i < 256 * kVectors) *reinterpret_cast<uint4*>(table + i * 16) = make_uint4(pair, pair, pair, pair);
    }
  }

  // The pairs of two words' eight bytes.
  __device__ void decode(uint2 words, uint32_t (&pairs)[8]) const {
#pragma unroll
    for (int byte = 0; byte < 8; ++byte) {
      const uint32_t word = byte < 4 ? words.x : words.y;
      const uint32_t entry = __dp4a(word, static_cast<uint32_t>(kRow) << 8 * (byte % 4), own);  // own + kRow * the byte
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pairs[byte]) : "r"(entry));
    }
  }
};

}  // namespace qsharded
