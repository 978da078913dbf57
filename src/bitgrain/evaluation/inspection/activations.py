"""What arrives at a model's linear layers, and what each way to quantize it would lose.

Two passes over the windows: the first takes the ranges, from which static scales follow; the second rounds and
measures. Nothing but sums and channel ranges is kept. Each window is run by one thread, and results are added in the
order of the windows, so no figure depends on the number of threads.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn

from bitgrain.errors import ModelError, TextError
from bitgrain.evaluation.inspection.channels import (
    ChannelRanges,
    describe_channels,
    excess_kurtosis,
    power_sums,
    sqnr_db,
)
from bitgrain.numerics import (
    QuantSpec,
    choose_scale,
    fake_quantize,
    get_format,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.sums import row_sums
from bitgrain.progress import Progress
from bitgrain.runtime.activations import InputQuantizer, quantize_expert_inputs

_FORMATS = {"int8": True, "fp8_e4m3": False}
"""Format of the activations, and whether it is the restricted (symmetric) grid, as in the presets."""
GRANULARITIES = {
    "per_tensor": (per_tensor(), False),
    "per_token": (per_token(), True),
    "per_channel": (per_channel(1), False),
    "per_group(128)": (per_group(128), True),
}
"""Tile over [tokens, features], and whether its scales are computed from the data at run time."""


@dataclass(frozen=True)
class Site:
    """A place where activations are looked at: the input of a weight in memory.

    parameter: name of that weight in memory, [.., out, in] or, if transposed, [.., in, out].
    layers: the matrices on disk that read this input.
    """

    parameter: str
    kind: str
    block: int | None
    in_features: int
    layers: tuple[str, ...]
    transposed: bool = False

    @property
    def module(self) -> str:
        return self.parameter.removesuffix(".weight")


@dataclass(frozen=True)
class ActivationLoss:
    """What one format and granularity does to an input; inf if exact.

    dynamic   scales computed from the data at run time; otherwise they are the extremes over all windows
    sqnr_db   10 log10(sum x^2 / sum e^2), e the error of x
    felt_db   the same with feature j counted c_j times, c_j = sum of the squares of the weights that read it: as the
              layer's output feels it. Unlike sqnr_db it is the same for x / s and W s, one s for each feature, so the
              power of a few large features, which the weights divide out again, does not hide the loss of the others
    """

    granularity: str
    format: str
    dynamic: bool
    sqnr_db: float
    felt_db: float


@dataclass(frozen=True)
class ActivationInspection:
    """The input of one linear layer (or stack of experts) over all windows.

    tokens: rows seen. nonfinite: rows with NaN or Inf; where there are any, nothing else is given.
    zeros: share of zeros. kurtosis: excess kurtosis over all elements.
    """

    module: str
    kind: str
    block: int | None
    layers: tuple[str, ...]
    in_features: int
    tokens: int
    nonfinite: int
    absmax: float | None
    zeros: float | None
    kurtosis: float | None
    channels: ChannelRanges | None
    losses: tuple[ActivationLoss, ...]

    def loss(self, granularity: str, format: str) -> ActivationLoss | None:
        """One combination; None if it was not measured."""
        return next((x for x in self.losses if (x.granularity, x.format) == (granularity, format)), None)

    def sqnr(self, granularity: str, format: str) -> float | None:
        """dB of one combination; None if it was not measured."""
        found = self.loss(granularity, format)
        return None if found is None else found.sqnr_db

    def felt(self, granularity: str, format: str) -> float | None:
        """`felt_db` of one combination; None if it was not measured."""
        found = self.loss(granularity, format)
        return None if found is None else found.felt_db


@dataclass(frozen=True)
class _Ranges:
    """What the first pass takes from one input."""

    tokens: int
    nonfinite: int
    low: Tensor
    high: Tensor
    zeros: int
    sums: tuple[float, ...]


@dataclass
class _Total:
    """The ranges of one site over everything seen."""

    tokens: int = 0
    nonfinite: int = 0
    zeros: int = 0
    low: Tensor | None = None
    high: Tensor | None = None
    sums: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, seen: _Ranges) -> None:
        self.tokens += seen.tokens
        self.nonfinite += seen.nonfinite
        self.zeros += seen.zeros
        self.low = seen.low if self.low is None else torch.minimum(self.low, seen.low)
        self.high = seen.high if self.high is None else torch.maximum(self.high, seen.high)
        self.sums.append(seen.sums)


@dataclass(frozen=True)
class _Scales:
    """Static scales, float32, by (granularity, format); equal for layers that read the same input."""

    low: Tensor
    high: Tensor
    steps: dict[tuple[str, str], Tensor]


_Measure = Callable[[str, Tensor], Any]


class _Watch:
    """Calls `measure(parameter, x)` for every input of a site; one window in each thread.

    Layers that read one tensor (q, k, v) come one after the other: `shares` says when the last result holds again.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._model = model
        self._thread = threading.local()
        self.measure: _Measure | None = None
        self.shares: Callable[[str, str], bool] = lambda _a, _b: True
        stacks: dict[str, dict[str, InputQuantizer]] = {}
        for site in sites:
            owner, _, leaf = site.parameter.rpartition(".")
            if leaf == "weight":
                model.get_submodule(owner).register_forward_pre_hook(self._hook(site))
            else:
                eye = cast(InputQuantizer, _Eye(self, site))
                stacks.setdefault(owner, {})[leaf] = eye
        for owner, eyes in stacks.items():
            quantize_expert_inputs(model.get_submodule(owner), eyes)
        signature = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in signature else {}
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        watched = any(model.get_submodule(s.module) is head for s in sites if s.parameter.endswith(".weight"))
        if "logits_to_keep" in signature and not watched:
            self._options["logits_to_keep"] = 1  # logits are not needed

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                self.see(site, args[0])

        return before

    def see(self, site: Site, x: Any) -> None:
        assert self.measure is not None
        if not isinstance(x, Tensor) or x.shape[-1] != site.in_features or x.numel() == 0:
            return
        last, source, result = self._thread.last
        if x is not last or not self.shares(source, site.parameter):
            matrix = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
            result = self.measure(site.parameter, matrix)
            self._thread.last = (x, site.parameter, result)
        self._thread.seen.append((site.parameter, result))

    def run(self, ids: Tensor) -> list[tuple[str, Any]]:
        """(parameter, result) of every input of one window int64 [L], in the order of the model."""
        self._thread.seen, self._thread.last = [], (None, "", None)
        with torch.no_grad():
            self._model(input_ids=ids[None], **self._options)
        self._thread.last = (None, "", None)
        return self._thread.seen


