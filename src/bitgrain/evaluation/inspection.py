"""Which granularity, and what would it lose? Answered for each linear layer from the checkpoint's own weights.

Weights are read one matrix at a time and gone through in bands of rows, so memory is bounded by the largest tensor. Two
passes: the first takes ranges and moments from every row; the second rounds to int8 and int4 under each granularity and
measures, on every row or, in large matrices, on evenly spaced bands of 128 rows. Scales always come from all rows.

Every sum is exact in its order (numerics/sums.py, math.fsum), so no figure depends on the number of threads.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import LongTensor, Tensor, nn

from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.errors import ModelError, PlanError
from bitgrain.evaluation.inspection_activations import (
    OUTLIER_RATIO,
    ActivationInspection,
    ChannelRanges,
    Site,
    check_windows,
    describe_channels,
    excess_kurtosis,
    inspect_activations,
    power_sums,
    sqnr_db,
)
from bitgrain.models.anatomy import Anatomy, Weight, read_anatomy
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.models.structure import find_matrices
from bitgrain.numerics import (
    QuantSpec,
    choose_scale,
    get_format,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)
from bitgrain.numerics.affine import from_grid, to_grid
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.sums import row_sums
from bitgrain.pipeline.load import experts_run_one_by_one, load
from bitgrain.progress import Progress, QuietProgress
from bitgrain.recipes import Scheme, make_recipe
from bitgrain.recipes.recipe import QUANTIZED_ROLES, Rule
from bitgrain.runtime.device import resolve_device

__all__ = [
    "FORMATS",
    "GRANULARITIES",
    "OUTLIER_RATIO",
    "TOLERANCE_DB",
    "Inspection",
    "KindSummary",
    "LayerInspection",
    "MatrixLoss",
    "Summary",
    "TextUse",
    "inspect_matrix",
    "inspect_model",
    "recommend",
]

FORMATS = ("int8", "int4")
GRANULARITIES = {
    "per_tensor": per_tensor(),
    "per_block(128, 128)": per_block(128, 128),
    "per_channel": per_channel(0),
    "per_channel(1)": per_channel(1),
    "per_group(128)": per_group(128),
    "per_group(64)": per_group(64),
    "per_group(32)": per_group(32),
}
RECOMMENDABLE = tuple(name for name in GRANULARITIES if name != "per_channel(1)")
"""A scale for each input channel cannot leave the sum over the inputs, so it is measured but never recommended."""
TOLERANCE_DB = 3.0
"""Half a bit: one bit more of width gains 6.02 dB, and the 16-bit scales of per_group(32) cost 0.5 bits a weight."""
SENSITIVITY = ("per_group(128)", "int4")
"""The combination by which layers are ranked."""
EXACT_ELEMENTS = 1 << 24
"""Matrices of up to this many elements are rounded whole; of larger ones about as many, in bands of rows."""
_BAND = 128
_CHUNK_ELEMENTS = 1 << 19
_WORD = 8


@dataclass(frozen=True)
class MatrixLoss:
    """What one format and granularity does to a weight (symmetric, min-max range).

    sqnr_db          of the dequantized weight; inf if exact
    bits_per_weight  codes and scales, the scales in the checkpoint's own dtype
    span             mean over the tiles of (largest - smallest code) / (range of the codes)
    hit              mean over the tiles of the share of codes that occur, of those that could (tile size permitting)
    """

    granularity: str
    format: str
    sqnr_db: float
    bits_per_weight: float
    span: float
    hit: float


@dataclass(frozen=True)
class LayerInspection:
    """One weight matrix [out, in], or the experts of one layer: then every figure is that of the worst expert.

    matrices       how many it stands for; worst_matrix: the one of lowest SQNR at int4 per_group(128), None for 1
    nonfinite      NaN and Inf; a matrix that holds any gives no figures
    sampled_rows   rows that the losses were measured on; None: all of them. All other figures are of all rows
    zeros          share of elements that are 0. kurtosis: excess, over all elements; None if all are equal
    outputs        ranges of the rows (output channels); inputs: of the columns (input channels)
    recommended    by format: see `recommend`
    """

    module: str
    kind: str
    role: str
    block: int | None
    shape: tuple[int, int]
    matrices: int
    dtype: str
    nonfinite: int
    sampled_rows: int | None
    absmax: float | None
    zeros: float | None
    kurtosis: float | None
    outputs: ChannelRanges | None
    inputs: ChannelRanges | None
    losses: tuple[MatrixLoss, ...]
    recommended: Mapping[str, str]
    worst_matrix: int | None = None

    @property
    def elements(self) -> int:
        return self.matrices * self.shape[0] * self.shape[1]

    def loss(self, granularity: str, format: str) -> MatrixLoss | None:
        """One combination; None if it was not measured."""
        return next((x for x in self.losses if (x.granularity, x.format) == (granularity, format)), None)

    def sqnr(self, granularity: str, format: str) -> float | None:
        """dB of one combination; None if it was not measured."""
        found = self.loss(granularity, format)
        return None if found is None else found.sqnr_db


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


@dataclass(frozen=True)
class TextUse:
    """The windows that the activations were taken from."""

    seqlen: int
    windows: int
    tokens: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_model` found. `activations` and `text` are None without a text."""

    model: str
    revision: str | None
    architecture: str
    tolerance_db: float
    layers: tuple[LayerInspection, ...]
    activations: tuple[ActivationInspection, ...] | None = None
    text: TextUse | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def summary(self) -> Summary:
        """Medians, worst layers, dead channels."""
        return _summarize(self)

    def to_json(self) -> dict[str, Any]:
        """All fields by name, and `summary`. Plain JSON: what is not finite (an exact result's SQNR) is null."""
        return {**_plain(self), "summary": _plain(self.summary)}


