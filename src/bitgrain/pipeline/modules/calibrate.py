"""Calibration of a module in memory: run it over batches once, and keep what each of its layers is given.

Inputs are those of the full-precision module. How samples are cut into batches leaves no trace, save in moving averages
of ranges (a batch is one step); another order changes the last bits of the moments, and which rows are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bitgrain.calibration.statistics import Accumulator, LayerStatistics, layer_key
from bitgrain.errors import SchemeError, StatisticsError
from bitgrain.kernels.gram import mirror
from bitgrain.models.calls import call, device_of, moved
from bitgrain.models.structure import Matrix, find_matrices
from bitgrain.numerics.convolution import Convolution
from bitgrain.pipeline.load import experts_run_one_by_one
from bitgrain.progress import Progress, make_progress
from bitgrain.runtime.convolutions import geometry_of
from bitgrain.runtime.watch import Key, Watch, parameters_of
from bitgrain.solvers import Moments

ROWS = 512
"""Of the inputs of a layer, drawn from all, by which `search` compares static scales."""
_MARK = 1024
"""Elements of a weight by which it is known again."""


@dataclass(frozen=True)
class LayerInputs:
    """What calibration leaves behind for one layer in memory.

    statistics  of its inputs, a row for each token; for convolutions [samples * places, channels], without padding
    moments     of what its product sums over: one, or one for each group of a convolution ([in/groups * kernel] each);
                none if they were not asked for
    rows        [some, in] of that, drawn from all; convolutions: [some, in * kernel]
    """

    statistics: LayerStatistics
    moments: tuple[Moments, ...]
    rows: Tensor


@dataclass(frozen=True)
class ModuleCalibration:
    """What `calibrate_module` saw.

    layers   by parameter, and for stacked experts also by `layer_key`; layers that no batch reached are missing
    order    the parameters in the order in which they first ran
    marks    what tells the weights, by parameter
    """

    layers: Mapping[str, LayerInputs]
    order: tuple[str, ...]
    marks: Mapping[str, str]
    batches: int

    def check(self, module: nn.Module) -> None:
        """Raises StatisticsError unless `module` has the very weights that were calibrated."""
        marks = {name: _mark(module.get_parameter(name)) for name in find_matrices(module)}
        for name in sorted(marks.keys() | self.marks.keys()):
            if marks.get(name) != self.marks.get(name):
                what = "is not the same in both" if name in marks and name in self.marks else "is only in one of them"
                raise StatisticsError(
                    f"this calibration is of another module: {name} {what}. Calibrate the module that is to be "
                    "quantized, after batch norms are folded and before anything is quantized"
                )

    def of(self, name: str) -> LayerInputs:
        """Of one parameter. Raises StatisticsError where no batch reached it."""
        if name not in self.layers:
            raise StatisticsError(
                f"{name}: none of the {self.batches} calibration batches reached it, or its module is not called; keep "
                "it (keep=[...]), or choose a scheme with dynamic activations and a solver without calibration"
            )
        return self.layers[name]

    def moments(self, name: str, matrix: Matrix) -> list[Moments]:
        """One for each matrix, or for each group of a convolution; experts that no token reached have 0 tokens. Empty
        if none were taken."""
        if matrix.experts == 1:
            return list(self.of(name).moments)
        size = self.of(name).statistics.in_features
        none = Moments(torch.zeros(size, size), 0)
        keys = [layer_key(name, expert) for expert in range(matrix.experts)]
        found = [self.layers[key].moments if key in self.layers else (none,) for key in keys]
        return [one for (one,) in found] if all(found) else []


@torch.no_grad()
def calibrate_module(
    module: nn.Module, batches: Iterable[Any], *, moments: bool = True, progress: Progress | None = None
) -> ModuleCalibration:
    """Run `module` over `batches` and keep what `quantize_` needs for static scales and for solvers.

    batches  an iterable of what the module is called with: a tensor; a tuple or list of arguments; a dict of keywords.
             They are moved to the module's device.
    moments  whether to take what solvers need, which is most of the work and the memory: float32 [in, in] a layer (for
             convolutions in = in/groups * kernel, once for each group)
    The module runs in eval mode, without gradients, and is left as it was; layers that share a module or a parameter
    are one. Raises SchemeError (no batches, or a tensor in place of a list of them), NumericsError (NaN or Inf in a
    layer's inputs, naming it).
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise SchemeError(f"calibration wants several batches, not one {type(batches).__name__}: pass a list of them")
    found = {name: matrix for name, matrix in find_matrices(module).items() if matrix.role != "embedding"}
    marks = {name: _mark(module.get_parameter(name)) for name in find_matrices(module)}
    recorders: dict[str, _Recorder] = {}
    progress = progress or make_progress("quiet")
    progress.start(len(batches) if isinstance(batches, Sized) else 0, "batches", f"calibrate {type(module).__name__}")
    where = device_of(module)
    count = 0
    try:
        with _evaluating(module), _listening(module, found, recorders, moments):
            for batch in batches:
                call(module, moved(batch, where))
                count += 1
                progress.advance(1, f"batch {count}")
    finally:
        progress.finish()
    if not count:
        raise SchemeError("there are no calibration batches: give at least one")
    layers = {name: recorder.finish() for name, recorder in recorders.items()}
    return ModuleCalibration(layers, tuple(name for name in layers if name in found), marks, count)


class _Recorder(Protocol):
    def update(self, x: Tensor) -> None: ...
    def finish(self) -> LayerInputs: ...


class _LinearRecorder:
    """Of inputs [.., in]."""

    def __init__(self, name: str, features: int, device: torch.device, moments: bool) -> None:
        self.sums = Accumulator(features, name, hessian=moments, histogram=True, device=device)
        self.drawn = _Drawn()

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, self.sums.in_features)
        self.sums.update(rows)
        self.drawn.update(len(rows), lambda places: rows[places])

    def finish(self) -> LayerInputs:
        statistics = self.sums.finish()
        moments = () if statistics.hessian is None else (statistics.moments,)
        return LayerInputs(statistics, moments, self.drawn.rows)