class _Eye(nn.Module):
    """Looks at what a stack of experts reads, and hands it on."""

    def __init__(self, watch: _Watch, site: Site) -> None:
        super().__init__()
        self._watch = (watch,)  # in a tuple: no part of the module tree
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        self._watch[0].see(self.site, x)
        return x


def inspect_activations(
    model: nn.Module,
    sites: Sequence[Site],
    windows: LongTensor,
    device: torch.device,
    progress: Progress,
) -> tuple[ActivationInspection, ...]:
    """Run a model that is on `device` over windows int64 [n, L], twice; one result for each site, in their order.

    A site that no token reached (an expert's parameter that was never used) has 0 tokens and no figures.
    Raises ModelError (an encoder-decoder model), TextError (windows longer than the model's positions).
    """
    check_windows(getattr(model, "config", None), windows.shape[1])
    watch = _Watch(model.eval(), sites)
    progress.start(2 * windows.numel(), "tokens", "activations")
    try:
        totals = {site.parameter: _Total() for site in sites}
        watch.measure = lambda _, x: _ranges(x)
        for seen in _run_all(watch, windows, device, progress):
            for name, ranges in seen:
                totals[name].add(ranges)
        scales = _static_scales(totals)
        watch.measure = lambda name, x: _errors(x, scales[name]) if name in scales else None
        watch.shares = lambda a, b: scales.get(a) is scales.get(b)
        errors: dict[str, Tensor] = {}
        for seen in _run_all(watch, windows, device, progress):
            for name, sums in seen:
                if sums is not None:
                    errors[name] = errors[name] + sums if name in errors else sums
    finally:
        progress.finish()
    return tuple(
        _conclude(site, totals[site.parameter], errors.get(site.parameter), model.get_parameter(site.parameter))
        for site in sites
    )


def check_windows(config: Any, seqlen: int) -> None:
    """Raises ModelError for an encoder-decoder model, TextError for windows longer than the model's positions."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            "the model has an encoder and a decoder, and a text alone does not run both: inspect its weights only, "
            "without a text"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seqlen:
        raise TextError(
            f"windows of {seqlen} tokens are longer than the {longest} positions of the model: "
            f"use --seqlen {longest} or less"
        )


def _run_all(
    watch: _Watch, windows: Tensor, device: torch.device, progress: Progress
) -> Iterator[list[tuple[str, Any]]]:
    """What was seen in each window, in their order. On the CPU one thread a window, with torch's own threads off."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if device.type != "cpu":
        for ids in windows:
            yield watch.run(ids.to(device))
            progress.advance(ids.numel())
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "inspect", initializer=lambda: torch.set_num_threads(1)) as pool:
            queue = iter(windows)
            running = [pool.submit(watch.run, ids) for ids in islice(queue, threads)]
            while running:
                seen = running.pop(0).result()
                running.extend(pool.submit(watch.run, ids) for ids in islice(queue, 1))
                yield seen
                progress.advance(windows.shape[1])
    finally:
        torch.set_num_threads(threads)


