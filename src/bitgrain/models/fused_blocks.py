"""Which decoder layers can run as few native calls: found by watching a model run, and proved on what was seen.

No table of models. A few tokens go through the model; what each norm, each linear layer and attention were given
and gave says how they are joined (which norm feeds which products, what was added to what), and each step is computed
again by the native kernels and compared. Names say nothing here. Whatever does not agree stays module by module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from bitgrain.errors import KernelError
from bitgrain.kernels.decoder_caches import DenseCache
from bitgrain.kernels.native import is_available
from bitgrain.kernels.rows import ACTS, ROTARY, Rotary, RowNorm, gated, rotate_
from bitgrain.models.block_trace import BlockTrace, Call, linears_in_float32, watch_blocks
from bitgrain.models.fused_steps import fuse_model
from bitgrain.models.trace import norm_paths
from bitgrain.runtime.block_plan import AttentionPlan, BlockPlan, MlpPlan, NormPlan
from bitgrain.runtime.fused_block import (
    build,
    fuse,
    native_weight,
    packed_weight,
    row_norm,
)

CLOSE = 1e-4
"""How far a step may be off, as a fraction of its largest value: float32 sums in another order."""
SAME = 0.03
"""The same of a whole block, whose inputs are rounded on the way: a step of float32 may move one to the next code."""


def fuse_blocks(model: nn.Module) -> list[str]:
    """`fuse` every decoder layer of a transformers model that can be; returns their paths.

    Runs the model on a few tokens, in float32. A model that cannot be run like that, or that has no packed layers, or a
    machine without the native kernels, is left as it is.
    """
    if not is_available() or not isinstance(model, PreTrainedModel) or not model.can_generate() or model.training:
        return []
    if all(packed_weight(one) is None for one in model.modules()):
        return []
    seen = watch_blocks(model)
    fused: list[str] = []
    for path, trace in seen.items():
        block = model.get_submodule(path)
        plan = plan_of(block, trace)
        if plan is not None and _proved(block, plan, trace):
            fuse(block, plan)
            fused.append(path)
    if fused and fused == list(seen):
        fuse_model(model, [model.get_submodule(path) for path in fused])
    return fused


def plan_of(block: nn.Module, trace: BlockTrace) -> BlockPlan | None:
    """What the block is made of, each step proved on the trace; None for another structure."""
    linears = [one for one in trace.calls if native_weight(block.get_submodule(one.path)) is not None]
    norms = [one for one in trace.calls if one.path in norm_paths(block)]
    if len(trace.attention) != 1 or len({one.path for one in linears}) != len(linears):
        return None
    for before in norms:
        if before.x.shape == trace.x.shape and before.x.equal(trace.x) and (norm := _norm(block, before)) is not None:
            readers = [one for one in linears if _is(one.x, before.y)]
            attention = _attention(block, trace, norm, readers, norms)
            if attention is None:
                return None
            o = next((one for one in linears if one.path == attention.o), None)
            assert o is not None
            cache = next((name for name, value in trace.arguments.items() if isinstance(value, Cache)), None)
            behind = _behind(block, trace, trace.x + o.y, linears, norms)
            if behind is None or cache is None:
                return None
            plan = BlockPlan(attention, *behind, frozenset(trace.arguments), cache)
            packed = [path for path in plan.linears() if packed_weight(block.get_submodule(path)) is not None]
            return plan if packed else None  # a layer without is not ours to change
    return None


def _attention(
    block: nn.Module, trace: BlockTrace, norm: NormPlan, readers: Sequence[Call], norms: Sequence[Call]
) -> AttentionPlan | None:
    call = trace.attention[0]
    heads, kv_heads, size = call.q.shape[1], call.k.shape[1], call.q.shape[3]
    if call.v.shape != call.k.shape or call.k.shape[3] != size or heads % kv_heads:
        return None
    tokens = trace.x.shape[1]
    new = [one.transpose(1, 2)[:, -tokens:].flatten(2) for one in (call.q, call.k, call.v)]
    o = [
        one for one in trace.calls
        if native_weight(block.get_submodule(one.path)) is not None and _close(one.x, call.y.flatten(2))
    ]  # fmt: skip
    if len(o) != 1 or o[0].y.shape != trace.x.shape:
        return None
    cos, sin = trace.arguments.get("position_embeddings") or (None, None)
    for parts in _thirds(readers, [one.shape[-1] for one in new]):
        if not _close(parts[2], new[2]):
            continue
        for q_norm, k_norm in _head_norms(block, parts, norms, size):
            for rotary in ROTARY:
                if (cos is None) != (rotary == "none"):
                    continue
                if all(
                    _close(_rotated(part, size, cos, sin, rotary, one and row_norm(block, one)), given)
                    for part, given, one in zip(parts[:2], new[:2], (q_norm, k_norm), strict=True)
                ):
                    scale = call.extras.get("scaling") or size**-0.5
                    others = {name: value for name, value in call.extras.items() if name != "scaling"}
                    layer = getattr(call.module, "layer_idx", None)
                    if not isinstance(layer, int):
                        return None
                    return AttentionPlan(
                        norm=norm, qkv=tuple(one.path for one in readers_of(parts, readers)), o=o[0].path,
                        heads=heads, kv_heads=kv_heads, head_dim=size, rotary=rotary, scale=scale,
                        q_norm=q_norm, k_norm=k_norm, module=_path_of(block, call.module), extras=others,
                        plain=getattr(call.module, "is_causal", True)
                        and all(value is None or name == "sliding_window" for name, value in others.items()),
                        layer=layer,
                    )  # fmt: skip
    return None


def readers_of(parts: Sequence[Tensor], readers: Sequence[Call]) -> list[Call]:
    """The calls whose outputs `parts` are, in the order of q, k and v; the one that they are split from."""
    return list(readers) if len(readers) == 1 else [next(one for one in readers if one.y is part) for part in parts]


def _thirds(readers: Sequence[Call], widths: Sequence[int]) -> Iterator[list[Tensor]]:
    """Outputs that may be q, k and v."""
    if len(readers) == 1 and readers[0].y.shape[-1] == sum(widths):
        yield list(readers[0].y.split(list(widths), -1))
    if len(readers) == 3:
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            found = [readers[i].y for i in order]
            if [one.shape[-1] for one in found] == list(widths):
                yield found


def _head_norms(
    block: nn.Module, parts: Sequence[Tensor], norms: Sequence[Call], size: int
) -> Iterator[tuple[NormPlan | None, NormPlan | None]]:
    """Norms of each head of q and of k, if they were called."""
    found: list[NormPlan | None] = []
    for part in parts[:2]:
        calls = [one for one in norms if one.x.shape[-1] == size and one.x.numel() == part.numel()]
        call = next((one for one in calls if _close(one.x.reshape(part.shape), part)), None)
        found.append(call and _norm(block, call))
        if call is not None and found[-1] is None:
            return
    yield found[0], found[1]


def _behind(
    block: nn.Module, trace: BlockTrace, h: Tensor, linears: Sequence[Call], norms: Sequence[Call]
) -> tuple[MlpPlan | None, tuple[str, str]] | None:
    """What stands behind attention: y = h + mlp(norm(h))."""
    for before in norms:
        if before.x.shape != h.shape or not _close(before.x, h):
            continue
        rest = [
            (before.path, one.path) for one in trace.calls
            if "." not in one.path and one.x.shape == h.shape and _is(one.x, before.y) and _close(h + one.y, trace.y)
        ]  # fmt: skip
        norm = _norm(block, before)
        mlp = norm and _mlp(block, trace, h, norm, before.y, linears)
        if mlp is not None:
            return mlp, ("", "")
        if rest:
            return None, rest[0]
    return None


def _mlp(
    block: nn.Module, trace: BlockTrace, h: Tensor, norm: NormPlan, x: Tensor, linears: Sequence[Call]
) -> MlpPlan | None:
    downs = [one for one in linears if one.y.shape == h.shape and _close(h + one.y, trace.y)]
    readers = [one for one in linears if _is(one.x, x)]
    for down in downs:
        width = down.x.shape[-1]
        pairs: list[tuple[Sequence[Call], Tensor, Tensor | None, bool]] = []
        if len(readers) == 2:
            pairs = [((a, b), a.y, b.y, False) for a, b in (readers, readers[::-1])]
        elif len(readers) == 1 and readers[0].y.shape[-1] == width:
            pairs = [(readers, readers[0].y, None, False)]
        elif len(readers) == 1 and readers[0].y.shape[-1] == 2 * width:
            gate, up = readers[0].y.split(width, -1)
            pairs = [(readers, gate, up, True)]
        for found, gate, up, joined in pairs:
            if gate.shape != down.x.shape or (up is not None and up.shape != gate.shape):
                continue
            for act in ACTS:
                if _close(gated(gate, up, act), down.x):
                    return MlpPlan(norm, tuple(one.path for one in found), down.path, act, joined)
    return None


def _norm(block: nn.Module, call: Call) -> NormPlan | None:
    """The native norm that gives what this one gave: RMSNorm or LayerNorm, its gain as it is or 1 + gain."""
    module = block.get_submodule(call.path)
    names = [name for name, _ in module.named_parameters()]
    width = call.x.shape[-1]
    if not names or len(names) > 2 or any(module.get_parameter(name).shape != (width,) for name in names):
        return None
    eps = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
    weight, bias = next((n for n in names if "bias" not in n), ""), next((n for n in names if "bias" in n), "")
    for one in sorted(eps):
        for centered in (False, True):
            for offset in (0.0, 1.0):
                plan = NormPlan(call.path, weight, bias, one, centered, offset)
                if _close(row_norm(block, plan)(call.x.contiguous()), call.y):
                    return plan
    return None


def _rotated(
    part: Tensor, size: int, cos: Tensor | None, sin: Tensor | None, rotary: Rotary, norm: RowNorm | None
) -> Tensor | None:
    heads = part.reshape(-1, part.shape[-1] // size, size).contiguous().clone()
    if cos is None or sin is None:
        return (heads if norm is None else norm(heads)).view(part.shape)
    try:
        rotate_(heads, cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]), rotary, norm)
    except KernelError:
        return None
    return heads.view(part.shape)


@torch.no_grad()
def _proved(block: nn.Module, plan: BlockPlan, trace: BlockTrace) -> bool:
    """Whether the native block gives what the block gave: by parts, and in one call with one new token."""
    native = build(block, plan)
    if native is None:
        return False
    call = trace.attention[0]
    cos, sin = trace.arguments.get("position_embeddings") or (None, None)
    x = trace.x.contiguous()
    y = native.finish(x, call.y.flatten(2).contiguous())
    if plan.mlp is None:
        norm, mlp = plan.rest
        with linears_in_float32(block):
            after = block.get_submodule(mlp)(block.get_submodule(norm)(y))
        y = y + (after[0] if isinstance(after, tuple) else after)
    if not _close(y, trace.y, SAME):
        return False
    if plan.mlp is not None and plan.attention.plain:
        keys, values = (one.clone(memory_format=torch.contiguous_format) for one in (call.k, call.v))
        keys[:, :, -x.shape[1] :] = values[:, :, -x.shape[1] :] = torch.nan
        whole = native.run(x, cos, sin, DenseCache(keys, values))
        return whole is not None and _close(whole, trace.y, SAME)
    return True


def _close(a: Tensor | None, b: Tensor, tolerance: float = CLOSE) -> bool:
    if a is None or a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.equal(b))


def _path_of(block: nn.Module, module: nn.Module) -> str:
    return next(path for path, one in block.named_modules() if one is module)
