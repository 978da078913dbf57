// How fast this machine can be: measured beside kernels, so that their speed can be told as a part of it.
#pragma once
#include "common.h"

namespace bitgrain {

// Bytes per second of `threads` threads that read [memory, memory + bytes) once.
double measure_bandwidth(const uint8_t* memory, int64_t bytes, int threads);

// Products per second of `threads` threads whose operands stay in registers: of bytes, and of bf16 numbers (of float32
// ones where the machine has no instruction for them).
double measure_int8_peak(int threads);
double measure_bf16_peak(int threads);

}  // namespace bitgrain
