"""Processes that measure: each the leader of a group of its own, so that it ends with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock


@dataclass
class Processes:
    """Runs processes, from several threads if need be, and can end those that are running."""

    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout: float, folder: Path | None = None
    ) -> tuple[int, str, str]:
        """(exit status, stdout, stderr). folder: where it runs.

        Raises ValueError where it did not end within `timeout` seconds, or `stop` was called.
        """
        with self._lock:
            if self.stopped:
                raise ValueError("stopped")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(process)
            process.communicate()
            raise ValueError(f"it ran for more than {timeout:g} s") from None
        finally:
            end(process)  # where the caller was interrupted
            with self._lock:
                self._running.discard(process)
        return process.returncode, out, errors

    def stop(self) -> None:
        """End what is running; nothing is started any more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and its group, unless it is known to have ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
