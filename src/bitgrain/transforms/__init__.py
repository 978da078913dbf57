"""Transforms rewrite a model without changing its full-precision function: one file each, looked up by name."""

from bitgrain.transforms.base import BlockView, Pair, Transform, get_transform, register_transform, transform_names

__all__ = ["BlockView", "Pair", "Transform", "get_transform", "register_transform", "transform_names"]
