"""Quantize a model, disk to disk.

Memory is bounded by a few layers, whatever the model's size. OUT appears only when it is whole; stopped at any
moment, the same command goes on where it was, and ends in the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.cli.options import add_device, add_job, add_output_style, plan_from, progress_from
from bitgrain.cli.terminal import hide_download_bars, make_console, print_error, print_json

if TYPE_CHECKING:
    from bitgrain.pipeline.plan import Plan
    from bitgrain.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the new folder")
    add_device(parser)
    parser.add_argument("--restart", action="store_true", help="throw a half-done run of OUT away and start over")
    add_output_style(parser)


def run(args: argparse.Namespace) -> int:
    return carry_out(args, plan_from)


def carry_out(args: argparse.Namespace, make: Callable[[argparse.Namespace, Progress, Path], Plan]) -> int:
    """Carry the plan that `make(args, progress, cache)` gives out into `args.out`; the exit status."""
    if args.json or args.quiet:
        hide_download_bars()
    from bitgrain.api import bits_cache
    from bitgrain.checkpoints.job_folder import check_new, partial_folder
    from bitgrain.pipeline.quantize_gguf import run_plan_into
    from bitgrain.report.plan import problem_lines, render_short_plan
    from bitgrain.report.result import render_result, result_to_json, warning_lines

    out = Path(args.out).absolute()
    partial = partial_folder(out)
    check_new(out, resumed=partial.exists())  # said now, not after a download
    progress = progress_from(args)
    cache = bits_cache(out)
    plan = make(args, progress, cache)
    silent = args.json or args.quiet
    if not silent:
        render_short_plan(plan, make_console())
    if plan.problems:
        print_error("this cannot be done as asked:\n  " + "\n  ".join(problem_lines(plan)))
        return 1
    began = time.monotonic()
    try:
        settings: dict[str, Any] = {"device": args.device, "restart": args.restart, "progress": progress}
        result = run_plan_into(plan, out, getattr(args, "layout", None), **settings)
    except KeyboardInterrupt:
        if args.debug:
            raise
        kept = f"what is done is in {partial.name}; " if partial.exists() else ""
        print(f"stopped: {kept}the same command goes on from here", file=sys.stderr)
        return 130
    cache.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    if args.json:
        print_json(result_to_json(result, seconds))
    elif args.quiet:
        for line in warning_lines(result):
            print(f"warning: {line}", file=sys.stderr)
    else:
        render_result(result, seconds, make_console(), model=args.model, out=args.out)
    return 0
