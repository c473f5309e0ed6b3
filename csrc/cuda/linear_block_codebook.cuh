// Decoding without look-ups in memory: a block has one absmax, hence 16 weights; their bytes fit in eight registers, where a
// byte permutation looks four of them up at once.
#pragma once

#include "linear_weight.cuh"

namespace qsharded {

__device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// Of a block's words `permuted` are to be decoded so, the others by CodebookTable: the one keeps the integer pipe busy, the
// other the load-store pipe.
__device__ constexpr bool is_permuted(int word, int permuted) {
  return (word + 1) * permuted / kWords != word * permuted / kWords;
}

template <typename T>
struct BlockCodebook {
  uint32_t low[4], high[4];  // bytes of the 16 weights

  // codebook: in shared memory
  __device__ BlockCodebook(const float4* codebook, float absmax) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = codebook[i];
      const uint32_t first = Pair<T>::pack(__fmul_rn(four.x, absmax), __fmul_rn(four.y, absmax));
      const uint32_t second = Pair<T>::pack(__fmul_rn(four.z, absmax), __fmul_rn(four.w, absmax));
      low[i] = permute(first, second, 0x6420), high[i] = permute(first, second, 0x7531);
    }
  }

  // The word's weights, as CodebookTable::decode has them.
  __device__ void decode(uint32_t word, uint32_t (&weights)[4]) const {
    // a code's lower three bits find one byte among each half's eight, its highest bit says which half's
    uint32_t within = word & 0x77777777u, which = (word >> 1 & 0x44444444u) | 0x32103210u;
#pragma unroll
    for (int i = 0; i < 2; ++i, within >>= 16, which >>= 16) {  // a permutation takes four of eight codes
      const uint32_t l = permute(permute(low[0], low[1], within), permute(low[2], low[3], within), which);
      const uint32_t h = permute(permute(high[0], high[1], within), permute(high[2], high[3], within), which);
      weights[2 * i] = permute(l, h, 0x4051);  // a byte's first weight is its upper code's
      weights[2 * i + 1] = permute(l, h, 0x6273);
    }
  }
};

}  // namespace qsharded
