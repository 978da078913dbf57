"""The registry in which a transform (a rewrite that leaves the full-precision function unchanged) is found by name.

A new transform is one file: a class with `@register_transform("name")`, imported in this package's `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn

from bitgrain.errors import SchemeError


class Transform(Protocol):
    """Rewrites the weights of one block in place so that its full-precision output stays the same."""

    def apply(self, block: nn.Module) -> None:
        """Raises NumericsError if the output before and after differs."""
        ...


_TRANSFORMS: dict[str, Callable[[], Transform]] = {}


def register_transform(name: str) -> Callable[[type], type]:
    """Class decorator: makes a transform available under `name` in recipes."""

    def add(cls: type) -> type:
        _TRANSFORMS[name] = cls
        return cls

    return add


def transform_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_TRANSFORMS)


def get_transform(name: str) -> Transform:
    """The transform called `name` (case-insensitive). Raises SchemeError that lists all."""
    maker = _TRANSFORMS.get(name.lower())
    if maker is None:
        known = ", ".join(transform_names()) or "none in this version"
        raise SchemeError(f"unknown transform {name!r}; known transforms: {known}")
    return maker()
