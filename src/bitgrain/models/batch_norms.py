"""Batch norms folded into the layer before them: found by running the module, and proved by running it again.

In eval mode a batch norm is y -> gamma (y - mean) / sqrt(var + eps) + beta for each channel, which the rows of the
layer before it can do by themselves (Jacob et al., arXiv 1712.05877, section 3.2, equation 14):

    w' = gamma w / sqrt(var + eps)        b' = beta + gamma (b - mean) / sqrt(var + eps)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitgrain.errors import ModelError
from bitgrain.models.calls import call, device_of, moved
from bitgrain.runtime.convolutions import CONVOLUTIONS, geometry_of

TOLERANCE = 1e-4
"""Of the module's outputs, relative to the largest: what rounding in another place may change. 16 bits: 100 x that."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Folded:
    """What `fold_batch_norms_` did.

    folded  batch norm -> the layer that it went into, by module names
    kept    batch norm -> why it stays
    error   largest change of the module's outputs on the batch, relative to the largest output
    """

    folded: Mapping[str, str]
    kept: Mapping[str, str]
    error: float


@torch.no_grad()
def fold_batch_norms_(module: nn.Module, batch: Any) -> Folded:
    """Fold every batch norm into the convolution or linear layer whose output it alone reads, in place.

    batch  what the module is called with once: a tensor, a tuple of arguments, or a dict of keywords
    Which layer stands before a norm is seen while the module runs on the batch; that the outputs stay the same is
    proved by running it again. Folded norms become nn.Identity. Raises ModelError in training mode (norms then use the
    batch's own statistics), or if the outputs change, with the module as it was.
    """
    if any(part.training for part in module.modules()):
        raise ModelError("batch norms can be folded in eval mode only, in training they follow each batch: call eval()")
    batch = moved(batch, device_of(module))
    seen = _Seen(module)
    before = seen.run(batch)
    pairs, kept = seen.pairs()
    undo = [_fold(module, norm, layer) for norm, layer in pairs.items()]
    after = _tensors(call(module, batch))
    error = _change(before, after)
    half = any(one.dtype in (torch.float16, torch.bfloat16) for one in before)
    if not error <= TOLERANCE * (100 if half else 1):
        for one in reversed(undo):
            one()
        raise ModelError(
            f"folding {len(pairs)} batch norms changes the module's outputs by {error:.1e} of the largest: something "
            "else reads these layers; the module is left as it was"
        )
    return Folded(pairs, kept, error)


@dataclass
class _Output:
    """Of a layer that may take a norm: who reads it."""

    layer: str
    tensor: Tensor  # held, so that no other tensor gets its identity
    readers: list[str] = field(default_factory=list)


