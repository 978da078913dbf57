"""transformers' Trainer whose loss is the distance from a teacher: for modules that `qat.prepare` prepared."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from bitgrain.training.distillation import kl_divergence, logits_of
from bitgrain.training.last_good import LastGood


class DistillationTrainer(Trainer):
    """A `Trainer` that minimizes KL(teacher || model) over the tokens. `labels` only say which of them count.

    teacher    the full-precision model; it is put in evaluation mode and on the device of the model
    keep_every how often the parameters are kept, to which a loss that is not finite goes back
    Everything else is as for `Trainer`. Raises TrainingError where the loss is not finite (see `LastGood`).
    """

    def __init__(self, *args: Any, teacher: nn.Module, keep_every: int = 10, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.teacher = teacher.eval().requires_grad_(False)
        self._good = LastGood(cast(nn.Module, self.model), keep_every)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The distillation loss of a batch, mean over its tokens."""
        labels = inputs.pop("labels", None)
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        self.teacher.to(first.device)
        with torch.no_grad():
            expected = logits_of(self.teacher, self.teacher(**inputs))
        outputs = model(**inputs)
        found = logits_of(model, outputs)
        mask = inputs.get("attention_mask") if labels is None else labels != -100
        if mask is not None and mask.shape == found.shape[:-1]:
            found, expected = found[mask.bool()], expected[mask.bool()]
        loss = kl_divergence(found, expected)
        if model.training:
            self._good.check(loss.detach())
        return (loss, outputs) if return_outputs else loss
