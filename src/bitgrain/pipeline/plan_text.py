"""What a plan says of its calibration: whether there must be text, which, and what is to be told of it."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from bitgrain.calibration.doctor import examine
from bitgrain.calibration.statistics_file import StatisticsFile
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import CalibrationText, calibration_windows
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import TextError
from bitgrain.models.source import ModelSource
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
    """The windows of the recipe's text; of one that is short and trained on, those that there are. Raises TextError."""
    wanted = recipe.calibration
    settings = recipe.tuning.training_settings()
    if training is not None and settings is not None and not settings.text:
        least = training.ids.numel() // wanted.seqlen
        wanted = wanted.model_copy(update={"windows": max(1, min(wanted.windows, least))})
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
