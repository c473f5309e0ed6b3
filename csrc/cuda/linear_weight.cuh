// How the fused product reads W: 16 code bytes a lane, decoded to the bf16 or fp16 pairs that the tensor cores take as
// their A operand. A weight is fp32 level * absmax rounded once, as dequantize has it, so both give the same bits.
//
// Within a piece of 128 columns lane t of four holds columns 32t to 32t+31 of its row: 16 consecutive bytes, one block's
// half. The tensor cores see the columns in another order; the activations are laid out in that order too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4.cuh"

namespace qsharded {

constexpr int kPiece = 128;                     // columns of W that a warp decodes at a time
constexpr int kPieceBlocks = kPiece / kBlock;
constexpr int kTableCopies = 16;  // of a byte's two levels: one for every pair of banks
constexpr int kTableRow = 256;    // bytes, half of them unused: one byte permutation then makes a table offset
constexpr int kTableBytes = 256 * kTableRow;
constexpr int kMapBytes = 256 * 4;

struct PackedWeight {
  const uint8_t* codes;
  const void* absmax;  // fp32 where scales is null, else 8-bit codes
  int64_t absmax_row_stride;
  const float* absmax_scales;
  const float* absmax_offset;
  const float* absmax_map;
  const float* levels;
  int64_t rows;
  int blocks_per_row;
};

struct RawAbsmax {
  uint32_t bits;  // 8 of them
  float scale;    // or, not double-quantized, the absmax itself
};

// Where the condition is false the register stays. Predicates in place of branches: at a branch the compiler would wait
// for the wgmma under way.
__device__ inline void load_codes(uint4& loaded, const uint8_t* codes, bool condition) {
  // read once: no place in L1
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
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

// This lane's block within a piece.
__device__ inline int own_block() { return threadIdx.x % 4 / 2; }

// 16 rows of a piece, as a warp holds them: lane 4g + t has 16 bytes each of rows g and g + 8, and one of the four
// absmax of its quad, which shares them out when they are decoded.
struct Strip {
  struct {
    uint4 upper, lower;
  } codes;
  RawAbsmax absmax;
  unsigned scale_number;  // of absmax.scale
};

__device__ inline Strip empty_strip() {
  Strip strip = {};
  strip.scale_number = ~0u;
  return strip;
}

// A tile's rows. Those beyond the weight's last are computed and not written. Within a tile 32 bits reach.
struct TileRows {
  int64_t first;
  unsigned last;  // from the first

  __device__ TileRows(const PackedWeight& w, int64_t first)
      : first(first), last(static_cast<unsigned>(min(w.rows - 1 - first, int64_t{0xFFFF}))) {}
};

// first_row: the strip's, from the tile's; block: this lane's.
__device__ inline void load_codes(Strip& strip, const PackedWeight& w, const TileRows& tile, int first_row, int block,
                                  bool inside) {
  inside = inside && block < w.blocks_per_row;
  const unsigned upper = first_row + threadIdx.x % kWarp / 4, lower = upper + 8;
  const unsigned stride = w.blocks_per_row * (kBlock / 2);
  const unsigned byte = block * (kBlock / 2) + threadIdx.x % 2 * 16;
  const uint8_t* codes = w.codes + tile.first * stride;
  load_codes(strip.codes.upper, codes + (min(upper, tile.last) * stride + byte), inside);
  load_codes(strip.codes.lower, codes + (min(lower, tile.last) * stride + byte), inside);
}

template <bool kDoubleQuant>
__device__ inline void load_absmax(Strip& strip, const PackedWeight& w, const TileRows& tile, int first_row, int block,
                                   bool inside) {
  inside = inside && block < w.blocks_per_row;
  const unsigned row = min(first_row + threadIdx.x % kWarp / 4 + threadIdx.x % 2 * 8, tile.last);
  const int64_t at = tile.first * w.absmax_row_stride + (row * static_cast<unsigned>(w.absmax_row_stride) + block);
  if constexpr (kDoubleQuant) {
    load_if(strip.absmax.bits, static_cast<const uint8_t*>(w.absmax) + at, inside);
    // a row's blocks share few scales
    const unsigned number = ((static_cast<unsigned>(tile.first) + row) * w.blocks_per_row + block) / kAbsmaxBlock;
    const bool other = inside && number != strip.scale_number;
    load_if(strip.absmax.scale, w.absmax_scales + number, other);
    strip.scale_number = other ? number : strip.scale_number;
  } else {
    load_if(strip.absmax.scale, static_cast<const float*>(w.absmax) + at, inside);
  }
}

// Beyond the last column zero, whatever the map holds: the codes there are no codes.
template <bool kDoubleQuant>
__device__ inline float decode_absmax(RawAbsmax raw, const float* map, float offset, bool inside) {
  float absmax = raw.scale;
  if constexpr (kDoubleQuant) absmax = __fadd_rn(__fmul_rn(map[raw.bits], raw.scale), offset);
  return inside ? absmax : 0;
}

// The table: for every byte its two levels, in 16 copies, so that the 16 lanes that shared memory serves at a time
// find theirs in different banks. All loads are under way before the first store.
template <int kThreads>
__device__ inline void fill_table(uint8_t* table, const float* levels) {
  constexpr int kVectors = kTableCopies * 8 / 16, kRounds = (256 * kVectors + kThreads - 1) / kThreads;
  float2 pairs[kRounds];
#pragma unroll
  for (int j = 0; j < kRounds; ++j) {
    const int byte = (threadIdx.x + j * kThreads) / kVectors % 256;
    pairs[j] = make_float2(__ldg(levels + (byte >> 4)), __ldg(levels + (byte & 15)));
  }
#pragma unroll
  for (int j = 0; j < kRounds; ++j) {
    const int i = threadIdx.x + j * kThreads;
    const float4 vector = make_float4(pairs[j].x, pairs[j].y, pairs[j].x, pairs[j].y);
    if (i < 256 * kVectors) *reinterpret_cast<float4*>(table + i / kVectors * kTableRow + i % kVectors * 16) = vector;
  }
}

// The map of 8-bit absmax; returns their offset.
template <int kThreads>
__device__ inline float fill_map(float* map, const PackedWeight& w) {
  for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = __ldg(w.absmax_map + i);
  return __ldg(w.absmax_offset);
}

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

// This lane's copy within a row of the table.
__device__ inline uint32_t table_copy() { return threadIdx.x % kTableCopies * 8; }

template <typename T, int kByte>
__device__ inline uint32_t decode_byte(uint32_t word, const uint8_t* table, uint32_t copy, float absmax) {
  const uint32_t offset = __byte_perm(word, copy, 0x5504 | kByte << 4);  // 256 * byte + copy
  const float2 levels = *reinterpret_cast<const float2*>(table + offset);
  return Pair<T>::pack(__fmul_rn(levels.x, absmax), __fmul_rn(levels.y, absmax));
}

// The A operand of one k16 step: bytes 2 kHalf and 2 kHalf + 1 of a word of row g and of row g + 8.
template <typename T, int kHalf>
__device__ inline void decode_step(uint32_t upper, uint32_t lower, const uint8_t* table, uint32_t copy,
                                   float upper_absmax, float lower_absmax, uint32_t (&a)[4]) {
  a[0] = decode_byte<T, 2 * kHalf>(upper, table, copy, upper_absmax);
  a[1] = decode_byte<T, 2 * kHalf>(lower, table, copy, lower_absmax);
  a[2] = decode_byte<T, 2 * kHalf + 1>(upper, table, copy, upper_absmax);
  a[3] = decode_byte<T, 2 * kHalf + 1>(lower, table, copy, lower_absmax);
}

}  // namespace qsharded