def inspect_model(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    layers: str | None = None,
    text: str | Path | None = None,
    seqlen: int = 512,
    windows: int = 8,
    device: str = "auto",
    max_rows: int | Literal["auto"] | None = "auto",
    tolerance_db: float = TOLERANCE_DB,
    progress: Progress | None = None,
) -> Inspection:
    """Inspect the full-precision checkpoint `model` (a folder or a hub name).

    layers        which, as `match` of a recipe's rule: a name or its last parts, a class, or `re:` and a regular
                  expression. None: the linear layers and experts, as a scheme reaches them without a rule
    text          a text file: the inputs of these layers are measured as well, on its first `windows` windows of
                  `seqlen` tokens
    max_rows      rows of each matrix on which losses are measured: None for all, "auto" for all up to 2^24 elements
                  and about that many beyond. Rounded up to bands of 128 rows, evenly spaced
    tolerance_db  see `recommend`
    Raises ModelError (no model, quantized already, no such layer kind), CheckpointError, RecipeError (`layers` matches
    nothing), TextError (text shorter than a window), PlanError (no such device, no rows).
    """
    if isinstance(max_rows, int) and max_rows < 1:
        raise PlanError(f"--max-rows {max_rows}: at least 1 row is needed to measure a loss")
    source = resolve_model(model, revision=revision)
    config = load_config(source, trust_remote_code)
    where = resolve_device(device)
    checkpoint = open_checkpoint(source.path)
    anatomy = read_anatomy(build_skeleton(config, trust_remote_code), checkpoint.entries)
    chosen = _choose(anatomy, layers)
    ids = None if text is None else _windows(source.path, text, seqlen, windows, config, trust_remote_code)
    progress = progress or QuietProgress()

    total = sum(checkpoint.entries[weight.tensor].nbytes for weight in chosen)
    progress.start(total, "bytes", f"inspect {source.name}")
    parts: dict[str, list[LayerInspection]] = defaultdict(list)
    try:
        for weight in chosen:
            name, kind = _name(weight), _kind(_name(weight))
            for matrix in _matrices(checkpoint, weight, where):
                part = inspect_matrix(matrix, max_rows=max_rows, tolerance_db=tolerance_db)
                part = replace(part, module=name, kind=kind, role=weight.role, block=weight.block)
                parts[name].append(part)
            progress.advance(checkpoint.entries[weight.tensor].nbytes, name)
    finally:
        progress.finish()
    found = tuple(_worst(same, tolerance_db) for same in parts.values())

    activations, use = None, None
    if ids is not None:
        module = load(source.path, device=str(where), trust_remote_code=trust_remote_code)
        experts_run_one_by_one(module.config)
        activations = inspect_activations(module, _sites(chosen, module), ids, where, progress)
        use = TextUse(seqlen, len(ids), ids.numel())
    return Inspection(
        model=source.name,
        revision=source.revision,
        architecture=anatomy.architecture,
        tolerance_db=tolerance_db,
        layers=found,
        activations=activations,
        text=use,
        notes=_notes(found, activations),
    )


