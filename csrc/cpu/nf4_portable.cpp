// NF4 in plain C++: what runs where no vector kernel fits, and the simplest statement of what those compute.
#include <algorithm>

#include "nf4_kernels.h"
#include "scalar_types.h"

namespace qsharded {
namespace {

// Fills values with the block in fp32 and returns its largest magnitude. Without their sign bits floats order as
// integers do, and NaN is the largest.
template <typename T>
float load_block(const T* weight, float* values) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; ++i) {
    values[i] = to_float(weight[i]);
    largest = std::max(largest, bits_of(values[i]) & 0x7FFFFFFFu);
  }
  return float_of(largest);
}

template <typename T>
void encode_blocks(const void* weight, int64_t blocks, const float* midpoints, uint8_t* codes, float* absmax) {
  for (int64_t block = 0; block < blocks; ++block) {
    float values[kBlock];
    absmax[block] = load_block(static_cast<const T*>(weight) + block * kBlock, values);
    const float reciprocal = 1.0f / std::max(absmax[block], kSmallestAbsmax);
    int32_t code[kBlock] = {};
    for (int level = 0; level < kMidpoints; ++level)
      for (int i = 0; i < kBlock; ++i) code[i] += values[i] * reciprocal > midpoints[level];
    for (int i = 0; i < kBlockBytes; ++i)
      codes[block * kBlockBytes + i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
  }
}

template <typename T>
void decode_blocks(const uint8_t* codes, const float* absmax, int64_t blocks, const float* codebook, void* out) {
  T* next = static_cast<T*>(out);
  for (int64_t block = 0; block < blocks; ++block) {
    T value[kCodes];
    for (int code = 0; code < kCodes; ++code) value[code] = from_float<T>(codebook[code] * absmax[block]);
    for (int i = 0; i < kBlockBytes; ++i) {
      const uint8_t byte = codes[block * kBlockBytes + i];
      *next++ = value[byte >> 4];
      *next++ = value[byte & 15];
    }
  }
}

}  // namespace

const NF4Kernels kPortableKernels = {
    {encode_blocks<float>, encode_blocks<BFloat16>, encode_blocks<Float16>},
    {decode_blocks<float>, decode_blocks<BFloat16>, decode_blocks<Float16>},
};

}  // namespace qsharded
