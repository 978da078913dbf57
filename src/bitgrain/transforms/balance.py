"""Scales of channels found by descent on the expected rounding error, where SmoothQuant has one formula for all.

Rounding with step d adds noise of variance d^2 / 12. For a layer y = W x that is computed as (W diag(s)) (x / s), the
noise of y, summed over outputs and averaged over tokens t, is

      E_t sum_tiles d(t, tile)^2 sum_{j in tile} s_j^2 |w_j|^2           from the inputs
    + sum_rows sum_tiles d(row, tile)^2 sum_{j in tile} E[x_j^2] / s_j^2   from the weights

with steps d that follow from the largest |x_j| / s_j and |w_rj| s_j of their tiles. Static scales of inputs may clip:
then d follows from a limit that is found along with s, and what lies beyond it counts as it is. All is known from a
sample of inputs, and s is found by stochastic gradient (Adam, Kingma and Ba, arXiv 1412.6980) on log s, beginning with
SmoothQuant's (arXiv 2211.10438, equation 4) or no scales, whichever is better. Noise counts relative to the token's
output, since a norm follows sooner or later. Many tokens are needed: largest values are seldom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, per_group, per_tensor
from bitgrain.numerics.granularity import to_tiles
from bitgrain.runtime.watch import Key, Watch, parameters_of
from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.channels import quantized_readers
from bitgrain.transforms.proof import check_same, routes
from bitgrain.transforms.rescale import reader_of, rescale, to_channels, to_columns
from bitgrain.transforms.smoothquant import check_kinds, smoothing

Layer = tuple[Tensor, QuantSpec, QuantSpec | None]
"""Weight [out, in], the spec of the weight, the spec of its inputs."""


@dataclass(frozen=True)
class Sample:
    """Inputs [tokens, in], and the share of all tokens that each stands for [tokens], summing to 1."""

    x: Tensor
    share: Tensor


_MOST_ROWS = 1024
"""Rows of a weight that are looked at; more are thinned out evenly."""
_WEIGHTS_ONLY = 8192
_FEW_BATCHES = 4
"""Tokens, and batches, that are looked at where inputs are not rounded."""
_HOPELESS = 1.5
"""What descent was never seen to make up for: a formula's error above so many times that which would be worth it."""
_LIMITS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
_FOR_LIMIT = 8192
"""Parts of the largest value that are tried for a static limit at the start, and on how many tokens."""
_MOST_BYTES = 2**28
"""Of the samples of inputs of a block."""


