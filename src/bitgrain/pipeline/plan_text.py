"""What a plan says of its calibration: whether there must be text, which, and what is to be told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PretrainedConfig

from bitgrain.calibration.doctor import examine, examine_experts
from bitgrain.calibration.statistics import layer_key, whole_key
from bitgrain.calibration.statistics_file import StatisticsFile
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import CalibrationText, calibration_windows
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Weight
from bitgrain.models.source import ModelSource
from bitgrain.pipeline.experts import experts_of, needs_whole
from bitgrain.recipes import Recipe, Scheme
from bitgrain.solvers import get_solver


def not_by_statistics(recipe: Recipe) -> list[str]:
    """A problem if the recipe needs the activations themselves."""
    tuning = recipe.tuning
    needs = {
        "transforms": recipe.transforms,
        "target": recipe.target,
        "tuning.blockwise": tuning.blockwise,
        "tuning.end_to_end": tuning.end_to_end,
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


def experts_note(recipe: Recipe, tokens: Mapping[str, Sequence[int]] | None) -> list[str]:
    """What the plan says of experts; `tokens`: how many reached each, where saved statistics tell."""
    if tokens is not None:
        return [finding.message for finding in examine_experts(tokens, recipe.experts)]
    few = f"experts that fewer than {recipe.experts.tokens} calibration tokens reach"
    told = {
        "borrow": f"{few} borrow what all tokens of their layer would show them",
        "all": "calibration is routed to all experts",
        "nearest": f"{few} are rounded to nearest",
    }
    return [told[recipe.experts.policy]]


def experts_not_by_statistics(recipe: Recipe, statistics: StatisticsFile, weights: Iterable[Weight]) -> list[str]:
    """A problem if the policy for experts needs what was not kept of them."""
    asked, taken = recipe.experts, statistics.about.settings.get("experts", {"policy": "nearest"})
    covered = taken["policy"] in ("all", asked.policy) and (taken["policy"] == "all" or asked.tokens <= taken["tokens"])
    if covered or asked.policy == "nearest":
        return []
    tokens = statistics.all_tokens
    keys = (key for layer in experts_of(weights).values() for one in layer for key in one)
    names = [layer_key(key.name, key.expert) for key in keys]
    lacking = [n for n in names if whole_key(n) not in statistics and needs_whole(asked, tokens.get(n, 0))]
    if not lacking:
        return []
    if asked.policy == "all":
        return [
            f"--experts all: the statistics {statistics.folder.name} were taken of the experts that the router chose; "
            "calibrate again with --experts all, or ask for another policy"
        ]
    kept = f"only below {taken['tokens']}" if taken["policy"] == "borrow" else "nowhere"
    return [
        f"fewer than {asked.tokens} tokens reached {lacking[0]} (and {len(lacking) - 1} more matrices of experts); the "
        f"statistics {statistics.folder.name} keep {kept} what it could borrow: calibrate again with --experts borrow "
        f"--expert-tokens {asked.tokens}, or ask for --experts nearest"
    ]


def needs_text(recipe: Recipe, schemes: Iterable[Scheme | None]) -> bool:
    """Whether a layer's scheme needs text; range weighted takes all inputs to be alike where the recipe names none."""
    named = recipe.calibration.text is not None
    return any(
        scheme is not None and (scheme.needs_calibration or (named and scheme.weight.range.name == "weighted"))
        for scheme in schemes
    )


def read_calibration(
    recipe: Recipe, source: ModelSource, config: PretrainedConfig, trust_remote_code: bool
) -> CalibrationText:
    """The windows of the recipe's text. Raises TextError."""
    wanted = recipe.calibration
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return calibration_windows(
        wanted.text or "builtin",
        load_tokenizer(source.path, trust_remote_code),
        windows=wanted.windows,
        seqlen=wanted.seqlen,
        sampling=wanted.sampling,
        seed=wanted.seed,
        vocab_size=vocabulary,
    )