def _ranges(x: Tensor) -> _Ranges:
    sums = power_sums(x)
    nonfinite = int((~torch.isfinite(sums[:, 1])).sum())
    table: list[list[float]] = sums.t().tolist()
    totals = (0.0,) * 4 if nonfinite else tuple(math.fsum(column) for column in table)
    return _Ranges(len(x), nonfinite, x.amin(0), x.amax(0), int((x == 0).sum()), totals)


def _static_scales(totals: dict[str, _Total]) -> dict[str, _Scales]:
    """By parameter; none for a site that saw NaN, Inf or nothing. Sites with the same ranges share one object."""
    found: dict[str, _Scales] = {}
    last: _Scales | None = None
    for name, total in totals.items():
        low, high = total.low, total.high
        if low is None or high is None or total.nonfinite:
            continue
        if last is None or not (_equal(last.low, low) and _equal(last.high, high)):
            extremes = torch.stack([low, high])  # min-max scales depend on nothing else
            steps: dict[tuple[str, str], Tensor] = {}
            for name_, (_, dynamic) in GRANULARITIES.items():
                for format in _FORMATS:
                    if not dynamic:
                        steps[name_, format] = scale_values(choose_scale(extremes, _spec(name_, format))[0])
            last = _Scales(low, high, steps)
        found[name] = last
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _spec(granularity: str, format: str) -> QuantSpec:
    tile, dynamic = GRANULARITIES[granularity]
    return QuantSpec(get_format(format), tile, restricted=_FORMATS[format], dynamic=dynamic)


def _combinations() -> list[tuple[str, str]]:
    return [(granularity, format) for format in _FORMATS for granularity in GRANULARITIES]


def _errors(x: Tensor, scales: _Scales) -> Tensor:
    """Sum over the tokens of x^2, then of the squared error of each combination: float64 [1 + combinations, in]."""
    sums = [x.double().square_().sum(0)]
    for granularity, format in _combinations():
        rounded = fake_quantize(x, _spec(granularity, format), scale=scales.steps.get((granularity, format)))
        sums.append(rounded.sub_(x).double().square_().sum(0))
    return torch.stack(sums).cpu()


def _column_powers(weight: Tensor, transposed: bool) -> Tensor:
    """For each input feature the sum of the squares of the weights that read it, float64 [in]."""
    with torch.no_grad():
        stack = weight.reshape(-1, *weight.shape[-2:])
        sums = [row_sums((one if transposed else one.T).float().square()) for one in stack]
        return row_sums(torch.stack(sums, dim=-1)).cpu()


def _conclude(site: Site, total: _Total, errors: Tensor | None, weight: Tensor) -> ActivationInspection:
    def result(**figures: Any) -> ActivationInspection:
        return ActivationInspection(
            module=site.module,
            kind=site.kind,
            block=site.block,
            layers=site.layers,
            in_features=site.in_features,
            tokens=total.tokens,
            nonfinite=total.nonfinite,
            **figures,
        )

    if total.low is None or total.high is None or errors is None:
        return result(absmax=None, zeros=None, kurtosis=None, channels=None, losses=())
    channels = describe_channels(total.low, total.high)
    count = total.tokens * site.in_features
    power, *plain = (math.fsum(row) for row in errors.tolist())
    felt_power, *felt = (math.fsum(row) for row in (errors * _column_powers(weight, site.transposed)).tolist())
    return result(
        absmax=channels.absmax,
        zeros=total.zeros / count,
        kurtosis=excess_kurtosis([math.fsum(column) for column in zip(*total.sums, strict=True)], count),
        channels=channels,
        losses=tuple(
            ActivationLoss(
                granularity=granularity,
                format=format,
                dynamic=GRANULARITIES[granularity][1],
                sqnr_db=sqnr_db(power, error),
                felt_db=sqnr_db(felt_power, felt_error),
            )
            for (granularity, format), error, felt_error in zip(_combinations(), plain, felt, strict=True)
        ),
    )
