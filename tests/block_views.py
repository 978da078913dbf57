"""Blocks of the tiny random models as transforms see them: real weights, run on what the model gives them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from bitgrain.models.blocks import find_blocks
from bitgrain.models.pairs import find_pairs
from bitgrain.models.residual import find_outside, find_stream
from bitgrain.models.structure import find_matrices
from bitgrain.recipes import get_scheme
from bitgrain.runtime.watch import Key, Watch, parameters_of
from bitgrain.transforms import BlockView, OutsideView, get_transform

BATCHES = 2


def build(name: str, **changes: Any) -> Any:
    """A random model whose gains and biases are far from one and zero, and whose experts run one by one."""
    model = zoo.build(name, **changes)
    model.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def block_paths(model: Any) -> tuple[str, ...]:
    return find_blocks(model, find_matrices(model))


class Blocks:
    """The blocks of a model, one after the other, on two small batches."""

    def __init__(self, model: Any, scheme: str = "W8A8") -> None:
        self.model, self.scheme = model, get_scheme(scheme)
        self.paths = block_paths(model)
        self.ids = [zoo.ids_for(model, seed=seed) for seed in range(BATCHES)]

    def calls(self, path: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model as it is now gives a block."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = self.model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            for ids in self.ids:
                self.model(input_ids=ids, use_cache=False)  # a cache would grow with every run
        handle.remove()
        return found

    def runner(self, index: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
        path = self.paths[index]
        block, calls = self.model.get_submodule(path), self.calls(path)

        def run(batch: int) -> Tensor:
            args, kwargs = calls[batch]
            with torch.no_grad():
                output = block(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return block, run

    def view(self, index: int = 0) -> BlockView:
        block, run = self.runner(index)
        pairs = find_pairs(block, lambda: run(0))
        specs = {
            name: (self.scheme.weight, self.scheme.input)
            for name, matrix in find_matrices(block).items()
            if matrix.role in ("linear", "expert")
        }
        absmax, mean_abs = measure(block, list(specs), run)
        stream = find_stream(block, lambda: run(0), pairs)
        low, high = extremes(block, list(specs), run)
        return BlockView(block, self.paths[index], pairs, run, BATCHES, stream, specs, absmax, mean_abs, low, high)

    def outside(self) -> OutsideView:
        def run() -> Tensor:
            with _passing(self.model, self.paths):
                return zoo.outputs(self.model, self.ids[0])

        def residuals() -> Tensor:
            entering = [
                args[0] if args else kwargs["hidden_states"] for path in self.paths for args, kwargs in self.calls(path)
            ]
            return torch.cat([hidden.flatten(0, -2) for hidden in entering])

        return OutsideView(self.model, find_outside(self.model, run, self.paths), run, residuals)

    def apply(self, choices: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
        """All transforms to the whole model, as the pipeline applies them; figures by block and transform."""
        transforms = [get_transform(choice) for choice in choices]
        figures: dict[str, Any] = {}
        outside = self.outside()
        memory: dict[Any, dict[str, Any]] = {transform: {} for transform in transforms}
        for transform in transforms:
            if transform.whole_model:
                outside.memory = memory[transform]
                figures[f"outside:{type(transform).__name__}"] = transform.apply_outside(outside)
        for index, path in enumerate(self.paths):
            view = self.view(index)
            for transform in transforms:
                view.memory = memory[transform]
                figures[f"{path}:{type(transform).__name__}"] = transform.apply(view)
                view.absmax, view.mean_abs = measure(view.module, list(view.specs), view.run)
        return figures


def measure(
    block: nn.Module, names: Sequence[str], run: Callable[[int], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(absmax, mean_abs) of the inputs of each parameter, [in] or [experts, in]."""
    inputs: dict[Key, list[Tensor]] = defaultdict(list)
    with Watch(parameters_of(block, names), lambda key, x: inputs[key].append(x.reshape(-1, x.shape[-1]))):
        for batch in range(BATCHES):
            run(batch)
    absmax: dict[str, Tensor] = {}
    mean_abs: dict[str, Tensor] = {}
    for name in names:
        of_experts = {key.expert: torch.cat(x).abs() for key, x in inputs.items() if key.name == name}
        if None in of_experts:
            absmax[name], mean_abs[name] = of_experts[None].amax(0), of_experts[None].mean(0)
        elif of_experts:
            zero = torch.zeros_like(next(iter(of_experts.values()))[:1])
            stack = [of_experts.get(expert, zero) for expert in range(len(block.get_parameter(name)))]
            absmax[name] = torch.stack([x.amax(0) for x in stack])
            mean_abs[name] = torch.stack([x.mean(0) for x in stack])
    return absmax, mean_abs


def extremes(
    block: nn.Module, names: Sequence[str], run: Callable[[int], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(low, high) of the inputs [in] of each parameter that is one matrix."""
    inputs: dict[Key, list[Tensor]] = defaultdict(list)
    with Watch(parameters_of(block, names), lambda key, x: inputs[key].append(x.reshape(-1, x.shape[-1]))):
        for batch in range(BATCHES):
            run(batch)
    whole = {key.name: torch.cat(x) for key, x in inputs.items() if key.expert is None}
    return {name: x.amin(0) for name, x in whole.items()}, {name: x.amax(0) for name, x in whole.items()}


@contextmanager
def _passing(model: Any, paths: Sequence[str]) -> Any:
    """Inside, every block hands on its input."""
    blocks = [model.get_submodule(path) for path in paths]
    for block in blocks:
        block.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