@register_transform("balance")
@dataclass(frozen=True)
class Balance:
    """pairs    "norm", "linear" or "all"
    steps    of descent
    rate     first learning rate on log s; falls to 0
    batch    tokens that one step looks at
    tokens   of all calibration batches together, taken evenly (fewer where they would need more than 256 MiB)
    worth    a pair is rescaled only where its expected error falls below this part of what it was; None: 1 where inputs
             are rounded, 0.5 where only weights are, for solvers then make up for what little there is to gain
    Only integer formats: the steps of floating-point formats follow each number, and gain nothing from scales.
    Stacks of experts are left alone.
    """

    pairs: str = "all"
    steps: int = 200
    rate: float = 0.05
    batch: int = 1024
    tokens: int = 65536
    worth: float | None = None
    whole_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.tokens < 1 or not self.rate > 0:
            raise SchemeError("balance: steps, batch and tokens are at least 1, and rate is above 0")
        if self.worth is not None and not 0 < self.worth <= 1:
            raise SchemeError(f"balance: worth is above 0 and at most 1, not {self.worth}")
        check_kinds(self.pairs, "balance")

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Nothing: what lies outside the blocks has no pair that is quantized."""
        del view
        return {}

    def apply(self, block: BlockView) -> dict[str, Any]:
        routed, largest = routes(block.module), 0.0
        gains: dict[str, float] = {}
        chosen = [
            (pair, readers)
            for pair in block.pairs
            if self.pairs in (pair.kind, "all")
            and (readers := [name for name in quantized_readers(block, pair) if _is_simple(block, name)])
        ]
        # one pass for all: what a pair is rescaled by changes the inputs of its own readers only
        inputs = self._inputs(block, [readers[0] for _, readers in chosen])
        for pair, readers in chosen:
            x = inputs.pop(readers[0], None)
            if x is None:
                continue
            layers = [_layer(reader_of(block.module, pair, name), *block.specs[name]) for name in readers]
            factors, gain = self.descend(pair, weighted(x, layers), layers)
            gains[pair.writer] = gain
            if not gain < self._least(layers):
                continue
            before = block.run(0)
            rescale(block.module, pair, factors)
            difference = check_same(before, block.run(0), block.path, f"balancing {pair}", routed)
            largest = max(largest, difference)
        return {"expected_error": gains, "difference": largest}

    def _least(self, layers: Sequence[Layer]) -> float:
        if self.worth is not None:
            return self.worth
        return 0.5 if _weights_only(layers) else 1.0

    def descend(self, pair: Pair, sample: Sample, layers: Sequence[Layer]) -> tuple[Tensor, float]:
        """(factors [width], their expected error relative to that of no factors)."""

        def error(part: Sample, log_s: Tensor, log_limit: Tensor | None) -> Tensor:
            limit = None if log_limit is None else log_limit.exp()
            return expected_error(part, layers, to_columns(pair, log_s.exp()), limit)

        def limit_of(log_s: Tensor) -> Tensor | None:
            if not any(_clips(inputs) for _, _, inputs in layers):
                return None
            few = _part(sample, slice(None, None, -(-len(sample.x) // _FOR_LIMIT)))
            top = (few.x / to_columns(pair, log_s.exp())).abs().amax().log()
            tried = [top + math.log(part) for part in _LIMITS]
            return min(tried, key=lambda log_limit: float(error(few, log_s, log_limit)))

        largest_x = to_channels(pair, sample.x.abs().amax(0)).amax(-2)
        largest_w = to_channels(pair, torch.stack([w.abs().amax(0) for w, _, _ in layers]).amax(0)).amax(-2)
        starts = (torch.zeros_like(largest_x), smoothing(largest_x, largest_w, 0.5).log())
        limits = [limit_of(start) for start in starts]
        found = [float(error(sample, start, limit)) for start, limit in zip(starts, limits, strict=True)]
        if not found[0] > 0:
            return starts[0].exp(), 1.0
        unseen = (largest_x == 0) | (largest_w == 0)  # what their scales should be is unknown
        best = found.index(min(found))
        if _weights_only(layers) and found[best] > _HOPELESS * self._least(layers) * found[0]:
            return starts[0].exp(), 1.0
        learned = [start.clone().requires_grad_(True) for start in (starts[best], limits[best]) if start is not None]
        log_s, log_limit = learned[0], learned[1] if len(learned) > 1 else None
        adam = torch.optim.Adam(learned, self.rate)
        generator = torch.Generator().manual_seed(0)
        steps = max(1, self.steps // 4) if _weights_only(layers) else self.steps  # there is no noise of batches
        for step in range(steps):
            adam.param_groups[0]["lr"] = self.rate * (1 - step / steps)
            rows = torch.randint(0, len(sample.x), (self.batch,), generator=generator).to(log_s.device)
            with torch.enable_grad():
                adam.zero_grad()
                error(_part(sample, rows), log_s, log_limit).log().backward()
            if log_s.grad is not None:
                log_s.grad[unseen] = 0.0
            adam.step()
        ends = (*starts, log_s.detach())
        found.append(float(error(sample, log_s.detach(), None if log_limit is None else log_limit.detach())))
        best = found.index(min(found))
        return ends[best].exp(), found[best] / found[0]

    def _inputs(self, block: BlockView, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameter -> [tokens, in], what it is given; those that no token reaches are left out.

        Where only weights are rounded the inputs' mean squares are all that counts, and some thousand tokens tell.
        """
        share: dict[str, int] = {}
        rounded = any(block.specs[name][1] is not None for name in names)
        batches = range(0, block.samples, 1 if rounded else max(1, block.samples // _FEW_BATCHES))
        for name in names:
            width = max(block.module.get_parameter(name).shape)
            most = self.tokens if block.specs[name][1] is not None else min(self.tokens, _WEIGHTS_ONLY)
            fits = _MOST_BYTES // (4 * width * len(names))
            share[name] = max(1, min(most, max(self.batch, fits)) // len(batches))
        parts: dict[str, list[Tensor]] = {name: [] for name in names}

        def product(key: Key, x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1])
            parts[key.name].append(x[:: -(-len(x) // share[key.name])].float())

        with torch.no_grad(), Watch(parameters_of(block.module, names), product):
            for i in batches if names else ():
                block.run(i)
        return {name: torch.cat(found) for name, found in parts.items() if found}


def weighted(x: Tensor, layers: Sequence[Layer]) -> Sample:
    """The inputs [tokens, in], each counting by the inverse of its outputs' power (plus the median power).

    Where no inputs are rounded, their mean squares say all: the sample is one token of that size.
    """
    power = torch.stack([(x @ weight.T).square().sum(1) for weight, _, _ in layers]).sum(0)
    if not bool(power.any()):
        return Sample(x, torch.full_like(power, 1 / len(x)))
    typical = power.median() if bool(power.median() > 0) else power.mean()
    share = 1 / (1 + power / typical)
    share /= share.sum()
    if _weights_only(layers):
        return Sample((x.square() * share[:, None]).sum(0, keepdim=True).sqrt(), torch.ones_like(share[:1]))
    return Sample(x, share)


def expected_error(sample: Sample, layers: Sequence[Layer], scale: Tensor, limit: Tensor | None = None) -> Tensor:
    """The formula above up to the factor 1/12, summed over layers with the same inputs.

    scale  float32 [in], by which weights are multiplied and inputs divided; gradients pass
    limit  [] at which static inputs are clipped once they are divided; None: at their largest
    """
    total = sample.x.new_zeros(())
    scaled_x = sample.x / scale
    power = (scaled_x.square() * sample.share[:, None]).sum(0)
    for weight, weight_spec, input_spec in layers:
        scaled = weight * scale
        rows = weight_spec.granularity.tile(tuple(weight.shape))[0]
        total = total + rows * _noise(scaled, weight_spec, power).sum()
        if input_spec is not None:
            power_w = scaled.square().sum(0)
            if limit is not None and _clips(input_spec):
                beyond = (scaled_x.abs() - limit).clamp_min(0).square() @ power_w
                of_token = (limit / input_spec.high).square() * power_w.sum() + 12 * beyond
            else:
                of_token = _noise(scaled_x, input_spec, power_w)
            total = total + ((of_token * sample.share).sum() if len(of_token) > 1 else of_token.sum())
    return total


def _noise(values: Tensor, spec: QuantSpec, power: Tensor) -> Tensor:
    """For each row of `values`, or for each row of tiles, the sum of step^2 x power over the columns.

    power  [columns] of what multiplies them
    """
    tiles = to_tiles(values, spec.granularity)
    if spec.symmetric:
        step = tiles.abs().amax(-1) / spec.high
    else:
        step = (tiles.amax(-1).clamp_min(0) - tiles.amin(-1).clamp_max(0)) / (spec.high - spec.low)
    across = spec.granularity.tile(tuple(values.shape))[1]
    of_tile = to_tiles(power[None], per_group(across))[0].sum(-1)
    return (step.square() * of_tile).sum(-1)


def _is_simple(block: BlockView, name: str) -> bool:
    weight, inputs = block.specs[name]
    formats = [weight.format] + ([inputs.format] if inputs is not None else [])
    return block.module.get_parameter(name).ndim == 2 and all(isinstance(one, IntFormat) for one in formats)


def _clips(inputs: QuantSpec | None) -> bool:
    """Whether one static scale serves all tokens, which may then be chosen to clip some."""
    return inputs is not None and not inputs.dynamic and inputs.symmetric and inputs.granularity == per_tensor()


def _part(sample: Sample, rows: Tensor | slice) -> Sample:
    share = sample.share[rows]
    return Sample(sample.x[rows], share / share.sum())


def _weights_only(layers: Sequence[Layer]) -> bool:
    return all(inputs is None for _, _, inputs in layers)


def _layer(weight: Tensor, spec: QuantSpec, inputs: QuantSpec | None) -> Layer:
    """With some of the rows only, evenly taken."""
    most = _MOST_ROWS if inputs is not None else _MOST_ROWS // 4
    return weight[:: -(-len(weight) // most)].contiguous(), spec, inputs
