"""What a plan says of its calibration: whether there must be text, which, and what is to be told of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from bitgrain.calibration.doctor import examine, examine_experts
from bitgrain.calibration.statistics import layer_key
from bitgrain.calibration.statistics_file import StatisticsFile
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import CalibrationText, calibration_windows
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError, TextError
from bitgrain.models.anatomy import Weight
from bitgrain.models.source import ModelSource
from bitgrain.pipeline.experts import experts_of, needs_whole, saved_tokens, told_of_model
from bitgrain.recipes import Experts, Recipe, Scheme
from bitgrain.recipes.recipe import ENOUGH
from bitgrain.solvers import get_solver


def not_by_statistics(recipe: Recipe) -> list[str]:
    """A problem if the recipe needs the activations themselves."""
    tuning = recipe.tuning
    needs = {
        "transforms": recipe.transforms,
        "target": recipe.target,
        "tuning.blockwise": tuning.blockwise,
        "tuning.end_to_end": tuning.end_to_end,
        "kv_cache": recipe.kv_cache,
        "tuning.training": tuning.training,
    }
    named = [name for name, setting in needs.items() if setting or isinstance(setting, dict)]
    if not named:
        return []
    return [
        f"{' and '.join(named)} in the recipe: needs activations, of which saved statistics hold only sums; give text "
        "(--calibration) instead, or a recipe without, for instance fast"
    ]


def statistics_note(statistics: StatisticsFile) -> str:
    """One line for the plan."""
    told = statistics.about.text
    return (
        f"calibrated by the statistics {statistics.folder.name}: {told['windows']} windows of {told['seqlen']} tokens "
        f"of {', '.join(told['sources'])}, inputs as the full-precision model gives them"
    )


def findings(calibration: CalibrationText, recipe: Recipe, layers: Iterable[StoredLayer]) -> list[str]:
    """What the doctor says of the text."""
    hessians = get_solver(recipe.solver).needs_calibration
    widest = max((layer.in_features for layer in layers if hessians), default=0)
    return [finding.message for finding in examine(calibration.ids, widest=widest)]


def learns_from_inputs(recipe: Recipe, layers: Iterable[StoredLayer]) -> bool:
    """Whether the moments of inputs decide how any of the layers is rounded."""
    if get_solver(recipe.solver).needs_calibration or recipe.target is not None:
        return True
    return any(layer.scheme.weight.range.name == "weighted" for layer in layers)


def experts_note(recipe: Recipe, statistics: StatisticsFile | None, weights: Sequence[Weight]) -> list[str]:
    """What the plan says of experts: their tokens where saved statistics tell them, else the policy."""
    if statistics is not None:
        members = experts_of(weights)
        told = told_of_model(recipe.experts, members, saved_tokens(members, statistics.all_tokens))
        return [finding.message for finding in examine_experts(told)]
    tokens = recipe.experts.tokens
    few = f"experts that fewer than {f'{ENOUGH} calibration tokens an input' if tokens is None else tokens} reach"
    texts = {
        "borrow": f"{few} borrow what all tokens of their layer would show them",
        "all": "calibration is routed to all experts",
        "nearest": f"{few} are rounded to nearest",
    }
    return [texts[recipe.experts.policy]]


def experts_not_by_statistics(recipe: Recipe, statistics: StatisticsFile, weights: Iterable[Weight]) -> list[str]:
    """A problem if the policy for experts needs what was not kept of them."""
    asked, taken = recipe.experts, Experts(**statistics.about.settings.get("experts", {"policy": "nearest"}))
    lacking: dict[str, int] = {}
    tokens = statistics.all_tokens
    for one in (one for layer in experts_of(weights).values() for one in layer):
        for key, in_features in one.items():
            name = layer_key(key.name, key.expert)
            count = tokens.get(name, 0)
            if needs_whole(asked, count, in_features) and not needs_whole(taken, count, in_features):
                lacking[name] = asked.threshold(in_features)
    if not lacking:
        return []
    first, threshold = next(iter(lacking.items()))
    if asked.policy == "all":
        return [
            f"--experts all: the statistics {statistics.folder.name} were taken of the experts that the router chose; "
            "calibrate again with --experts all, or ask for another policy"
        ]
    more = "" if asked.tokens is None else f" --expert-tokens {asked.tokens}"
    less = "" if taken.tokens is None or taken.policy == "nearest" else f" or --expert-tokens {taken.tokens}"
    return [
        f"fewer than {threshold} tokens reached {first} (and {len(lacking) - 1} more matrices of experts), and the "
        f"statistics {statistics.folder.name} keep nothing that it could borrow: calibrate again with --experts borrow"
        f"{more}, or ask for --experts nearest{less}"
    ]


def needs_text(recipe: Recipe, schemes: Iterable[Scheme | None]) -> bool:
    """Whether a layer's scheme needs text; range weighted takes all inputs to be alike where the recipe names none."""
    named = recipe.calibration.text is not None
    return any(
        scheme is not None and (scheme.needs_calibration or (named and scheme.weight.range.name == "weighted"))
        for scheme in schemes
    )


def read_training(
    recipe: Recipe, source: ModelSource, config: PretrainedConfig, trust_remote_code: bool
) -> CalibrationText | None:
    """The windows to train on; None where nothing is trained. Raises TextError, also for fewer than one batch."""
    settings = recipe.tuning.training_settings()
    if settings is None:
        return None
    found = calibration_windows(
        settings.text or recipe.calibration.text or "builtin",
        load_tokenizer(source.path, trust_remote_code),
        windows=settings.windows or None,
        seqlen=settings.seqlen or recipe.calibration.seqlen,
        vocab_size=getattr(config.get_text_config(), "vocab_size", None),
    )
    count, seqlen = found.ids.shape
    if count < settings.batch:
        raise TextError(
            f"the training text ({', '.join(found.description['sources'])}) holds {count} windows of {seqlen} tokens, "
            f"less than one batch of {settings.batch}: give a longer text, or smaller batches or windows"
        )
    return found


def read_calibration(
    recipe: Recipe,
    source: ModelSource,
    config: PretrainedConfig,
    trust_remote_code: bool,
    training: CalibrationText | None = None,
) -> CalibrationText:
    """The windows of the recipe's text; of one that is short and trained on, those that there are.

    Raises TextError, PlanError for a model that reads no tokens.
    """
    wanted = recipe.calibration
    settings = recipe.tuning.training_settings()
    if training is not None and settings is not None and not settings.text:
        least = training.ids.numel() // wanted.seqlen
        wanted = wanted.model_copy(update={"windows": max(1, min(wanted.windows, least))})
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise PlanError(
            f"{source.name} reads no tokens, so text cannot calibrate it: choose a scheme with dynamic activations and "
            "solver rtn, or calibrate the module in memory (bitgrain.calibrate, quantize_)"
        )
    return calibration_windows(
        wanted.text or "builtin",
        load_tokenizer(source.path, trust_remote_code),
        windows=wanted.windows,
        seqlen=wanted.seqlen,
        sampling=wanted.sampling,
        seed=wanted.seed,
        vocab_size=vocabulary,
    )
