"""Tuning by gradients: learned views of quantized weights, a block at a time or the whole model."""

from bitgrain.tuning.blockwise import AUTO_ROUND, BlockSettings, TuneResult, tune_block
from bitgrain.tuning.end_to_end import EndToEndResult, EndToEndSettings, tune_end_to_end
from bitgrain.tuning.learned import Learn, LearnedWeight, learned_weights

__all__ = [
    "AUTO_ROUND",
    "BlockSettings",
    "EndToEndResult",
    "EndToEndSettings",
    "Learn",
    "LearnedWeight",
    "TuneResult",
    "learned_weights",
    "tune_block",
    "tune_end_to_end",
]