# --- Which layers ------------------------------------------------------------------------------------------------


def _choose(anatomy: Anatomy, layers: str | None) -> list[Weight]:
    """In the order of the anatomy. Raises RecipeError for a pattern that matches nothing, with the nearest names."""
    if layers is None:
        chosen = [weight for weight in anatomy.weights if weight.role in QUANTIZED_ROLES]
        if not chosen:
            raise ModelError(f"{anatomy.architecture} has no linear layers that could be quantized")
        return chosen
    recipe = make_recipe(scheme="W8A16", rules=[{"match": layers, "keep": True}])
    recipe.assign(anatomy.weights)
    rule = Rule(match=layers, keep=True)
    return [weight for weight in anatomy.weights if rule.matches(weight)]


_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def _name(weight: Weight) -> str:
    """The module on disk; experts that have tensors of their own share one name, with `*` for their number."""
    if weight.role == "expert" and weight.experts == 1:
        numbers = list(_NUMBER.finditer(weight.module))
        if numbers:
            last = numbers[-1]
            return f"{weight.module[: last.start()]}.*{weight.module[last.end() :]}"
    return weight.module


def _kind(name: str) -> str:
    """What a layer is in every block: its name behind the number of the block."""
    first = _NUMBER.search(name)
    return name[first.end() + 1 :] if first and first.end() < len(name) else name


def _matrices(checkpoint: Checkpoint, weight: Weight, device: torch.device) -> Iterator[Tensor]:
    """The [out, in] matrices of a tensor, in its own dtype."""
    if weight.experts > 1:
        for i in range(weight.experts):
            yield _oriented(checkpoint.read_rows(weight.tensor, i, i + 1)[0].to(device), weight)
    else:
        yield _oriented(checkpoint.read(weight.tensor).to(device), weight)


def _oriented(tensor: Tensor, weight: Weight) -> Tensor:
    if tensor.ndim != 2:
        tensor = tensor.reshape(weight.out_features, weight.in_features)
    return tensor.T if weight.transposed else tensor


# --- One matrix --------------------------------------------------------------------------------------------------


