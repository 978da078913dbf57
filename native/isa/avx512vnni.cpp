#define BG_ISA avx512vnni
#define BITGRAIN_AVX512_BF16 0
#include "simd/avx512.h"
//
#include "inl/all.h"
