"""inspect: ranges, outliers, and what each granularity would lose, for weights and inputs."""

from bitgrain.evaluation.inspection.job import Inspection, TextUse, inspect_model
from bitgrain.evaluation.inspection.weights import inspect_matrix

__all__ = ["Inspection", "TextUse", "inspect_matrix", "inspect_model"]