class _Seen(TorchFunctionMode):
    """Watches one run of a module: which norm reads whose output, and whether anything else does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names = {id(part): name for name, part in module.named_modules()}
        self.norms = {name: part for name, part in module.named_modules() if type(part) in _NORMS}
        self.owners = Counter(id(one) for one in _parameters(module))
        self.outputs: dict[int, _Output] = {}
        self.reads: dict[str, _Output | None] = {}  # norm -> what it read, None if that is no layer's output
        self.calls = Counter[str]()
        self.inside = 0

    def run(self, batch: Any) -> list[Tensor]:
        """The outputs."""
        hooks = [part.register_forward_pre_hook(self._enter) for part in self.norms.values()]
        hooks += [part.register_forward_hook(self._leave) for part in self.norms.values()]
        layers = [part for part in self.module.modules() if isinstance(part, (nn.Linear, *CONVOLUTIONS))]
        hooks += [part.register_forward_hook(self._produced) for part in layers]
        try:
            with self:
                result = call(self.module, batch)
        finally:
            for hook in hooks:
                hook.remove()
        found = _tensors(result)
        for one in found:
            if id(one) in self.outputs:
                self.outputs[id(one)].readers.append("the module's caller")
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside and _tensors(result):  # reading a shape is no use of the numbers
            for one in _tensors((args, kwargs)):
                if id(one) in self.outputs:
                    self.outputs[id(one)].readers.append(getattr(func, "__name__", "a function"))
        return result

    def _enter(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names[id(norm)]
        self.calls[name] += 1
        self.inside += 1
        output = self.reads[name] = self.outputs.get(id(args[0]))
        if output is not None:
            output.readers.append(name)

    def _leave(self, norm: nn.Module, args: Any, result: Any) -> None:
        self.inside -= 1

    def _produced(self, layer: nn.Module, args: Any, result: Tensor) -> None:
        name = self.names[id(layer)]
        self.calls[name] += 1
        self.outputs[id(result)] = _Output(name, result)

    def pairs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Norm -> its layer, and norm -> why it stays."""
        found: dict[str, str] = {}
        kept: dict[str, str] = {}
        for name, norm in self.norms.items():
            output = self.reads.get(name)
            reason = self._reason(name, norm, output)
            if reason is not None:
                kept[name] = reason
            elif output is not None:
                found[name] = output.layer
        return found, kept

    def _reason(self, name: str, norm: Any, output: _Output | None) -> str | None:
        if self.calls[name] != 1:
            return f"it runs {self.calls[name]} times"
        if norm.running_mean is None:
            return "it keeps no running statistics: it follows each batch"
        if output is None:
            return "it does not read the output of a convolution or a linear layer"
        layer = self.module.get_submodule(output.layer)
        if self.calls[output.layer] != 1:
            return f"{output.layer} runs {self.calls[output.layer]} times"
        if any(self.owners[id(one)] > 1 for one in layer.parameters(recurse=False)):
            return f"{output.layer} shares its weight"
        if output.readers != [name]:
            others = sorted(set(output.readers) - {name}) or [name]
            return f"the output of {output.layer} is also read by {', '.join(others)}"
        if isinstance(layer, nn.Linear) and output.tensor.ndim != 2:
            return f"the channels of {output.layer} are not those of the norm"
        return None


def _fold(module: nn.Module, norm_name: str, layer_name: str) -> Callable[[], None]:
    """Put one norm into its layer; returns what undoes it."""
    norm: Any = module.get_submodule(norm_name)
    part = module.get_submodule(layer_name)
    layer: Any = part
    weight = layer.weight.detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = ((0.0 if bias is None else bias.double()) - norm.running_mean.double()) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if isinstance(part, nn.Linear):
        folded = weight.double() * factor.unsqueeze(1)
    else:
        geometry = geometry_of(part)
        folded = geometry.weight(geometry.matrix(weight.double()) * factor.unsqueeze(1))
    layer.weight.data.copy_(folded)
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.get_parameter("bias").data.copy_(shift)
    parent, _, leaf = norm_name.rpartition(".")
    owner = module.get_submodule(parent)
    setattr(owner, leaf, nn.Identity())

    def undo() -> None:
        setattr(owner, leaf, norm)
        layer.weight.data.copy_(weight)
        if bias is None:
            layer.bias = None
        else:
            layer.bias.data.copy_(bias)

    return undo


def _parameters(module: nn.Module) -> Iterable[nn.Parameter]:
    """Each as often as a distinct module owns it."""
    for part in module.modules():
        yield from part.parameters(recurse=False)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors inside nested tuples, lists and mappings (transformers' outputs are such)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [one for part in cast(Mapping[Any, Any], value).values() for one in _tensors(part)]
    if isinstance(value, (tuple, list)):
        return [one for part in cast(list[Any], value) for one in _tensors(part)]
    return []


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference of any output, relative to its largest element; infinite for NaN."""
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point() and old.numel():
            scale = float(old.abs().max()) or 1.0
            change = float((new.double() - old.double()).abs().max()) / scale
            worst = max(worst, change) if change == change else float("inf")
    return worst
