#define BG_ISA avx512bf16
#define BITGRAIN_AVX512_BF16 1
#include "simd/avx512.h"
//
#include "inl/all.h"