class _ConvolutionRecorder:
    """Of inputs [samples, channels, *space]."""

    def __init__(self, name: str, channels: int, geometry: Convolution, device: torch.device, wanted: bool) -> None:
        self.geometry, self.channels, self.wanted = geometry, channels, wanted
        self.sums = Accumulator(channels, name, hessian=False, histogram=True, device=device)
        self.hessian: Tensor | None = None  # [groups, in/groups * kernel, the same]
        self.positions = 0
        self.drawn = _Drawn()

    def update(self, x: Tensor) -> None:
        x = self.geometry.batched(x).float()
        self.sums.update(x.movedim(1, -1).reshape(-1, self.channels))
        for sample in x.split(1):  # one at a time: bounds memory, and the cuts between batches leave no trace
            (patches,) = self.geometry.patches(sample)
            if self.hessian is None and self.wanted:
                groups, size, _ = patches.shape
                self.hessian = torch.zeros(groups, size, size, device=x.device)
            if self.hessian is not None:
                self.hessian.baddbmm_(patches, patches.mT)
            self.positions += patches.shape[-1]
            flat = patches.flatten(0, 1)
            self.drawn.update(patches.shape[-1], lambda places, flat=flat: flat[:, places].T)

    def finish(self) -> LayerInputs:
        hessians = () if self.hessian is None else self.hessian.div_(max(1, self.positions))
        moments = tuple(Moments(mirror(hessian), self.positions) for hessian in hessians)
        return LayerInputs(self.sums.finish(), moments, self.drawn.rows)


class _Drawn:
    """`ROWS` of all rows, chosen by a hash of their number: the same however they come in batches."""

    def __init__(self) -> None:
        self.seen = 0
        self.keys = torch.empty(0, dtype=torch.int64)
        self.rows = torch.empty(0)

    def update(self, count: int, take: Any) -> None:
        """`count` more rows, of which `take(places)` gives some."""
        keys = _hashed(torch.arange(self.seen, self.seen + count))
        self.seen += count
        full = len(self.keys) == ROWS  # then few can still come in
        places = (keys < self.keys[-1]).nonzero().view(-1) if full else torch.arange(count)
        if not len(places):
            return
        new = take(places)
        all_keys, order = torch.cat([self.keys, keys[places]]).sort()
        rows = torch.cat([self.rows.to(new.device).view(-1, new.shape[-1]), new])
        self.keys, self.rows = all_keys[:ROWS], rows[order[:ROWS].to(rows.device)]


def _hashed(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (32 bit), which is a permutation: no two numbers below 2^32 collide."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


@contextmanager
def _listening(
    module: nn.Module, found: Mapping[str, Matrix], recorders: dict[str, _Recorder], moments: bool
) -> Generator[None]:
    """While entered, every layer's inputs go into its recorder, made when it first runs."""
    names: dict[int, str] = {}  # a shared parameter has one recorder, under its first name
    shapes = {name: module.get_parameter(name).shape for name in found}
    products = [name for name, matrix in found.items() if matrix.experts > 1 or matrix.role == "router"]

    def product(key: Key, x: Tensor) -> None:
        features = shapes[key.name][-2 if found[key.name].transposed else -1]
        stacked = found[key.name].experts > 1
        where = module.get_parameter(key.name).device
        if key.name not in recorders:
            recorders[key.name] = _LinearRecorder(key.name, features, where, moments and not stacked)
        recorders[key.name].update(x)
        if stacked and key.expert is not None:
            label = layer_key(key.name, key.expert)
            if label not in recorders:
                recorders[label] = _LinearRecorder(label, features, where, moments)
            recorders[label].update(x)

    def before(owner: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[id(owner)]
        if name not in recorders:
            weight = module.get_parameter(name)
            if found[name].role == "conv":
                channels = cast(int, owner.in_channels)
                recorders[name] = _ConvolutionRecorder(name, channels, geometry_of(owner), weight.device, moments)
            else:
                features = weight.shape[0 if found[name].transposed else 1]
                recorders[name] = _LinearRecorder(name, features, weight.device, moments)
        recorders[name].update(args[0])

    first: dict[int, str] = {}
    with ExitStack() as stack:
        for name, matrix in found.items():
            owner = module.get_submodule(matrix.module)
            if name not in products and id(owner) not in names:
                names[id(owner)] = first.setdefault(id(module.get_parameter(name)), name)
                stack.callback(owner.register_forward_pre_hook(before, prepend=True).remove)
        if products:
            experts_run_one_by_one(getattr(module, "config", None))
            stack.enter_context(Watch(parameters_of(module, products), product))
        yield


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    """Every part in eval mode, and afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _mark(weight: Tensor) -> str:
    """Tells a weight by its shape and some of its elements, evenly spread."""
    flat = weight.detach().reshape(-1)
    some = flat[:: max(1, -(-flat.numel() // _MARK))].to("cpu", torch.float32).contiguous()
    return f"{tuple(weight.shape)} {hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]}"
