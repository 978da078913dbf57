// Decoder blocks one behind the other, for a few new tokens.
#pragma once
#include <vector>

#include "decoder/block.h"

namespace bitgrain {

struct StackBlock {
  const AttentionStage* attention;
  const MlpStage* mlp;
};

// x to y through all blocks, as run_block each; caches: one for each block.
inline bool run_stack(const std::vector<StackBlock>& blocks, const void* x, DType type, int64_t batch, int64_t tokens,
                      const Positions& positions, const std::vector<KeysValues>& caches, const Mask& mask, void* y,
                      int threads) {
  for (size_t i = 0; i < blocks.size(); ++i) {  // a block reads its x for the last time before it writes y
    if (!run_block(*blocks[i].attention, blocks[i].mlp, i == 0 ? x : y, type, batch, tokens, positions, caches[i], mask,
                   y, threads)) {
      return false;
    }
  }
  return true;
}

}  // namespace bitgrain
