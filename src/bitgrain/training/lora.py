"""LoRA on a frozen low-bit base, with peft: QLoRA where the base is NF4.

y = x W^T + (alpha / r) x A^T B^T with W packed and frozen, A [r, in] and B [out, r] trained (LoRA, arXiv 2106.09685,
equation 3; QLoRA, arXiv 2305.14314, equation 5). peft keeps, saves and loads the adapters; all of its settings work.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import BitgrainError, CheckpointError, SchemeError
from bitgrain.runtime.low_bit_linear import LowBitLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ALL_LINEAR = "all-linear"


def require_peft() -> None:
    """BitgrainError that says how to install peft, unless it is there."""
    try:
        import peft
    except ImportError as error:
        raise BitgrainError("LoRA needs the package peft: pip install 'bitgrain[peft]'") from error
    del peft


def lora_config(
    rank: int = 16, alpha: float = 32.0, targets: str | Sequence[str] = ALL_LINEAR, **settings: Any
) -> LoraConfig:
    """peft's LoraConfig, which knows layers with packed weights: `peft.get_peft_model(model, lora_config())`.

    rank, alpha  the adapters' inner width r, and the factor alpha / r of what they add
    targets      names of layers as peft's target_modules: a list of last parts of paths, or a regular expression;
                 "all-linear": every linear layer but the head
    settings     whatever else LoraConfig has
    Raises BitgrainError without peft, SchemeError for a rank below 1.
    """
    require_peft()
    from peft import LoraConfig

    if rank < 1:
        raise SchemeError(f"an adapter has a rank of at least 1, not {rank}")
    chosen = targets if isinstance(targets, str) else list(targets)
    scale: Any = int(alpha) if alpha == int(alpha) else alpha  # as peft writes it; any number will do
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=chosen, **settings)
    return _knowing_low_bit(config)


def attach_lora(model: nn.Module, config: LoraConfig | None = None) -> PeftModel:
    """`model` with new adapters on its linear layers, which alone can be trained. `config` None: `lora_config()`.

    Raises SchemeError where no layer, or a layer of another kind, goes by the names in `config`.
    """
    require_peft()
    from peft import get_peft_model

    config = lora_config() if config is None else _knowing_low_bit(config)
    try:
        with _quiet():
            return cast("PeftModel", get_peft_model(cast(Any, model), config))
    except ValueError as error:
        known = ", ".join(sorted(linear_names(model)))
        raise SchemeError(f"no adapter fits: {error} Linear layers here: {known}") from error


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the adapter that peft or `bitgrain finetune` saved in `folder`. Raises CheckpointError."""
    require_peft()
    from peft import LoraConfig, PeftConfig, PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds no adapter: it has no adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, LoraConfig):
            _knowing_low_bit(config)
        with _quiet():
            return PeftModel.from_pretrained(cast(Any, model), str(folder), config=config, is_trainable=trainable)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        raise CheckpointError(f"the adapter in {folder} does not fit this model: {error}") from error


def merge_lora(model: PeftModel) -> nn.Module:
    """The base model with its adapters added to its weights, dense: save_pretrained and quantize work on it.

    Layers without an adapter become dense too. Quantizers of inputs are left out, rotations of inputs are folded in.
    """
    merged = cast(nn.Module, cast(Any, model).merge_and_unload())
    for path, part in list(merged.named_modules()):
        if isinstance(part, LowBitLinear):
            owner, _, leaf = path.rpartition(".")
            setattr(merged.get_submodule(owner), leaf, part.to_dense())
    return merged


def linear_names(model: nn.Module) -> set[str]:
    """The last parts of the paths of all linear layers."""
    return {
        path.rpartition(".")[2]
        for path, part in model.named_modules()
        if path and isinstance(part, (nn.Linear, Conv1D))
    }


def _knowing_low_bit(config: LoraConfig) -> LoraConfig:
    from bitgrain.training.lora_layer import LowBitLora

    # peft's own way for layer classes that it does not know; they come before its own for nn.Linear
    config._register_custom_module({LowBitLinear: LowBitLora})  # pyright: ignore[reportPrivateUsage]
    return config


@contextmanager
def _quiet() -> Generator[None]:
    """peft 0.21 asks models for an attribute that transformers 5.24 calls deprecated: nothing a user could mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
