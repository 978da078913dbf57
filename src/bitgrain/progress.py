"""How long work reports itself: one small protocol, and three ways to show it.

The unit of work is the caller's choice and may be fractional. Bytes are a good one: layers differ in size, so
an estimate that counts layers jumps, and one that counts bytes does not.

Everything goes to stderr, so that stdout stays free for results.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as RichBar
from rich.table import Column
from rich.text import Text

__all__ = ["JsonProgress", "Progress", "ProgressMode", "QuietProgress", "RichProgress", "make_progress"]

ProgressMode = Literal["rich", "quiet", "json"]
Clock = Callable[[], float]


class Progress(Protocol):
    """What a long job tells. `start`, any number of `advance` (from any thread), `finish`; then `start` again."""

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        """`done` of `total` units were done by an earlier process: shown, but not counted in the rate."""
        ...

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """`amount` more units are done; `note` names what they were (a layer, a file)."""
        ...

    def finish(self) -> None:
        """The work stopped, complete or not. Harmless when nothing was started."""
        ...


class _Meter:
    """Counts work. The rate is that of this process: what was done before `start` took time elsewhere."""

    def __init__(self, total: float, unit: str, title: str, done: float, clock: Clock) -> None:
        self.total = float(total)
        self.unit = unit
        self.title = title
        self.done = float(done)
        self.note = ""
        self._before = float(done)
        self._clock = clock
        self._began = clock()

    def advance(self, amount: float, note: str) -> None:
        self.done += amount
        self.note = note

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0) if self.total > 0 else 1.0

    @property
    def complete(self) -> bool:
        # fractional units add up with a rounding error
        return self.done >= self.total * (1 - 1e-9)

    @property
    def rate(self) -> float | None:
        """Units per second, or None before any work was done here."""
        elapsed = self.elapsed_s
        here = self.done - self._before
        return here / elapsed if here > 0 and elapsed > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the mean rate so far; 0 when complete, None while the rate is unknown."""
        if self.complete:
            return 0.0
        rate = self.rate
        return None if rate is None else (self.total - self.done) / rate

    def describe_amount(self) -> str:
        done = _format_amount(self.done, self.unit if self.unit == "bytes" else "")
        return f"{done} of {_format_amount(self.total, self.unit)}"

    def describe_rate(self) -> str:
        rate = self.rate
        return "" if rate is None else f"{_format_amount(rate, self.unit)}/s"

    def describe_left(self) -> str:
        eta = self.eta_s
        return "" if eta is None else f"{_format_seconds(eta)} left"


def _format_amount(amount: float, unit: str) -> str:
    """`1.25 GB` for bytes (powers of 1000), `12 800 tokens` otherwise."""
    if unit == "bytes":
        for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if amount >= size:
                return f"{amount / size:.3g} {name}"
        return f"{amount:.0f} B"
    number = f"{amount:.2g}" if 0 < amount < 10 and amount != int(amount) else f"{amount:,.0f}".replace(",", " ")
    return f"{number} {unit}".rstrip()


def _format_seconds(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


class QuietProgress:
    """Says nothing."""

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        pass

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        pass

    def finish(self) -> None:
        pass


class JsonProgress:
    """One JSON object a line, for programs: at `start`, at every `advance`, and at `finish`.

    `{"event": "progress", "title", "done", "total", "unit", "eta_s", "note"}`; `eta_s` is null while unknown.
    The last line's event is `finish`, and has `elapsed_s` and `complete` as well.
    """

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._meter: _Meter | None = None
        self._lock = threading.Lock()

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        self.finish()
        with self._lock:
            self._meter = _Meter(total, unit, title, done, self._clock)
            self._write(self._meter, "progress", {})

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.advance(amount, note)
                self._write(self._meter, "progress", {})

    def finish(self) -> None:
        with self._lock:
            if self._meter is not None:
                meter, self._meter = self._meter, None
                elapsed = round(meter.elapsed_s, 3)
                self._write(meter, "finish", {"elapsed_s": elapsed, "complete": meter.complete})

    def _write(self, meter: _Meter, event: str, extra: dict[str, float | bool]) -> None:
        eta = meter.eta_s
        record = {
            "event": event,
            "title": meter.title,
            "done": _plain_number(meter.done),
            "total": _plain_number(meter.total),
            "unit": meter.unit,
            "eta_s": None if eta is None else round(eta, 1),
            "note": meter.note,
            **extra,
        }
        print(json.dumps(record), file=self._stream or sys.stderr, flush=True)


def _plain_number(value: float) -> float:
    return int(value) if value == int(value) else value


class RichProgress:
    """A bar on a terminal; elsewhere (a log file, a pipe) a plain line at most every `interval_s` seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic, interval_s: float = 10.0) -> None:
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._meter: _Meter | None = None
        self._bar: RichBar | None = None
        self._told_at = -math.inf
        self._lock = threading.Lock()

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        self.finish()
        with self._lock:
            self._meter = meter = _Meter(total, unit, title, done, self._clock)
            # the console's file is looked up now: stderr may have been redirected since the object was made
            console = Console(file=self._stream or sys.stderr)
            if console.is_terminal:
                columns = (_TitleColumn(), BarColumn(bar_width=20), _MeterColumn(meter))
                self._bar = RichBar(*columns, console=console, redirect_stdout=False)
                self._bar.add_task(title, total=max(meter.total, 1e-9), completed=meter.done)  # type: ignore[arg-type]
                self._bar.start()
            else:
                self._told_at = self._clock()
                self._say(meter)

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        with self._lock:
            if self._meter is None:
                return
            self._meter.advance(amount, note)
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._meter.done)
            elif self._clock() - self._told_at >= self._interval_s:
                self._told_at = self._clock()
                self._say(self._meter)

    def finish(self) -> None:
        with self._lock:
            if self._meter is None:
                return
            meter, self._meter = self._meter, None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
                return
            self._say(meter, last=True)

    def _say(self, meter: _Meter, last: bool = False) -> None:
        if last:
            word = "done" if meter.complete else "stopped"
            facts = [f"{word} after {_format_seconds(meter.elapsed_s)}", meter.describe_amount()]
        else:
            facts = [f"{meter.fraction:.0%}", meter.describe_amount(), meter.describe_rate(), meter.describe_left()]
            facts.append(meter.note)
        line = ", ".join(fact for fact in facts if fact)
        print(f"{meter.title}: {line}" if meter.title else line, file=self._stream or sys.stderr, flush=True)


class _TitleColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description)  # never markup: a title may hold [brackets]


class _MeterColumn(ProgressColumn):
    """Our own figures. rich's columns take the rate over a short sliding window, ours over all the work."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))  # the note, last, gives way
        self._meter = meter

    def render(self, task: Task) -> Text:
        meter = self._meter
        facts = [f"{meter.fraction:4.0%}", meter.describe_amount(), meter.describe_rate(), meter.describe_left()]
        return Text("  ".join(fact for fact in [*facts, meter.note] if fact))


def make_progress(mode: ProgressMode) -> Progress:
    """The reporter for `--progress MODE`.

    Raises ValueError for an unknown mode.
    """
    match mode:
        case "rich":
            return RichProgress()
        case "quiet":
            return QuietProgress()
        case "json":
            return JsonProgress()
    raise ValueError(f"progress mode {mode!r} is unknown: choose rich, quiet or json")
