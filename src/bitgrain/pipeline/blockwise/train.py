"""Quantization-aware training of the whole model, from the state that the solver (and tuning) left.

The teacher is the original model, whose weights are in memory beside those that are trained. What training needs to go
on lies in the work folder, and so does the best state so far, as it will be written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import TrainingError
from bitgrain.models.skeleton import build_skeleton
from bitgrain.models.stream import StreamedModel
from bitgrain.numerics import QTensor
from bitgrain.pipeline.blockwise.batches import single_threaded
from bitgrain.pipeline.blockwise.loaded import LoadedModel
from bitgrain.pipeline.blockwise.work import TRAINED, TRAINING, Work
from bitgrain.pipeline.cost import HOLD_BYTES
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress
from bitgrain.training.descent import Outcome, Training, held_back
from bitgrain.training.distillation import cross_entropy, kl_divergence

_SAVE_EVERY_S = 30.0
"""Seconds between two states that are kept, and at least so many times as long as keeping one takes:"""
_SAVE_SHARE = 20.0
_TOLD = ("first_loss", "best_loss", "best_step", "stopped")


def train_whole(plan: Plan, work: Work, stream: StreamedModel, progress: Progress) -> dict[str, Any]:
    """Train; `TRAINED` in `work` then holds the tensors that changed, as they will be written. Its record.

    Raises TrainingError if the loss is not finite (the best state so far is kept, and the next call ends with it),
    ModelError for a model without logits over a vocabulary.
    """
    settings, text = plan.recipe.tuning.training_settings(), plan.training
    assert settings is not None
    assert text is not None
    model = LoadedModel(plan, work, stream)
    keeper = _Keeper(work, model)
    if "stopped" not in keeper.record:
        teacher = _Teacher(plan, stream.device, text.ids, settings.autocast) if settings.loss == "distill" else None

        def loss(dense: Mapping[str, Tensor], gains: Mapping[str, Tensor], windows: Sequence[int]) -> Tensor:
            ids = text.ids[list(windows)].to(stream.device)
            with torch.autocast(stream.device.type, torch.bfloat16, enabled=settings.autocast):
                logits = model.logits(dense, gains, ids)
            return cross_entropy(logits, ids) if teacher is None else kl_divergence(logits, teacher.logits(windows))

        progress.start(settings.steps, "steps", f"train {plan.source.name}", done=keeper.record.get("step", 0))
        try:
            with single_threaded(), torch.enable_grad():
                training = Training(model.start, model.originals(), model.gains, loss, len(text.ids), settings)
                _run(training, keeper, progress)
        finally:
            progress.finish()
    told = {key: keeper.record[key] for key in _TOLD if key in keeper.record}
    return {**told, "held_back": len(held_back(len(text.ids), settings)), "text": text.description}


def _run(training: Training, keeper: _Keeper, progress: Progress) -> None:
    try:
        training.run(keeper, lambda _, value: progress.advance(1, f"loss {value:.5f}"))
    except TrainingError as error:
        assert training.outcome is not None
        keeper.stop(training.outcome, str(error))
        best = training.outcome
        raise TrainingError(
            f"{error}. The best state so far (step {best.best_step}, loss {best.best_loss:.5f}; at the start "
            f"{best.first_loss:.5f}) is kept, and the same command ends with it; --restart with lower rates starts over"
        ) from error


class _Keeper:
    """In the work folder; see `training.descent.Keeper`. record: what was saved last."""

    def __init__(self, work: Work, model: LoadedModel) -> None:
        self._work, self._model = work, model
        self.record: dict[str, Any] = work.record(TRAINING) if work.has(TRAINING) else {}
        self._next = time.monotonic() + _SAVE_EVERY_S

    def best(self, qtensors: Mapping[str, QTensor], extras: Mapping[str, Tensor]) -> None:
        self._work.save(TRAINED, self._model.encode(qtensors, extras))

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], last: bool) -> None:
        began = time.monotonic()
        if not last and began < self._next:
            return
        self._work.save(TRAINING, tensors, record)
        self.record = dict(record)
        now = time.monotonic()
        self._next = now + max(_SAVE_EVERY_S, _SAVE_SHARE * (now - began))

    def load(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        return (self._work.tensors(TRAINING), self.record) if self.record else None

    def stop(self, outcome: Outcome, reason: str) -> None:
        """No run gets further than this."""
        self.record = {**vars(outcome), "stopped": reason}
        self._work.save(TRAINING, {}, self.record)


class _Teacher:
    """The original model's predictions. What leaves its last block is remembered, as far as memory is set aside."""

    def __init__(self, plan: Plan, device: torch.device, ids: Tensor, autocast: bool) -> None:
        skeleton = build_skeleton(plan.config, plan.trust_remote_code)
        self._stream = StreamedModel(skeleton, plan.anatomy, plan.checkpoint.read, device=device)
        self._stream.capture(ids[:1])  # which tries blocks, and lets go of them
        for index in range(len(plan.anatomy.block_names)):
            self._stream.load_block(index)
        self._ids, self._autocast = ids, autocast
        self._hidden: dict[int, Tensor] = {}

    @torch.no_grad()
    def logits(self, windows: Sequence[int]) -> Tensor:
        """Of windows by their numbers; each runs by itself, so that no bit depends on the others."""
        found = [self._stream.tail(self._ids[[i]], self._behind(i)).logits for i in windows]
        return torch.cat(found)

    def _behind(self, window: int) -> Tensor:
        hidden = self._hidden.get(window)
        if hidden is None:
            captured = self._stream.capture(self._ids[[window]])
            hidden = captured.hidden
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self._autocast):
                for index in sorted(self._stream.reached):
                    hidden = self._stream.run(index, hidden, captured.calls[index])
            if hidden.nbytes * (len(self._hidden) + 1) <= HOLD_BYTES:
                self._hidden[window] = hidden
        return hidden
