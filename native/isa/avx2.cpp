#define BG_ISA avx2
#define BITGRAIN_AVX_VNNI 0
#include "simd/avx2.h"
//
#include "inl/all.h"
