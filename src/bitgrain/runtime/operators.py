"""The operator table: who computes what, with which formats, on which device.

A row is a kernel. A reference in torch, readable and exact, serves every device; a fast kernel is one more row with the
same operation and formats for its device, and is taken from then on. There is no silent way out: what has no row is an
error that lists what there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import SchemeError

ANY = "any"
NOT_MINE = ""
"""What a row says of operands that are another row's business."""


@dataclass(frozen=True)
class Operator:
    """One row.

    operation  "attention": softmax(Q K^T) V; "linear": x W^T + b; "embedding": some rows of W
    formats    of its operands in their order ("int8 per_channel"), "-" for one that stays as it is
    device     a type of torch.device, or ANY
    kernel     computes it, or makes what does; the operation says with which arguments
    reference  whether it is the readable twin, which saves no time
    refuse     "linear" and "embedding", whose formats are only a description: why the row does not serve operands (the
               specs of weight and inputs), None where it does
    arithmetic how it computes, for the table
    """

    operation: str
    formats: tuple[str, ...]
    kernel: Callable[..., Any]
    device: str = ANY
    reference: bool = False
    refuse: Callable[..., str | None] | None = None
    arithmetic: str = ""


_ROWS: dict[tuple[str, tuple[str, ...], str], Operator] = {}


def register_operator(row: Operator) -> None:
    """Put a row into the table, in place of one for the same operation, formats and device."""
    _ROWS[row.operation, row.formats, row.device] = row


def operators() -> list[Operator]:
    """All rows, in the order in which they came."""
    return list(_ROWS.values())


def find_operator(operation: str, formats: tuple[str, ...], device: str) -> Operator:
    """The row for `device`, else the one for any. Raises SchemeError where there is neither."""
    for place in (device, ANY):
        row = _ROWS.get((operation, formats, place))
        if row is not None:
            return row
    known = [
        " x ".join(row.formats) for row in operators() if row.operation == operation and row.device in (device, ANY)
    ]
    listed = "; ".join(known) or "none"
    raise SchemeError(f"no kernel for {operation} on {' x '.join(formats)} on {device}; there are: {listed}")


def find_serving(operation: str, operands: tuple[Any, ...], device: str, *, reference: bool = False) -> Operator | str:
    """The first row that serves these operands on `device`, or why none does. reference: the twins' rows only."""
    reasons: list[str] = []
    for row in operators():
        if row.operation == operation and row.device in (device, ANY) and row.reference == reference and row.refuse:
            reason = row.refuse(*operands)
            if reason is None:
                return row
            reasons += [reason] if reason else []
    return "; ".join(dict.fromkeys(reasons)) or f"no kernels for {device} yet"
