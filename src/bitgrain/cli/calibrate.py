"""Run a model over text once, and save what each of its layers is given.

`bitgrain quantize MODEL --statistics STATS` then needs no text: calibrate once, emit many bit widths, methods and
formats. STATS appears only when it is whole; stopped at any moment, the same command goes on where it was. What
quantizes with it sees inputs as the full-precision model gives them; recipes that follow the quantized model, or learn
by gradients, need text.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bitgrain.cli.options import (
    add_calibration,
    add_device,
    add_experts,
    add_model,
    add_output_style,
    add_source,
    add_workers,
    calibration_from,
    experts_from,
    progress_from,
)
from bitgrain.cli.terminal import hide_download_bars, make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-o", "--out", required=True, metavar="STATS", help="the new folder")
    add_calibration(parser)
    add_experts(parser)
    add_device(parser)
    add_workers(parser)
    add_source(parser)
    add_output_style(parser)


def run(args: argparse.Namespace) -> int:
    if args.json or args.quiet:
        hide_download_bars()
    from bitgrain import api
    from bitgrain.checkpoints.job_folder import check_new
    from bitgrain.report.calibration import calibrated_to_json, render_calibrated

    out = Path(args.out).absolute()
    check_new(out)  # said now, not after a download
    began = time.monotonic()
    try:
        found = api.calibrate(
            args.model,
            out,
            calibration=calibration_from(args),
            experts=experts_from(args),
            device=args.device,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            workers=args.workers,
            progress=progress_from(args),
        )
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    seconds = time.monotonic() - began
    if args.json:
        print_json(calibrated_to_json(found, seconds))
    else:
        render_calibrated(found, seconds, make_console(stderr=args.quiet), args.model, args.out, quiet=args.quiet)
    return 0
