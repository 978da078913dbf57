"""Transforms rewrite a model without changing its full-precision function: one file each, looked up by name."""

from bitgrain.transforms.awq import Awq
from bitgrain.transforms.balance import Balance
from bitgrain.transforms.base import (
    BlockView,
    OutsideView,
    Pair,
    Stream,
    Transform,
    get_transform,
    register_transform,
    transform_names,
)
from bitgrain.transforms.bias import AbsorbBias
from bitgrain.transforms.fold import FoldNorms
from bitgrain.transforms.reorder import Reorder
from bitgrain.transforms.rotate import Rotate
from bitgrain.transforms.smoothquant import SmoothQuant

__all__ = [
    "AbsorbBias",
    "Awq",
    "Balance",
    "BlockView",
    "FoldNorms",
    "OutsideView",
    "Pair",
    "Reorder",
    "Rotate",
    "SmoothQuant",
    "Stream",
    "Transform",
    "get_transform",
    "register_transform",
    "transform_names",
]
