"""The Python face, of the same shape as the command line: one function for each job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.errors import RecipeError
from bitgrain.evaluation.inspection.job import inspect_model as inspect
from bitgrain.evaluation.language import BaseReference, Evaluation, evaluate_model, record_base
from bitgrain.models.batch_norms import fold_batch_norms_
from bitgrain.models.source import resolve_model
from bitgrain.numerics.formats import FP16
from bitgrain.pipeline.checks import Check
from bitgrain.pipeline.contents import Contents
from bitgrain.pipeline.contents import read_contents as show
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.convert_gguf import is_gguf, wanted_type
from bitgrain.pipeline.converted import Converted
from bitgrain.pipeline.equip import cache_for
from bitgrain.pipeline.execution import Execution
from bitgrain.pipeline.finetune import Finetuned, finetune
from bitgrain.pipeline.gguf_types import gguf_problems
from bitgrain.pipeline.load import load
from bitgrain.pipeline.merge import merge
from bitgrain.pipeline.mixed import allocate_bits
from bitgrain.pipeline.modules.calibrate import ModuleCalibration, calibrate_module
from bitgrain.pipeline.modules.low_bit import low_bit_
from bitgrain.pipeline.modules.quantize import quantize_, quantize_tensor
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.planning import DEFAULT_SHARD_BYTES, make_plan
from bitgrain.pipeline.quantize import QuantizeResult
from bitgrain.pipeline.quantize_gguf import run_plan_into
from bitgrain.pipeline.sensitive import spare_layers
from bitgrain.pipeline.statistics import Calibrated, run_calibration
from bitgrain.pipeline.verify import verify
from bitgrain.progress import Progress, make_progress
from bitgrain.recipes import OnIndivisible, Recipe, load_recipe, make_recipe
from bitgrain.runtime.attention import AttentionScheme, attention_of, get_attention_scheme
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.kv_cache import CacheScheme, KVCache

__all__ = [
    "Calibrated",
    "Check",
    "Contents",
    "Converted",
    "Finetuned",
    "KVCache",
    "calibrate",
    "convert",
    "evaluate",
    "finetune",
    "fold_batch_norms_",
    "inspect",
    "load",
    "low_bit_",
    "merge",
    "plan",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "show",
    "train",
    "verify",
]


def read_recipe(
    scheme: str | None,
    recipe: str | Path | Recipe | None,
    on_indivisible: OnIndivisible | None = None,
    solver: str | None = None,
    calibration: Mapping[str, Any] | str | Path | None = None,
    columns: Mapping[str, Any] | float | None = None,
    experts: Mapping[str, Any] | str | None = None,
    kv_cache: str | None = None,
) -> Recipe:
    """One Recipe out of what a user may give: a scheme's name, a recipe (a name or a file), or both.

    What is given beside a recipe replaces what it says; `calibration` is a text, or keys of `recipes.Calibration`;
    `experts` is a policy, or keys of `recipes.Experts`.
    Raises RecipeError, SchemeError.
    """
    given = {"scheme": scheme, "on_indivisible": on_indivisible, "solver": solver, "kv_cache": kv_cache}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if calibration is not None:
        text = {"text": str(calibration)} if isinstance(calibration, (str, Path)) else dict(calibration)
        settings["calibration"] = text
    if columns is not None:
        settings["columns"] = dict(columns) if isinstance(columns, Mapping) else {"share": columns}
    if experts is not None:
        settings["experts"] = {"policy": experts} if isinstance(experts, str) else dict(experts)
    if isinstance(recipe, Recipe):
        for key in settings.keys() & {"calibration", "experts"}:
            settings[key] = {**getattr(recipe, key).model_dump(), **settings[key]}
        return make_recipe(**{**recipe.model_dump(), **settings}) if settings else recipe
    if recipe is not None:
        return load_recipe(recipe, **settings)
    if scheme is None:
        raise RecipeError("say what to do: a scheme (for instance W4A16) or a recipe file")
    return make_recipe(**settings)


def plan(
    model: str | Path,
    scheme: str | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    on_indivisible: OnIndivisible | None = None,
    solver: str | None = None,
    calibration: Mapping[str, Any] | str | Path | None = None,
    experts: Mapping[str, Any] | str | None = None,
    statistics: str | Path | None = None,
    columns: Mapping[str, Any] | float | None = None,
    keep: Sequence[str] = (),
    fallback: Sequence[str] = (),
    include: Sequence[str] = (),
    bits: float | None = None,
    kv_cache: str | None = None,
    engine: str | None = None,
    layout: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int | None = None,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What `quantize` would do, before a weight is written: see `bitgrain.pipeline.plan.Plan`.

    calibration  the text that solvers may learn from, or keys of `recipes.Calibration`
    experts      what experts that calibration hardly reached are solved with: "borrow", "all", "nearest", or keys of
                 `recipes.Experts`
    statistics   a folder that `calibrate` wrote, in place of text: for any scheme, and any solver that learns from it
    columns      share of the input channels whose columns are kept in 16 bits, or keys of `recipes.ColumnsModel`
    keep         layers to be left in full precision, as `match` in a recipe's rules; "2%": the most sensitive ones that
                 hold this share of the weights (`pipeline.sensitive`)
    fallback     layers to get 8 bits a weight (`recipes.scheme.eight_bits`), named likewise, or a share
    include      layers that no scheme reaches by itself (lm_head, embeddings) to be quantized too, named likewise
    bits         stored bits a weight on average, allocated by sensitivity, which is measured now (`pipeline.mixed`);
                 `scheme` then only says how activations are quantized; engine: whose formats may be chosen
                 (None: those of the layout, gguf's or compressed-tensors')
    kv_cache     "fp8": keys and values get static scales from calibration, which vLLM reads
    layout       how the files are laid out (`checkpoints.layouts`); None: compressed-tensors, or bitgrain's own where
                 that cannot hold everything; "gguf" or "gguf:TYPE": one file for llama.cpp
    """
    if statistics is not None and (calibration is not None or bits is not None):
        what = "bits, which needs gradients" if calibration is None else "calibration text"
        raise RecipeError(f"statistics stand in place of text: give either them or {what}")
    if bits is not None and scheme is None and not isinstance(recipe, Recipe):
        scheme = "W8A16"
    chosen = read_recipe(scheme, recipe, on_indivisible, solver, calibration, columns, experts, kv_cache)
    kept, fallen = _share(keep), _share(fallback)
    if bits is not None and (kept or fallen):
        raise RecipeError("bits weighs every layer itself: name those to keep or to fall back, or leave bits out")
    if statistics is not None and (kept or fallen):
        raise RecipeError("shares of keep and fallback need gradients, which statistics do not hold: give calibration")
    if keep or fallback or include:
        eight = chosen.fallback().model_dump() if fallback else None
        rules = [
            *chosen.rules,
            *({"match": name, "include": True} for name in include),
            *({"match": name, "scheme": eight} for name in fallback if not is_share(name)),
            *({"match": name, "keep": True} for name in keep if not is_share(name)),
        ]
        chosen = make_recipe(**{**chosen.model_dump(), "rules": rules})
    settings: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "max_shard_bytes": max_shard_bytes,
        "workers": workers,
    }
    gguf = layout if layout is not None and is_gguf(layout) else None
    default = "gguf" if gguf else "compressed-tensors"
    notes: tuple[str, ...] = ()
    measuring: dict[str, Any] = {"device": device, "cache": cache, "progress": progress or make_progress("quiet")}
    if bits is not None:
        mix = allocate_bits(model, chosen, bits, engine=engine or default, **measuring, **settings)
        chosen, notes = mix.recipe, mix.notes
    elif kept or fallen:
        spared = spare_layers(model, chosen, keep=kept, fallback=fallen, **measuring, **settings)
        chosen, notes = spared.recipe, spared.notes
    if gguf:  # the folder that becomes the file; its blocks have scales in half precision
        settings |= {"layout": "bitgrain", "scales": FP16}
    else:
        settings["layout"] = layout
    made = make_plan(model, chosen, notes=notes, statistics=statistics, **settings)
    if not gguf:
        return made
    problems = gguf_problems(made.quantized.values(), made.config.to_dict(), wanted_type(gguf))
    return replace(made, problems=(*made.problems, *problems))


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | None = None,
    *,
    device: str = "auto",
    restart: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize MODEL (a folder or a hub name) into the new folder `out`, or with layout="gguf" the new file.

    settings  as for `plan`: recipe, on_indivisible, solver, calibration, experts, statistics, columns, keep,
              fallback, include, bits, kv_cache, engine, revision, trust_remote_code, max_shard_bytes, workers
    Killed at any moment, the same call resumes. Raises a BitgrainError that says what is wrong and what to do.
    """
    cache = bits_cache(out)
    made = plan(model, scheme, device=device, cache=cache, progress=progress, **settings)
    layout = settings.get("layout")
    result = run_plan_into(made, out, layout, device=device, restart=restart, progress=progress)
    cache.unlink(missing_ok=True)
    return result


def training_recipe(
    scheme: str | None,
    text: str | Path,
    recipe: str | Path | Recipe = "train",
    training: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of `train`: `recipe`, calibrated on the text, with `training` among its training's settings.

    Raises RecipeError, SchemeError.
    """
    given = dict(training or {})
    calibration = {"text": str(text), **({"seqlen": given["seqlen"]} if "seqlen" in given else {})}
    chosen = read_recipe(scheme, recipe, calibration=calibration)
    merged = {**(chosen.tuning.training or {}), **given}
    return make_recipe(**{**chosen.model_dump(), "tuning": {**chosen.tuning.model_dump(), "training": merged}})


