"""A running model out of dense tensors that carry the names on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from bitgrain.errors import ModelError


class Weightless(torch.Tensor):
    """Zeros that take no memory, also once transformers has cast, stacked and joined them: what holds the place of a
    tensor in `load_dense_into` that is to be replaced."""

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype) -> Weightless:
        """One of this shape and dtype."""
        return torch.zeros(1, dtype=dtype).expand(*shape).as_subclass(Weightless)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _JOINS:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                made = func(*tree_map_only(torch.Tensor, lambda one: one.to("meta"), args), **(kwargs or {}))
            return Weightless.of(made.shape, made.dtype)
        if func in _CASTS:
            given = (*args[1:], *(kwargs or {}).values(), _CASTS[func])
            dtype = next((one for one in given if isinstance(one, torch.dtype)), args[0].dtype)
            return args[0] if dtype == args[0].dtype else Weightless.of(args[0].shape, dtype)
        return super().__torch_function__(func, types, args, kwargs or {})  # views take no memory by themselves


_JOINS = {torch.stack, torch.cat, torch.concat}
_CASTS = {
    torch.Tensor.to: None,
    torch.Tensor.clone: None,
    torch.Tensor.contiguous: None,
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def load_dense_into(
    skeleton: nn.Module,
    config: PretrainedConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model of which `skeleton` is the shape, with the weights `tensors`, in eval mode on `device`.

    `tensors`: (name on disk, dense tensor), as the original checkpoint holds them, without
    `Anatomy.unexpected`. transformers itself does the loading: it renames, stacks experts, ties weights and
    fills the buffers that no checkpoint holds. `dtype` None: the dtype in `config`. Where no dtype changes, the
    model on the CPU may share the memory of `tensors`. `skeleton` itself stays on the meta device.

    Raises ModelError when parameters get no tensor, tensors fit no parameter, or shapes differ.
    """
    model_class = type(cast(PreTrainedModel, skeleton))
    try:
        with quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                None,
                config=copy.deepcopy(config),  # its name_or_path is overwritten
                state_dict={name: _aligned(tensor) for name, tensor in tensors},
                dtype=dtype or config.dtype or "auto",
                ignore_mismatched_sizes=True,  # reported below
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit {model_class.__name__}: {error}") from error
    model, report = loaded
    _check(model_class.__name__, report)
    model.config.name_or_path = config.name_or_path
    return model.to(torch.device(device)).eval()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where vector loads like them. Tensors read from files start anywhere, and the CPU's matrix
    products then round differently: the same weights would give other bits, depending on how they were read."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _check(name: str, report: dict[str, Any]) -> None:
    faults = {
        "parameters without a tensor": report["missing_keys"],
        "tensors that it does not know": report["unexpected_keys"],
        "tensors of another shape": [mismatch[0] for mismatch in report["mismatched_keys"]],
    }
    told = [f"{len(names)} {what} ({_few(names)})" for what, names in faults.items() if names]
    if told:
        raise ModelError(f"the weights do not fit {name}: " + "; ".join(told))


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Without transformers' bars and its report of faults, which we raise ourselves."""
    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
