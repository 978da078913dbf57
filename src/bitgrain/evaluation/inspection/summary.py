"""What many layers say together: medians, the worst, how often each granularity is recommended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitgrain.evaluation.inspection.activations import ActivationInspection
from bitgrain.evaluation.inspection.weights import (
    FORMATS,
    GRANULARITIES,
    RECOMMENDABLE,
    SENSITIVITY,
    LayerInspection,
    finite_numbers,
)


@dataclass(frozen=True)
class KindSummary:
    """All layers of one kind (`self_attn.q_proj` of every block).

    sqnr: "int4 per_group(128)" -> (median, worst) dB. Ratios and kurtosis: the largest.
    """

    kind: str
    layers: int
    elements: int
    sqnr: Mapping[str, tuple[float, float]]
    output_ratio: float | None
    input_ratio: float | None
    kurtosis: float | None


@dataclass(frozen=True)
class Summary:
    """The model in few lines.

    sensitive      layers by SQNR at int4 per_group(128), lowest first
    recommended    format -> granularity -> number of layers for which it is the coarsest that will do
    dead_outputs, dead_inputs   channels that are all zero; damaged: layers with NaN or Inf
    column_bound   layers whose int4 SQNR per input channel beats that per output channel by more than the tolerance:
                   their large elements stand in columns, which scaling the inputs (AWQ, SmoothQuant) can even out
    """

    kinds: tuple[KindSummary, ...]
    sensitive: tuple[str, ...]
    recommended: Mapping[str, Mapping[str, int]]
    dead_outputs: int
    dead_inputs: int
    damaged: tuple[str, ...]
    column_bound: tuple[str, ...]


def collect_notes(
    layers: Sequence[LayerInspection], activations: Sequence[ActivationInspection] | None
) -> tuple[str, ...]:
    notes: list[str] = []
    sampled = [layer for layer in layers if layer.sampled_rows is not None]
    if sampled:
        least = min(sampled, key=lambda layer: (layer.sampled_rows or 0) / layer.shape[0])
        notes.append(
            f"losses of {len(sampled)} of {len(layers)} layers are measured on evenly spaced rows "
            f"({least.sampled_rows} of {least.shape[0]} in {least.module}); ranges are of all rows"
        )
    damaged = [layer for layer in layers if layer.nonfinite]
    if damaged:
        notes.append(
            f"{len(damaged)} layers hold NaN or Inf ({damaged[0].module}: {damaged[0].nonfinite}): the checkpoint is "
            "damaged, download or convert it again"
        )
    unseen = [site for site in activations or () if site.tokens == 0]
    if unseen:
        notes.append(f"no token reached {len(unseen)} inputs, among them {unseen[0].module}: give more text")
    bad = [site for site in activations or () if site.nonfinite]
    if bad:
        notes.append(f"{len(bad)} inputs had NaN or Inf, among them {bad[0].module}: no figures for these")
    return tuple(notes)


def summarize_layers(layers: Sequence[LayerInspection], tolerance_db: float) -> Summary:
    """Medians, worst layers and recommendations over `layers`."""
    kinds: dict[str, list[LayerInspection]] = defaultdict(list)
    for layer in layers:
        kinds[layer.kind].append(layer)
    sound = [layer for layer in layers if layer.losses]
    recommended = {
        format: dict(
            sorted(
                Counter(layer.recommended[format] for layer in sound).items(),
                key=lambda item: RECOMMENDABLE.index(item[0]),
            )
        )
        for format in FORMATS
    }
    return Summary(
        kinds=tuple(_summarize_kind(kind, same) for kind, same in kinds.items()),
        sensitive=tuple(x.module for x in sorted(sound, key=lambda x: x.sqnr(*SENSITIVITY) or 0.0)),
        recommended=recommended,
        dead_outputs=sum(layer.outputs.dead for layer in sound if layer.outputs),
        dead_inputs=sum(layer.inputs.dead for layer in sound if layer.inputs),
        damaged=tuple(layer.module for layer in layers if layer.nonfinite),
        column_bound=tuple(
            layer.module
            for layer in sound
            if (layer.sqnr("per_channel(1)", "int4") or 0.0) > (layer.sqnr("per_channel", "int4") or 0.0) + tolerance_db
        ),
    )


def _summarize_kind(kind: str, layers: Sequence[LayerInspection]) -> KindSummary:
    sound = [layer for layer in layers if layer.losses]
    sqnr: dict[str, tuple[float, float]] = {}
    for format in FORMATS:
        for name in GRANULARITIES:
            values = sorted(finite_numbers(layer.sqnr(name, format) for layer in sound))
            if values:
                sqnr[f"{format} {name}"] = (_median(values), values[0])
    return KindSummary(
        kind=kind,
        layers=len(layers),
        elements=sum(layer.elements for layer in layers),
        sqnr=sqnr,
        output_ratio=max(finite_numbers(x.outputs.ratio for x in sound if x.outputs), default=None),
        input_ratio=max(finite_numbers(x.inputs.ratio for x in sound if x.inputs), default=None),
        kurtosis=max(finite_numbers(x.kurtosis for x in sound), default=None),
    )


def _median(ordered: Sequence[float]) -> float:
    a, b = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return a if a == b else (a + b) / 2  # two infinities have no mean
