#define BG_ISA neon
#include "simd/neon.h"
//
#include "inl/all.h"
