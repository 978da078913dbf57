"""What a calibrated job will take: memory and arithmetic, from sizes alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bitgrain.pipeline.experts import experts_of

if TYPE_CHECKING:
    from bitgrain.pipeline.plan import Plan

HOLD_BYTES = 1_500_000_000
"""Activations that the batches may hold while all of them stand in front of a stage; if more, the block is rerun."""
STREAMS = 8
"""Tensors of the hidden size that one stopped run holds beside the widest input."""
_SOLVER_COPIES = 12
"""Float32 copies of a matrix, and of its Hessian in float64, that a solver works with."""
_GRADIENT_COPIES = 5
"""Float32 copies of the whole model's weights while it is tuned: themselves, their gradients, temporaries."""
_TEACHER_AND_MODEL, _TRAINED_COPIES = 2, 8
"""The same while it is trained, and of what is trained: latent weights, two moments, gradients, a state being kept."""


def sizes(plan: Plan) -> tuple[int, int, int]:
    """Elements outside the blocks, of the largest block, and of all blocks."""
    count = Counter[int | None]()
    for name, block in plan.anatomy.block_of.items():
        count[block] += plan.anatomy.sizes[name]
    outside = count.pop(None, 0)
    return outside, max(count.values(), default=0), count.total()


def calibrated_peak(plan: Plan) -> int:
    """About how many bytes a calibrated job holds at once, above Python with torch and transformers imported."""
    assert plan.calibration is not None
    recipe = plan.recipe
    outside, largest, everything = sizes(plan)
    tokens = plan.calibration.ids.numel()
    hidden = int(getattr(plan.config.get_text_config(), "hidden_size", 0) or 0)
    flows = _flows(plan)
    widest = max((layer.in_features for layer in plan.quantized.values()), default=0)
    matrix = max((layer.out_features * layer.in_features for layer in plan.quantized.values()), default=0)
    streams = 4 * tokens * hidden * flows * 2
    held = min(HOLD_BYTES, 4 * tokens * (widest + STREAMS * hidden) * flows)
    moments = 4 * max(widest * widest, _expert_inputs(plan)) * (2 if recipe.target else 1) * (plan.workers + 2)
    solving = plan.workers * 4 * (_SOLVER_COPIES * matrix + 4 * widest * widest)
    blocks = 4 * largest * (1 + flows)
    peak = 4 * outside + blocks + streams + held + moments + solving
    if recipe.tuning.end_to_end is not None:
        peak = max(peak, 4 * _GRADIENT_COPIES * (outside + everything) + streams)
    settings = recipe.tuning.training_settings()
    if settings is not None and plan.training is not None:
        trained = sum(layer.elements for layer in plan.quantized.values())
        seen = 4 * settings.at_once * plan.training.ids.shape[1] * _activations(plan)
        remembered = min(HOLD_BYTES, 4 * plan.training.ids.numel() * hidden)
        weights = 4 * (_TEACHER_AND_MODEL * (outside + everything) + _TRAINED_COPIES * trained)
        peak = max(peak, weights + seen + remembered)
    return peak


def _expert_inputs(plan: Plan) -> int:
    """Elements of the Hessians of one layer's experts that are held together: those of their matrices of one kind."""
    quantized = (weight for weight in plan.anatomy.weights if weight.tensor in plan.quantized)
    kinds = Counter[tuple[str, int]]()
    for path, layer in experts_of(quantized).items():
        for keys in layer:
            for in_features in set(keys.values()):
                kinds[path, in_features] += in_features * in_features
    return max(kinds.values(), default=0)


def _activations(plan: Plan) -> int:
    """About how many numbers the model keeps for each token while gradients are computed, logits among them."""
    vocabulary = int(getattr(plan.config.get_text_config(), "vocab_size", 0) or 0)
    widths = sum(layer.in_features + layer.out_features for layer in plan.quantized.values())
    return 3 * widths + 6 * vocabulary


def saved_peak(plan: Plan) -> int:
    """About how many bytes the workers of a job with saved statistics hold beside their units."""
    widest = max((layer.in_features for layer in plan.quantized.values()), default=0)
    matrix = max((layer.out_features * layer.in_features for layer in plan.quantized.values()), default=0)
    return plan.workers * 4 * (_SOLVER_COPIES * matrix + 5 * widest * widest)


def calibrated_flops(plan: Plan) -> float:
    """About how many floating-point operations the passes through the model and the solvers take."""
    assert plan.calibration is not None
    _, _, everything = sizes(plan)
    tokens = plan.calibration.ids.numel()
    passes = 2.0 * everything * tokens * _flows(plan)
    solving = 0.0
    for layer in plan.quantized.values():
        moments = 2.0 * tokens * layer.in_features**2 * (2 if plan.recipe.target else 1)
        solving += moments + layer.experts * 2.0 * layer.out_features * layer.in_features**2
    tuning = plan.recipe.tuning.end_to_end
    steps = 0 if tuning is None else int(tuning.get("steps", 48))
    return passes + solving + steps * 6.0 * 2048 * everything


def calibration_note(plan: Plan) -> str:
    """One line for the plan. It is in the manifest too, so it tells nothing that depends on the number of workers."""
    assert plan.calibration is not None
    told = plan.calibration.description
    return (
        f"calibrated on {told['windows']} windows of {told['seqlen']} tokens of {', '.join(told['sources'])}: about "
        f"{calibrated_flops(plan) / 1e12:.1f} Tflop"
    )


def cost_notes(plan: Plan) -> list[str]:
    """What the plan says of its text: of the calibration, and of the training."""
    notes = [calibration_note(plan)]
    settings = plan.recipe.tuning.training_settings()
    if settings is not None and plan.training is not None:
        count, seqlen = plan.training.ids.shape
        # forward and backward, and one forward of the teacher for each window that is new to it
        tokens = 3 * settings.steps * settings.batch * seqlen + min(count, settings.steps * settings.batch) * seqlen
        _, _, everything = sizes(plan)
        text = ", ".join(plan.training.description["sources"])
        notes.append(
            f"trained for {settings.steps} steps of {settings.batch} windows of {seqlen} tokens, of {count} in {text}: "
            f"about {2.0 * everything * tokens / 1e12:.1f} Tflop"
        )
    return notes


def _flows(plan: Plan) -> int:
    """1 or 2: whether the quantized and the full-precision model are both followed."""
    recipe = plan.recipe
    learns = recipe.tuning.end_to_end is not None or recipe.tuning.blockwise is not None
    both = recipe.target is not None or learns or bool(recipe.transforms)
    return 2 if both and recipe.calibration.activations == "quantized" else 1
