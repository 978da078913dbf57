"""Rotations that are computed at run time: a layer's input is multiplied by an orthogonal matrix before it is rounded.

Where the writer of an input stands behind a nonlinearity (up -> down of an MLP) no rotation can be folded into it:
QuaRot (arXiv 2404.00456, section 4) and SpinQuant (arXiv 2405.16406, R4) multiply by a Hadamard matrix instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitgrain.errors import CheckpointError
from bitgrain.numerics.hadamard import Rotation


def rotate_inputs(module: nn.Module, rotation: Rotation) -> None:
    """From now on `module` (a linear layer, called with its input [.., n] first) sees x @ Q, before any quantizer.

    A second rotation replaces the first.
    """
    if not hasattr(module, "input_rotation"):
        module.register_forward_pre_hook(_rotate, prepend=True)
    module.input_rotation = rotation  # type: ignore[assignment]


def stop_rotating(module: nn.Module) -> None:
    """Undo `rotate_inputs` for everything inside `module`."""
    for part in module.modules():
        if hasattr(part, "input_rotation"):
            part.input_rotation = None  # type: ignore[assignment]


def attach_rotations(model: nn.Module, described: Mapping[str, Mapping[str, int]]) -> None:
    """`rotate_inputs` for modules by their paths, as a checkpoint describes them: {"size": n, "seed": s}.

    Raises CheckpointError for a module that the model does not have, or of another size.
    """
    known = dict(model.named_modules())
    for path, settings in described.items():
        module = known.get(path)
        weight: Any = getattr(module, "weight", None)
        if module is None or weight is None or settings["size"] not in weight.shape:
            raise CheckpointError(f"the checkpoint rotates the inputs of {path}, which this model does not have so")
        rotate_inputs(module, Rotation(settings["size"], settings["seed"]))


def _rotate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rotation: Any = module.input_rotation
    if rotation is None:
        return None
    return (rotation(args[0]).to(args[0].dtype), *args[1:])
