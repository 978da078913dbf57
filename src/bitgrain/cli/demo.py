"""Quantize a small built-in model in many ways, and measure each.

No network and no GPU needed. The model and its text come with bitgrain and Python; about a minute on two cores.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitgrain.cli.options import add_device, add_json_file, parse_count
from bitgrain.cli.terminal import check_json_target, make_console, write_json
from bitgrain.errors import OutputError

if TYPE_CHECKING:
    from torch import LongTensor

    from bitgrain.evaluation.language import BaseReference
    from bitgrain.recipes import Recipe
    from bitgrain.report.demo import DemoRow

WINDOW = 512
WINDOWS = 48
BATCH = 8
SCHEMES = (
    *("W8A16_TENSOR", "W8A16", "W8A8", "FP8_DYNAMIC", "INT4_G32", "NVFP4A16", "MXFP4A16", "W4A16_ASYM", "W4A16"),
    *("W4A16_CHANNEL", "W3A16", "W2A16_ASYM", "W2A16"),
)
"""Presets, and INT4_G32, a scheme of one's own as a recipe file would have it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    parser.add_argument("--out", metavar="DIR", help="keep the quantized models there; default a temporary folder")
    parser.add_argument(
        "--windows",
        type=parse_count,
        default=WINDOWS,
        metavar="N",
        help=f"windows of {WINDOW} tokens; default {WINDOWS}",
    )
    add_json_file(parser)


def run(args: argparse.Namespace) -> int:
    check_json_target(args.json)
    with ExitStack() as stack:
        if args.out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitgrain-demo-")))
        else:
            folder = _make_folder(Path(args.out))
        stack.enter_context(_one_thread())
        return _run(args, folder)


@contextmanager
def _one_thread() -> Generator[None]:
    """A model this small gains nothing from more threads, and where cores are busy they wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_folder(folder: Path) -> Path:
    """Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}") from error
    return folder


def _run(args: argparse.Namespace, folder: Path) -> int:
    from bitgrain.progress import make_progress
    from bitgrain.report.demo import render_demo, row_to_json
    from bitgrain.report.tables import command, duration_text, say

    began = time.monotonic()
    only_json = args.json == "-"
    console = make_console()
    setup = _prepare(args.device, args.windows)
    if not only_json:
        for line in _introduction(setup):
            say(console, line)
        say(console)
    progress = make_progress("quiet" if only_json else "rich")
    progress.start(len(SCHEMES), "schemes", "demo")
    rows: list[DemoRow] = []
    try:
        for name in SCHEMES:
            rows.append(_measure(setup, name, folder))
            progress.advance(1, name)
    finally:
        progress.finish()
    if not only_json:
        render_demo(rows, setup.nbytes, setup.reference.perplexity, console)
        say(console)
        say(console, f"{duration_text(time.monotonic() - began)} in all. Next, on a model of yours:", "bold")
        for line in _next_commands(args.out, rows):
            command(console, line)
    if args.json is not None:
        figures = {"base_perplexity": setup.reference.perplexity, "base_bytes": setup.nbytes}
        write_json({**figures, "rows": [row_to_json(row) for row in rows]}, args.json)
    return 0


@dataclass(frozen=True)
class _Setup:
    """The original model, recorded once, and the text as int64 windows [n, WINDOW]."""

    model: Path
    device: str
    reference: BaseReference
    parameters: int
    nbytes: int
    modules: int


def _prepare(device: str, windows: int) -> _Setup:
    import torch

    from bitgrain import api
    from bitgrain.calibration.corpus import HELD_OUT_MODULES
    from bitgrain.checkpoints.reader import open_checkpoint
    from bitgrain.demo import demo_model_path
    from bitgrain.evaluation.language import record_base

    model = demo_model_path()
    base = api.load(model, device=device, dtype=torch.float32)
    return _Setup(
        model=model,
        device=device,
        reference=record_base(base, held_out_windows(model, windows), batch_size=BATCH),
        parameters=sum(parameter.numel() for parameter in base.parameters()),
        nbytes=sum(entry.nbytes for entry in open_checkpoint(model).entries.values()),
        modules=len(HELD_OUT_MODULES),
    )


def held_out_windows(model: Path, count: int) -> LongTensor:
    """`count` windows [n, WINDOW] spread evenly over the held-out text, so that they come from many modules."""
    import torch

    from bitgrain.calibration.corpus import builtin_text
    from bitgrain.calibration.text import load_tokenizer, token_windows

    every = token_windows(load_tokenizer(model), builtin_text("evaluation"), WINDOW)
    count = min(count, len(every))
    return every[torch.arange(count) * len(every) // count]  # type: ignore[return-value]


def _measure(setup: _Setup, name: str, folder: Path) -> DemoRow:
    """Quantize under one scheme, load what was written, compare it with the original."""
    import torch

    from bitgrain import api
    from bitgrain.evaluation.language import evaluate_model
    from bitgrain.report.demo import DemoRow
    from bitgrain.report.schemes import format_text, short_text

    began = time.monotonic()
    plan = api.quantize(setup.model, folder / name, recipe=_recipe(name), device=setup.device).plan
    seconds = time.monotonic() - began
    quantized = api.load(folder / name, device=setup.device, dtype=torch.float32, execution="dequantize")
    reference = setup.reference
    found = evaluate_model(quantized, reference.windows, base=reference, batch_size=BATCH)
    scheme = next(iter(plan.quantized.values())).scheme
    return DemoRow(
        scheme=name,
        weights=format_text(scheme.weight.format),
        granularity=short_text(scheme),
        bits_per_weight=plan.bits_per_weight,
        nbytes=plan.bytes_after,
        seconds=seconds,
        evaluation=found,
    )


def _recipe(name: str) -> Recipe:
    from bitgrain.recipes import make_recipe

    if name == "INT4_G32":
        return make_recipe(scheme={"name": name, "weight": {"format": "int4", "granularity": "per_group(32)"}})
    return make_recipe(scheme=name)


def _introduction(setup: _Setup) -> list[str]:
    from bitgrain.report.tables import count_text

    windows = setup.reference.windows
    return [
        f"The model: a Llama of {count_text(setup.parameters)} parameters that comes with bitgrain, trained on "
        "Python's library.",
        f"The text: {len(windows)} windows of {WINDOW} tokens, spread over {setup.modules} modules of it that it never "
        "saw.",
        "It is a toy, so that this runs offline in a minute: a large model's figures differ, measure yours.",
    ]


def _next_commands(out: str | None, rows: list[DemoRow]) -> list[str]:
    lines = [
        "bitgrain schemes                                 what else there is",
        "bitgrain plan MODEL --scheme W4A16               what it would cost, before it starts",
        "bitgrain quantize MODEL --scheme W4A16 -o OUT",
        "bitgrain eval OUT --against MODEL --text FILE    this table's figures for your model and text",
    ]
    if out is not None:
        lines.append(f"bitgrain verify {shlex.quote(str(Path(out) / rows[-1].scheme))}")
    return lines
