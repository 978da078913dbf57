"""Which granularity, and what would it lose? Answered for each linear layer of a checkpoint.

Weights are read one matrix at a time, so memory is bounded by the largest tensor. Inputs need a text and the
loaded model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import LongTensor, Tensor, nn

from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.errors import ModelError, PlanError
from bitgrain.evaluation.inspection.activations import ActivationInspection, Site, check_windows, inspect_activations
from bitgrain.evaluation.inspection.summary import Summary, collect_notes, summarize_layers
from bitgrain.evaluation.inspection.weights import (
    TOLERANCE_DB,
    LayerInspection,
    inspect_matrix,
    worst_of,
)
from bitgrain.models.anatomy import Anatomy, Weight, read_anatomy
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.models.structure import find_matrices
from bitgrain.pipeline.load import experts_run_one_by_one, load
from bitgrain.progress import Progress, QuietProgress
from bitgrain.recipes import make_recipe
from bitgrain.recipes.recipe import QUANTIZED_ROLES, Rule
from bitgrain.runtime.device import resolve_device


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
        return summarize_layers(self.layers, self.tolerance_db)

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
    found = tuple(worst_of(same, tolerance_db) for same in parts.values())

    activations, use = None, None
    if ids is not None:
        module = load(source.path, device=str(where), trust_remote_code=trust_remote_code, execution="dequantize")
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
        notes=collect_notes(found, activations),
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
    return [anatomy.weights[i] for i in rule.among(anatomy.weights)]


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
