"""Training with quantized numbers: weights, optimizer states, activations and gradients."""

from bitgrain.training.adamw8bit import AdamW8bit
from bitgrain.training.fp8 import fp8_training_
from bitgrain.training.settings import TrainingSettings

__all__ = ["AdamW8bit", "TrainingSettings", "fp8_training_"]
