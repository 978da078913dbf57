"""What a check of a written checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ok None: could not be looked at, `detail` says why."""

    name: str
    ok: bool | None
    detail: str