def train(
    model: str | Path,
    out: str | Path,
    scheme: str | None = None,
    *,
    text: str | Path,
    recipe: str | Path | Recipe = "train",
    training: Mapping[str, Any] | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize MODEL as `recipe` says, then train it on `text`, distilled from the full-precision model, into `out`.

    training  settings of `bitgrain.training.TrainingSettings`: steps, batch, rate, ...
    settings  as for `quantize`: on_indivisible, keep, fallback, include, device, restart, progress, ...
    The files are those of `quantize`. Killed at any moment, the same call resumes. Raises TrainingError where the loss
    is not finite: the best state so far is kept, and the same call ends with it; TextError for a text that holds less
    than one batch; and what `quantize` raises.
    """
    return quantize(model, out, recipe=training_recipe(scheme, text, recipe, training), **settings)


@overload
def calibrate(
    model: nn.Module, out: Iterable[Any], /, *, moments: bool = True, progress: Progress | None = None
) -> ModuleCalibration: ...
@overload
def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Mapping[str, Any] | str | Path | None = None,
    experts: Mapping[str, Any] | str | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Calibrated: ...
def calibrate(
    model: str | Path | nn.Module,
    out: str | Path | Iterable[Any],
    *,
    calibration: Mapping[str, Any] | str | Path | None = None,
    experts: Mapping[str, Any] | str | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    moments: bool = True,
    progress: Progress | None = None,
) -> Calibrated | ModuleCalibration:
    """Run MODEL over text once, and write what each of its layers is given into the new folder `out`.

    calibration  a text (None: built in), or keys of `recipes.Calibration`
    experts      the policy that the statistics are to serve, as for `plan`; those taken with "all" serve every one
    `quantize(..., statistics=out)` then needs no text. Raises TextError, OutputError (`out` exists), NumericsError
    (NaN, Inf), ModelError (a model that cannot run block by block).

    calibrate(module, batches) runs a module in memory over an iterable of what it is called with (tensors, tuples of
    arguments, dicts of keywords), and returns what `quantize_(module, ..., calibration=)` needs: see
    `bitgrain.pipeline.modules.calibrate.calibrate_module`. moments=False takes less, enough for static scales.
    """
    if isinstance(model, nn.Module):
        of_the_job = (calibration, experts, device, revision, workers)
        if isinstance(out, (str, Path)) or of_the_job != (None, None, "auto", None, None):
            raise RecipeError("a module in memory is calibrated by batches, where it is: calibrate(module, batches)")
        return calibrate_module(model, out, moments=moments, progress=progress)
    if not isinstance(out, (str, Path)):
        raise RecipeError("calibrate(MODEL, OUT) writes into a folder; batches are for a module in memory")
    recipe = read_recipe("W8A16", None, calibration=calibration, experts=experts)
    settings: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "workers": workers}
    draft = make_plan(model, recipe, calibrate=True, **settings)
    return run_calibration(draft, out, device=device, progress=progress)


def is_share(text: str) -> bool:
    """Whether `text` is a percentage in place of a layer's name."""
    return text.endswith("%")


def _share(names: Sequence[str]) -> float:
    """The percentage among `names` as a part of 1; 0 for none."""
    shares = [name for name in names if is_share(name)]
    try:
        found = [float(name[:-1]) for name in shares]
    except ValueError:
        found = [-1.0]
    if len(found) > 1 or not all(0 < share < 100 for share in found):
        raise RecipeError(f"{', '.join(shares)}: one percentage between 0% and 100% can be given, beside names")
    return found[0] / 100 if found else 0.0


def bits_cache(out: str | Path) -> Path:
    """Where a job that allocates bits keeps what it measured until OUT is there."""
    return Path(out).with_name(Path(out).name + ".sensitivity.json")


def evaluate(
    model: str | Path | nn.Module,
    *,
    text: str | Path,
    against: str | Path | nn.Module | BaseReference | None = None,
    tokenizer: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    batch_size: int = 4,
    special_tokens: bool = False,
    kv_cache: str | CacheScheme | None = None,
    attention: str | AttentionScheme | None = None,
    execution: Execution = "dequantize",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` on the text file `text`, and its distance from the model `against`.

    model, against  folders, hub names, or modules; `against` may be a `BaseReference` recorded before
    tokenizer       the folder of the tokenizer; needed when `model` is a module
    seqlen, windows tokens in a window; how many windows at most (None: all)
    special_tokens  begin the text with what the tokenizer adds, as most published perplexities do
    kv_cache        how `model` keeps keys and values of the past (`runtime.kv_cache.SCHEMES`); None: as its checkpoint
                    says, "none": as they are
    attention       how it multiplies Q, K, P and V (`runtime.attention.SCHEMES`)
    execution       how quantized layers of folders compute, as for `load`: by default the exact simulation
    Raises TextError, ModelError, CheckpointError, NumericsError, SchemeError.
    """
    (found,) = evaluate_variants(
        model,
        [Variant(kv_cache, attention)],
        text=text,
        against=against,
        tokenizer=tokenizer,
        seqlen=seqlen,
        windows=windows,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        special_tokens=special_tokens,
        execution=execution,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return found


@dataclass(frozen=True)
class Variant:
    """A way to run a model: with quantized keys and values, or quantized attention, or both."""

    kv_cache: str | CacheScheme | None = None
    attention: str | AttentionScheme | None = None


def evaluate_variants(
    model: str | Path | nn.Module,
    variants: Sequence[Variant],
    *,
    text: str | Path,
    against: str | Path | nn.Module | BaseReference | None = None,
    tokenizer: str | Path | None = None,
    seqlen: int = 512,
    windows: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    batch_size: int = 4,
    special_tokens: bool = False,
    execution: Execution = "dequantize",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`evaluate` of several variants in turn. Of several, the base is run once if its logits fit into memory."""
    caches = [cache_for(model, one.kv_cache, trust_remote_code) for one in variants]
    attentions = [None if one.attention is None else get_attention_scheme(one.attention) for one in variants]
    folder = tokenizer if tokenizer is not None else (model if not isinstance(model, nn.Module) else None)
    if folder is None:
        raise RecipeError("a module brings no tokenizer: pass tokenizer=FOLDER")
    where = resolve_device(device)

    def get(one: str | Path | nn.Module) -> nn.Module:
        if isinstance(one, nn.Module):
            return one
        # without a cache of its own: what each variant runs through is passed to it
        settings: dict[str, Any] = {"device": str(where), "dtype": dtype, "trust_remote_code": trust_remote_code}
        return load(one, execution=execution, kv_cache="none", **settings)

    content = read_text(text)
    words = load_tokenizer(resolve_model(folder, gguf=True).path, trust_remote_code)
    module = get(model)
    vocab = getattr(getattr(module, "config", None), "vocab_size", None)
    ids = token_windows(words, content, seqlen, windows, vocab_size=vocab, special_tokens=special_tokens)
    base = against if isinstance(against, BaseReference) or against is None else get(against)
    if isinstance(base, nn.Module) and len(variants) > 1:
        base = record_base(base, ids, device=where, batch_size=batch_size, progress=progress)
    found: list[Evaluation] = []
    for cache, attention in zip(caches, attentions, strict=True):
        with attention_of(module, attention):
            found.append(
                evaluate_model(
                    module, ids, base=base, device=where, batch_size=batch_size, kv_cache=cache, progress=progress
                )
            )
    return found
