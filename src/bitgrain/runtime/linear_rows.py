"""The rows of the operator table for linear layers: x W^T + b with a packed W.

Which kernel serves a layer is decided by properties of its specs, not by names of schemes. A GPU's kernels will be rows
with their device.
"""

from __future__ import annotations

from collections.abc import Callable

from bitgrain.kernels.native import native
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, per_token
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.kernel_arguments import refuse_inputs, refuse_weight
from bitgrain.runtime.operators import ANY, Operator, find_serving, register_operator
from bitgrain.runtime.packed_kernels import IntKernel, IntTwin, PackedKernel

INT8_INPUTS = QuantSpec(IntFormat(8), per_token(), restricted=True, dynamic=True)
"""What weight-only layers may ask for: 8 bits for each token."""

_WEIGHTS = "int1-8, uint1-8, ternary, binary; any tile; integer or real zero points"
_ROWS: tuple[tuple[str, str, Callable[[QuantSpec, QuantSpec], bool]], ...] = (
    ("int2-8 per_token", "exact integer products, float32 scales", lambda w, x: x.dynamic and not x.threshold),
    (
        "int2-8, uint2-8 per_tensor static, integer zero points",
        "the same, the inputs' scale fixed",
        lambda w, x: not x.dynamic and not x.clusters,
    ),
    (
        "int2-8, uint2-8 static, in clusters of channels (RPTQ)",
        "the same, a scale for each run of channels that shares weight group and cluster",
        lambda w, x: not x.dynamic and x.clusters > 0,
    ),
    (
        "int2-8 per_token, channels above a threshold apart (LLM.int8())",
        "the same; those channels in the dtype of the inputs, their columns dequantized",
        lambda w, x: x.dynamic and x.threshold > 0,
    ),
)


def _refusal(mine: Callable[[QuantSpec, QuantSpec], bool]) -> Callable[[QuantSpec, QuantSpec | None], str | None]:
    def refuse(weight: QuantSpec, inputs: QuantSpec | None) -> str | None:
        if inputs is None:
            return "inputs in 16 bits"
        reason = refuse_weight(weight) or refuse_inputs(inputs)
        return reason or (None if mine(weight, inputs) else "inputs of another kind")

    return refuse


def register_linear() -> None:
    """Put the rows into the table. Done when this module is imported."""
    for inputs, arithmetic, mine in _ROWS:
        refuse = _refusal(mine)
        register_operator(Operator("linear", (_WEIGHTS, inputs), IntKernel, "cpu", False, refuse, arithmetic))
        register_operator(Operator("linear", (_WEIGHTS, inputs), IntTwin, ANY, True, refuse, "float64"))


def find_linear(weight: QuantSpec, inputs: QuantSpec | None, device: str, *, reference: bool = False) -> Operator | str:
    """The row for a layer's specs, or why there is none."""
    return find_serving("linear", (weight, inputs), device, reference=reference)


def make_kernel(row: Operator, q: QTensor, quantizer: InputQuantizer | None) -> PackedKernel:
    """The kernel of a row that `find_linear` gave. Raises KernelError where the native module is not here."""
    if not row.reference:
        native()
    return row.kernel(q, quantizer)


register_linear()
