#define BG_ISA portable
#include "simd/portable.h"
//
#include "inl/all.h"
