"""Which axes of an operand may carry scales: those that its contraction does not sum over.

A scale that is the same for all k can be taken out of a sum over k, sum_k (s v_k) b_k = s sum_k v_k b_k, and the codes
are multiplied as integers. A scale for each k cannot. That is all there is to it, for attention as for any product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bitgrain.errors import SchemeError

NAMES = {
    "b": "batch",
    "h": "head",
    "q": "query token",
    "k": "key token",
    "d": "channel",
    "c": "input channel",
    "i": "kernel position",
    "o": "output channel",
}


@dataclass(frozen=True)
class Contraction:
    """A product as an einsum of two operands: `Contraction("QK", "bhqd,bhkd->bhqk")`, one letter for each axis."""

    name: str
    equation: str

    @property
    def operands(self) -> tuple[str, str]:
        """The axes of both."""
        left, right = self.equation.partition("->")[0].split(",")
        return left, right

    @property
    def summed(self) -> frozenset[str]:
        """The axes that are not in the result."""
        return frozenset("".join(self.operands)) - frozenset(self.equation.partition("->")[2])

    def allowed(self, operand: int) -> str:
        """The axes of an operand (0 or 1) along which its scales may vary, in its order."""
        return "".join(axis for axis in self.operands[operand] if axis not in self.summed)

    def check(self, operand: int, varies: Collection[str], what: str) -> None:
        """Raise SchemeError where scales would vary along an axis that is summed over."""
        wrong = [axis for axis in varies if axis in self.summed]
        if wrong:
            raise SchemeError(
                f"{what}: scales cannot vary by {NAMES.get(wrong[0], wrong[0])}, since {self.name} sums over it; they "
                f"may vary by {', '.join(NAMES.get(axis, axis) for axis in self.allowed(operand))}"
            )


QK = Contraction("Q K^T", "bhqd,bhkd->bhqk")
PV = Contraction("P V", "bhqk,bhkd->bhqd")
OPERANDS = {"Q": (QK, 0), "K": (QK, 1), "P": (PV, 0), "V": (PV, 1)}


def axes_table(operands: Mapping[str, tuple[Contraction, int]] = OPERANDS) -> str:
    """The Markdown table of docs/attention.md; of other operands, each a contraction and 0 or 1, theirs."""
    lines = ["| operand | product | scales may vary by | not by, as it is summed over |", "|---|---|---|---|"]
    for name, (contraction, operand) in operands.items():
        axes = contraction.operands[operand]
        free = ", ".join(NAMES[axis] for axis in contraction.allowed(operand))
        summed = ", ".join(NAMES[axis] for axis in axes if axis in contraction.summed)
        lines.append(f"| {name} | {contraction.name} | {free} | {summed} |")
    return "\n".join(lines) + "\n"
