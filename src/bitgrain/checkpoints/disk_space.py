"""Is there room for the output? Asked before the job starts, not when the disk is full."""

from __future__ import annotations

import os
from pathlib import Path

from bitgrain.checkpoints.job_folder import check_parent, partial_folder
from bitgrain.errors import PlanError


def check_disk_space(out: Path, needed_bytes: int) -> None:
    """Raise PlanError unless the disk of `out` has room for `needed_bytes` in all.

    What a half-done run of the same OUT already holds on the disk counts as available. OutputError when the
    parent folder of `out` is missing or not writable.
    """
    out = Path(os.path.abspath(out))
    check_parent(out)
    disk = os.statvfs(out.parent)
    free = disk.f_bavail * disk.f_frsize
    held = _allocated(partial_folder(out))
    if needed_bytes > free + held:
        besides = f" besides the {format_bytes(held)} of the half-done run" if held else ""
        raise PlanError(
            f"{out}: {format_bytes(needed_bytes)} are needed, but its disk has only {format_bytes(free)} "
            f"free{besides}. Free some space, or choose another disk."
        )


def format_bytes(nbytes: int) -> str:
    """Bytes for people: decimal units, as disks are sold (1 kB = 1000 bytes), three digits or so."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 99.95 or units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _allocated(folder: Path) -> int:
    """Bytes of disk blocks under `folder`: preallocated ones count, holes do not. 0 when there is no folder."""
    return sum(
        os.lstat(os.path.join(where, name)).st_blocks * 512 for where, _, names in os.walk(folder) for name in names
    )
