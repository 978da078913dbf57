#define BG_ISA avxvnni
#define BITGRAIN_AVX_VNNI 1
#include "simd/avx2.h"
//
#include "inl/all.h"