def inspect_matrix(
    matrix: Tensor, *, max_rows: int | Literal["auto"] | None = "auto", tolerance_db: float = TOLERANCE_DB
) -> LayerInspection:
    """Inspect one weight [out, in] of any float dtype; see `inspect_model`. Names in the result are empty."""
    rows, cols = matrix.shape
    low = high = None
    sums: list[list[float]] = []
    nonfinite = zeros = 0
    row_low: list[Tensor] = []
    row_high: list[Tensor] = []
    for start, stop in _bands(rows, cols, rows):
        x = matrix[start:stop].to(torch.float32)
        powers = power_sums(x)
        if not bool(torch.isfinite(powers[:, 1]).all()):
            nonfinite += int((~torch.isfinite(x)).sum())
            continue
        zeros += int((x == 0).sum())
        sums += powers.tolist()
        row_low.append(x.amin(1))
        row_high.append(x.amax(1))
        low = x.amin(0) if low is None else torch.minimum(low, x.amin(0))
        high = x.amax(0) if high is None else torch.maximum(high, x.amax(0))

    def result(**figures: Any) -> LayerInspection:
        dtype = str(matrix.dtype).removeprefix("torch.")
        return LayerInspection("", "", "linear", None, (rows, cols), 1, dtype, nonfinite, **figures)

    if nonfinite or low is None or high is None:
        return result(
            sampled_rows=None,
            absmax=None,
            zeros=None,
            kurtosis=None,
            outputs=None,
            inputs=None,
            losses=(),
            recommended={},
        )
    wanted = rows
    if max_rows == "auto":
        wanted = rows if rows * cols <= EXACT_ELEMENTS else max(1, EXACT_ELEMENTS // cols)
    elif max_rows is not None:
        wanted = min(rows, max_rows)
    bands = list(_bands(rows, cols, wanted))
    measured = sum(stop - start for start, stop in bands)
    losses = _losses(matrix, bands, torch.stack([low, high]))
    outputs, inputs = describe_channels(torch.cat(row_low), torch.cat(row_high)), describe_channels(low, high)
    return result(
        sampled_rows=None if measured == rows else measured,
        absmax=inputs.absmax,
        zeros=zeros / (rows * cols),
        kurtosis=excess_kurtosis([math.fsum(column) for column in zip(*sums, strict=True)], rows * cols),
        outputs=outputs,
        inputs=inputs,
        losses=losses,
        recommended=recommend(losses, tolerance_db),
    )


def recommend(losses: Sequence[MatrixLoss], tolerance_db: float = TOLERANCE_DB) -> dict[str, str]:
    """For each format the coarsest granularity that loses less than `tolerance_db` against the best.

    Coarser means fewer bits per weight (of equals, the one listed first). Per input channel is left out.
    """
    chosen: dict[str, str] = {}
    for format in FORMATS:
        candidates = [x for x in losses if x.format == format and x.granularity in RECOMMENDABLE]
        best = max((x.sqnr_db for x in candidates), default=0.0)
        for x in sorted(candidates, key=lambda x: x.bits_per_weight):
            if x.sqnr_db == best or x.sqnr_db > best - tolerance_db:
                chosen[format] = x.granularity
                break
    return chosen


def _bands(rows: int, cols: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Row ranges: all rows, or evenly spaced bands of 128 that have at least `wanted`; joined up to a chunk's size.

    Every range but the last begins and ends at a multiple of 128, so that blocks of 128 are the matrix's own.
    """
    count, need = math.ceil(rows / _BAND), math.ceil(wanted / _BAND)
    picked = [i * count // need for i in range(need)] if need < count else list(range(count))
    limit = max(1, _CHUNK_ELEMENTS // (_BAND * cols))
    start, length = picked[0], 1
    for band in picked[1:]:
        if band == start + length and length < limit:
            length += 1
        else:
            yield start * _BAND, (start + length) * _BAND
            start, length = band, 1
    yield start * _BAND, min(rows, (start + length) * _BAND)


class _Tally:
    """What is added up for one format and granularity."""

    def __init__(self, name: str, format: str, dtype: torch.dtype, extremes: Tensor) -> None:
        self.name = name
        spec = QuantSpec(get_format(format), GRANULARITIES[name])
        self.spec = Scheme(name, spec).for_dtype(dtype).weight
        self.codes = 2**self.spec.format.bits
        self.errors: list[float] = []
        self.spans: list[float] = []
        self.hits: list[float] = []
        self.tiles = 0
        # tiles that reach over all rows have one scale for all bands, which depends on nothing but the extremes
        tall = self.spec.granularity.rows is None
        self.steps = scale_values(choose_scale(extremes, self.spec)[0]) if tall else None
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._elements = 0

    def add(self, x: Tensor) -> None:
        """Round a band of rows, float32."""
        grain = self.spec.granularity
        steps = self.steps if self.steps is not None else scale_values(choose_scale(x, self.spec)[0])
        tiles = to_tiles(x, grain)
        grid = to_grid(tiles, steps, None, self.spec)
        index = (grid - self.spec.low).to(torch.int64)
        outside, first, last = None, grid, grid
        if not grain.divides(tuple(x.shape)):  # what fills up a cut tile is no code
            outside = to_tiles(torch.ones_like(x), grain) == 0
            index = index.masked_fill_(outside, self.codes)
            first, last = grid.masked_fill(outside, math.inf), grid.masked_fill(outside, -math.inf)
        used = torch.zeros(*tiles.shape[:2], self.codes + _WORD, dtype=torch.bool, device=x.device)
        used.scatter_(-1, index, True)
        if outside is not None:
            used[..., self.codes] = False
        seen = used, first.amin(-1), last.amax(-1)
        error = from_grid(grid, steps, None).sub_(tiles).double().square_()
        self.errors.append(_total(row_sums(error)))
        if self.steps is not None:
            self._elements += tiles.shape[-1]
            old = self._seen
            self._seen = (
                seen
                if old is None
                else (old[0] | seen[0], torch.minimum(old[1], seen[1]), torch.maximum(old[2], seen[2]))
            )
        else:
            self._count(*seen, tiles.shape[-1] if outside is None else tiles.shape[-1] - outside.sum(-1))

    def _count(self, used: Tensor, first: Tensor, last: Tensor, sizes: int | Tensor) -> None:
        """Whole tiles [down, across] of `sizes` elements: which codes they use, and the first and the last of these."""
        # eight flags are one word: words are added, their bytes stay below 256
        words = used.view(torch.int64).sum(-1, keepdim=True)
        hit = words.view(torch.uint8).sum(-1).double()
        possible = min(sizes, self.codes) if isinstance(sizes, int) else sizes.clamp(max=self.codes)
        self.hits.append(_total(row_sums(hit / possible)))
        self.spans.append(_total(row_sums(last.double() - first.double())) / (self.codes - 1))
        self.tiles += hit.numel()

    def conclude(self, power: float, shape: tuple[int, int]) -> MatrixLoss:
        if self._seen is not None:
            self._count(*self._seen, self._elements)
        return MatrixLoss(
            granularity=self.name,
            format=self.spec.format.name,
            sqnr_db=sqnr_db(power, math.fsum(self.errors)),
            bits_per_weight=self.spec.count_bits(shape) / math.prod(shape),
            span=math.fsum(self.spans) / self.tiles,
            hit=math.fsum(self.hits) / self.tiles,
        )


def _total(x: Tensor) -> float:
    return math.fsum(x.flatten().tolist())


def _losses(matrix: Tensor, bands: Sequence[tuple[int, int]], extremes: Tensor) -> tuple[MatrixLoss, ...]:
    tallies = [_Tally(name, format, matrix.dtype, extremes) for format in FORMATS for name in GRANULARITIES]
    powers: list[float] = []
    for start, stop in bands:
        x = matrix[start:stop].to(torch.float32).contiguous()
        powers.append(_total(row_sums(x.double().square_())))
        for tally in tallies:
            tally.add(x)
    shape = (matrix.shape[0], matrix.shape[1])
    return tuple(tally.conclude(math.fsum(powers), shape) for tally in tallies)


# --- Many matrices -----------------------------------------------------------------------------------------------


def _worst(parts: Sequence[LayerInspection], tolerance_db: float) -> LayerInspection:
    """One layer out of the matrices of its experts."""
    if len(parts) == 1:
        return parts[0]
    nonfinite = sum(part.nonfinite for part in parts)
    healthy = [(i, part) for i, part in enumerate(parts) if part.losses]
    if not healthy:
        return replace(parts[0], matrices=len(parts), nonfinite=nonfinite)
    sound = [part for _, part in healthy]
    losses = tuple(
        replace(
            min(same, key=lambda x: x.sqnr_db),
            span=math.fsum(x.span for x in same) / len(same),
            hit=math.fsum(x.hit for x in same) / len(same),
        )
        for same in zip(*(part.losses for part in sound), strict=True)
    )
    return replace(
        sound[0],
        matrices=len(parts),
        nonfinite=nonfinite,
        absmax=max(_numbers(part.absmax for part in sound)),
        zeros=max(_numbers(part.zeros for part in sound)),
        kurtosis=max(_numbers(part.kurtosis for part in sound), default=None),
        outputs=_worst_channels([part.outputs for part in sound if part.outputs]),
        inputs=_worst_channels([part.inputs for part in sound if part.inputs]),
        losses=losses,
        recommended=recommend(losses, tolerance_db),
        worst_matrix=min(healthy, key=lambda pair: pair[1].sqnr(*SENSITIVITY) or 0.0)[0],
    )


def _worst_channels(ranges: Sequence[ChannelRanges]) -> ChannelRanges:
    """The expert with the largest ratio; outliers and dead channels are those of all."""
    worst = max(ranges, key=lambda x: x.ratio or 0.0)
    return replace(worst, outliers=sum(x.outliers for x in ranges), dead=sum(x.dead for x in ranges))


def _numbers(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _sites(chosen: Sequence[Weight], model: nn.Module) -> list[Site]:
    """Where the activations of these weights come in; those that are no matrix products of features have none."""
    readers: dict[str, list[Weight]] = defaultdict(list)
    for weight in chosen:
        if weight.role not in ("conv", "embedding"):
            for target in weight.targets or (weight.memory,):
                readers[target].append(weight)
    matrices = find_matrices(model)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return [
        Site(
            parameter=parameter,
            kind=_kind(parameter.removesuffix(".weight")),
            block=weights[0].block,
            in_features=weights[0].in_features,
            layers=tuple(dict.fromkeys(_name(weight) for weight in weights)),
            transposed=matrices[parameter].transposed,
        )
        for parameter, weights in sorted(readers.items(), key=lambda item: order[item[0]])
    ]


def _windows(
    folder: Path, text: str | Path, seqlen: int, windows: int, config: Any, trust_remote_code: bool
) -> LongTensor:
    check_windows(config, seqlen)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    vocab = getattr(config.get_text_config(), "vocab_size", None)
    return token_windows(tokenizer, read_text(text), seqlen, windows, vocab_size=vocab)


def _notes(layers: Sequence[LayerInspection], activations: Sequence[ActivationInspection] | None) -> tuple[str, ...]:
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


def _summarize(inspection: Inspection) -> Summary:
    kinds: dict[str, list[LayerInspection]] = defaultdict(list)
    for layer in inspection.layers:
        kinds[layer.kind].append(layer)
    sound = [layer for layer in inspection.layers if layer.losses]
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
        damaged=tuple(layer.module for layer in inspection.layers if layer.nonfinite),
        column_bound=tuple(
            layer.module
            for layer in sound
            if (layer.sqnr("per_channel(1)", "int4") or 0.0)
            > (layer.sqnr("per_channel", "int4") or 0.0) + inspection.tolerance_db
        ),
    )


def _summarize_kind(kind: str, layers: Sequence[LayerInspection]) -> KindSummary:
    sound = [layer for layer in layers if layer.losses]
    sqnr: dict[str, tuple[float, float]] = {}
    for format in FORMATS:
        for name in GRANULARITIES:
            values = sorted(_numbers(layer.sqnr(name, format) for layer in sound))
            if values:
                sqnr[f"{format} {name}"] = (_median(values), values[0])
    return KindSummary(
        kind=kind,
        layers=len(layers),
        elements=sum(layer.elements for layer in layers),
        sqnr=sqnr,
        output_ratio=max(_numbers(x.outputs.ratio for x in sound if x.outputs), default=None),
        input_ratio=max(_numbers(x.inputs.ratio for x in sound if x.inputs), default=None),
        kurtosis=max(_numbers(x.kurtosis for x in sound), default=None),
    )


def _median(ordered: Sequence[float]) -> float:
    a, b = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return a if a == b else (a + b) / 2  # two infinities have no mean


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists, numbers that are not finite as None."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
