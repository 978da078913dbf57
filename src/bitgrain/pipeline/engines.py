"""Engine rules: which engine loads what, and what it asks of a checkpoint. The one place where such rules live.

vLLM's and SGLang's are read from their documentation and sources; transformers' (5.23 with compressed-tensors 0.20)
were found by loading every scheme. `bitgrain verify` checks a written checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import IntFormat
from bitgrain.numerics.formats import FP4_E2M1, FP8_E4M3


@dataclass(frozen=True)
class Verdict:
    """Whether `engine` loads the result; `reasons` say why not, or (loads) what it does differently."""

    engine: str
    loads: bool
    reasons: tuple[str, ...] = ()


_READERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bnb-nf4", "bnb-fp4", "bnb-int8"), ("transformers", "vLLM")),
    "mlx": ("mlx-lm",),
}
"""Who reads the layouts that have no rules of their own."""

FusedGroup = tuple[str, Sequence[StoredLayer | None]]
"""A set of layers that engines join into one (q/k/v, gate/up) by its name; None for a member that is kept."""


def judge(layers: Sequence[StoredLayer], fused: Sequence[FusedGroup], layout: str) -> list[Verdict]:
    """The verdict of each engine on a checkpoint with these quantized `layers` in `layout`."""
    own = Verdict("bitgrain", True)
    if layout in ("gptq", "gptq-v2", "awq"):
        return [*_packed_along_inputs(layers, fused, layout), own]
    if layout in _READERS:
        reason, readers = (f"it does not read {layout}",), _READERS[layout]
        engines = dict.fromkeys([*readers, "vLLM", "SGLang", "transformers"])
        return [*(Verdict(e, e in readers, () if e in readers else reason) for e in engines), own]
    if layout != "compressed-tensors":
        reason = ("quant_method bitgrain is read by bitgrain.load only",)
        return [*(Verdict(engine, False, reason) for engine in ("vLLM", "SGLang", "transformers")), own]
    serving = tuple(dict.fromkeys([*_mixed(fused), *(reason for layer in layers for reason in _serving(layer))]))
    refused = tuple(dict.fromkeys(_transformers(layers)))
    return [
        Verdict("vLLM", not serving, serving),
        Verdict("SGLang", not serving, serving),
        Verdict("transformers", not refused, refused or tuple(_transformers_remarks(layers))),
        own,
    ]


def _packed_along_inputs(layers: Sequence[StoredLayer], fused: Sequence[FusedGroup], layout: str) -> Iterator[Verdict]:
    """Of GPTQ and AWQ checkpoints: vLLM's and SGLang's kernels (Marlin), and GPTQModel, through which transformers
    loads them."""
    specs = {spec.describe(): spec for spec in (layer.scheme.weight for layer in layers)}.values()
    serving, loading = [*_mixed(fused)], list[str]()
    if layout != "awq":
        serving += [f"no kernel for {spec.format.bits}-bit weights" for spec in specs if spec.format.bits not in (4, 8)]
        serving += ["no kernel for zero points in GPTQ's layout, awq has one" for spec in specs if not spec.symmetric]
    if layout == "gptq" and any(not spec.symmetric for spec in specs):
        loading.append("it takes v1 with zero points from no other program: write gptq-v2")
    known = [spec for spec in specs if spec.granularity.cols not in (None, 32, 64, 128)]
    serving += [f"no kernel for groups of {spec.granularity.cols}" for spec in known]
    small = [layer for layer in layers if layer.out_features % 64 or layer.in_features % 128]
    serving += [f"kernels need outputs % 64 = 0 and inputs % 128 = 0, {x.module} is {x.shape}" for x in small[:1]]
    reasons = tuple(dict.fromkeys(serving))
    yield from (Verdict(engine, not reasons, reasons) for engine in ("vLLM", "SGLang"))
    yield Verdict("GPTQModel", not loading, tuple(loading))
    yield Verdict("transformers", True, ("through GPTQModel",))


def _mixed(fused: Sequence[FusedGroup]) -> Iterator[str]:
    for name, members in fused:
        if len({"kept" if member is None else repr(member.scheme) for member in members}) > 1:
            yield f"layers that it fuses have different schemes: {name}"
            return


def _serving(layer: StoredLayer) -> Iterator[str]:
    """Why the compressed-tensors kernels of vLLM and SGLang cannot run `layer`."""
    spec, inputs = layer.scheme.weight, layer.scheme.input
    group = spec.granularity.cols
    if isinstance(spec.format, IntFormat):
        bits = spec.format.bits
        if bits not in (4, 8):
            yield f"no kernel for {bits}-bit weights, only 4 and 8"
        if inputs is None and spec.granularity.rows is None:
            yield "weight-only kernels need scales per channel or per group"
        if bits == 4 and inputs is not None and inputs.format == IntFormat(8):
            yield "W4A8 runs on Arm CPUs only"
        if bits == 8 and inputs is None and not spec.symmetric:
            yield "no kernel for asymmetric 8-bit weights"
        if group not in (None, 32, 64, 128):
            yield f"no kernel for groups of {group}"
        if bits == 4 and inputs is None and (layer.out_features % 64 or layer.in_features % 128):
            yield f"4-bit kernels need outputs % 64 = 0 and inputs % 128 = 0, {layer.module} is {layer.shape}"
    if spec.format == FP8_E4M3 and group and layer.in_features % group:
        yield f"block-wise FP8 needs inputs divisible by {group}"
    if spec.format == FP4_E2M1 and layer.in_features % 32:
        yield "FP4 kernels need inputs divisible by 32"


def _transformers(layers: Sequence[StoredLayer]) -> Iterator[str]:
    """Why transformers cannot load the whole, or would load it wrong."""
    schemes = {repr(layer.scheme): layer.scheme for layer in layers}
    for scheme in schemes.values():
        if not scheme.weight.symmetric and (len(schemes) > 1 or scheme.input is not None):
            yield "it cannot load packed zero points beside another scheme or quantized activations"
    for layer in layers:
        if layer.role != "expert":
            continue
        spec, inputs = layer.scheme.weight, layer.scheme.input
        if not spec.symmetric:
            yield "it cannot load experts with zero points"
        if isinstance(spec.format, IntFormat) and spec.format.bits == 8 and inputs is not None:
            yield "it cannot load int8 experts with quantized activations"
        if spec.format == FP8_E4M3 and spec.granularity.cols is not None:
            yield "it cannot load block-wise FP8 experts"
        if spec.format == FP4_E2M1 and spec.granularity.cols == 16:
            yield "it reads NVFP4 experts without their global scale, silently wrong"


def _transformers_remarks(layers: Sequence[StoredLayer]) -> Iterator[str]:
    inputs = [layer for layer in layers if layer.scheme.input is not None]
    if any(layer.role == "expert" for layer in inputs):
        yield "does not quantize the inputs of experts"
    if any(
        spec is not None and spec.dynamic and spec.format == IntFormat(8)
        for spec in (layer.scheme.input for layer in inputs)
    ):
        yield "divides int8 activations by 127.5, vLLM by 127"
