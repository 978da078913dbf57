// What the vector names of one level give for the same lanes.
#pragma once
#include <cstdint>

struct VectorInputs {
  alignas(64) float a[16], b[16];     // anything
  alignas(64) int32_t i[16], j[16];   // anything
  alignas(64) int32_t small[3][16];   // whole numbers whose products and sums a float holds
  alignas(64) uint8_t bytes[4][64];
};

struct VectorResult {
  const char* name;
  bool floats;  // NaN equals NaN
  alignas(64) uint8_t lanes[64];
};

constexpr int kMostResults = 64;
using DumpVectors = int (*)(const VectorInputs&, VectorResult*);
