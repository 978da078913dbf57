"""Every error that bitgrain raises on purpose. The text is written for the user: what is wrong, and the remedy.

One class per cause, all of them `BitgrainError`, so that a caller can catch one thing and the command line can
print one line. Anything else that escapes is a bug.
"""

import difflib
from collections.abc import Sequence


class BitgrainError(Exception):
    """Base class; `str(error)` is the whole message for the user."""


class ModelError(BitgrainError):
    """MODEL cannot be found, is not a model, or has an architecture that cannot be handled."""


class CheckpointError(BitgrainError):
    """A weight file is missing, truncated, corrupt, inconsistent with its index, or points outside its folder."""


class NumericsError(BitgrainError):
    """A tensor holds NaN or Inf, or a scale does not fit its storage dtype."""


class StatisticsError(BitgrainError):
    """Saved statistics are missing, damaged, or of another model."""


class SchemeError(BitgrainError):
    """A scheme, format, granularity, range, solver or transform is unknown or inconsistent."""


class RecipeError(BitgrainError):
    """A recipe file has an unknown key, a bad value, or a rule that matches nothing."""


class PlanError(BitgrainError):
    """The job cannot be done as asked (indivisible groups, not enough disk, unsupported layers)."""


class OutputError(BitgrainError):
    """OUT exists already, or cannot be written."""


class ResumeError(BitgrainError):
    """A half-done run exists, but the settings or sources are not the ones it was started with."""


class TextError(BitgrainError):
    """The text or the tokenizer is missing, or the text is shorter than one window."""


class KernelError(BitgrainError):
    """The native kernels are not here, or have none for what is asked."""


class TrainingError(BitgrainError):
    """Training cannot go on: the loss or a gradient is not finite. What was good before is kept."""


def unknown_name(kind: str, name: str, known: Sequence[str], near: str | None = None) -> str:
    """ "unknown scheme 'W4A17'; did you mean W4A16? Known schemes: ..."; `near`: the name as it is compared."""
    found = difflib.get_close_matches(near or name, known, n=1)
    hint = f"; did you mean {found[0]}?" if found else "."
    return f"unknown {kind} {name!r}{hint} Known schemes: {', '.join(known)}"
