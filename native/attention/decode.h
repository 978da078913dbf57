// Attention over a packed past and the tokens behind it that are numbers, either of which may be empty.
#pragma once
#include "attention/attention.h"
#include "attention/packed.h"

namespace bitgrain {

void decode_attention(const AttentionJob& job, const PackedTokens& past, const DenseTokens& dense, int threads);

// Tokens into tiles; false where one cannot be rounded (NaN, Inf, a scale beyond float16).
bool pack_states(const StatesJob& job, int threads);

// Tokens from tiles to x.
void read_states(const StatesJob& job, int threads);

}  // namespace bitgrain
