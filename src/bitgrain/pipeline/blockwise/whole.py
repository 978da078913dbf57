"""Tuning the whole quantized model: scales and norm gains by the KL divergence from the full-precision model."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import ModelError
from bitgrain.models.stream import StreamedModel
from bitgrain.pipeline.blockwise.batches import single_threaded
from bitgrain.pipeline.blockwise.loaded import LoadedModel
from bitgrain.pipeline.blockwise.work import OUTSIDE, Work, block_file
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.solvers.base import make_with_settings
from bitgrain.training.distillation import kl_divergence
from bitgrain.tuning.end_to_end import EndToEndSettings, tune_end_to_end

WINDOWS = 4
"""Calibration windows in one gradient step."""
_CODES_BELOW = 2.75
"""Average bits below which codes are learned."""


def settings_of(plan: Plan, rewritten: Collection[str] = ()) -> EndToEndSettings:
    """The recipe's settings; rates of scales and gains are in units of each grid's step already (`EndToEndSettings`).

    Codes are learned too where there are less than three bits: only there it was worth its time. They need the weights
    that were rounded, which are gone where transforms had `rewritten` them.
    Raises SchemeError for a setting that does not exist.
    """
    elements = sum(layer.elements for layer in plan.quantized.values())
    total = sum(layer.elements * layer.scheme.weight.format.bits for layer in plan.quantized.values())
    step = 2.0 ** -(total / max(1, elements))
    rates: dict[str, float] = {}
    if total < _CODES_BELOW * elements and not rewritten:
        rates["code_rate"] = 0.004 * step
    given = {**rates, **(plan.recipe.tuning.end_to_end or {})}
    return make_with_settings(EndToEndSettings, given, "tuning.end_to_end")


def tune_whole(
    plan: Plan, work: Work, stream: StreamedModel, full: Sequence[Tensor], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as they will be written, of what the tuning changed, and its record for the manifest.

    full  the full-precision hidden states behind the last block, batch by batch
    Raises ModelError for a model without logits over a vocabulary.
    """
    assert plan.calibration is not None
    files = [OUTSIDE, *(block_file(i) for i in range(len(stream.anatomy.block_names)))]
    rewritten = {name for file in files for name in work.record(file).get("rewritten", [])}
    settings = settings_of(plan, rewritten)
    ids = plan.calibration.ids.split(WINDOWS)
    reference = _Reference(stream, list(ids), torch.cat(list(full)).split(WINDOWS))
    model = LoadedModel(plan, work, stream)

    def loss(dense: Mapping[str, Tensor], gains: Mapping[str, Tensor], index: int) -> Tensor:
        return reference.divergence(model.logits(dense, gains, ids[index]), index)

    progress.start(settings.steps, "steps", f"tune {plan.source.name}")
    try:
        with single_threaded():
            found = tune_end_to_end(
                model.start,
                model.gains,
                loss,
                len(ids),
                settings,
                weights=model.originals() if settings.code_rate else None,
                progress=lambda _, kl: progress.advance(1, f"KL {kl:.5f}"),
            )
    finally:
        progress.finish()
    record = {"kl_before": found.first_loss, "kl_after": found.best_loss, "steps": found.steps}
    return model.encode(found.qtensors, found.extras), record


class _Reference:
    """The full-precision model's predictions, from its last hidden states."""

    def __init__(self, stream: StreamedModel, ids: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        self._stream, self._ids, self._hidden = stream, ids, hidden

    def divergence(self, logits: Tensor, index: int) -> Tensor:
        """KL(full || quantized), mean over the tokens of a batch."""
        with torch.no_grad(), _inputs_as_they_are(self._stream.model):
            output = self._stream.tail(self._ids[index], self._hidden[index])
            if getattr(output, "logits", None) is None:
                raise ModelError(f"{self._stream.anatomy.architecture} predicts no tokens; leave tuning.end_to_end out")
            base: Tensor = output.logits.float()
        return kl_divergence(logits, base)


@contextmanager
def _inputs_as_they_are(model: nn.Module) -> Generator[None]:
    """Without the input quantizers: these belong to the quantized model, also where they stand before the head."""
    quantizers = [module for module in model.modules() if isinstance(module, InputQuantizer)]
    for quantizer in quantizers:
        quantizer.forward = lambda x: x  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward
