"""Train LoRA adapters on a checkpoint whose weights stay in low bits.

OUT is what `bitgrain quantize` wrote (QLoRA: --scheme NF4). Its weights stay packed in memory and are not changed; the
adapters alone are trained, on the next-token loss of a text. ADAPTER is what peft loads; `bitgrain merge` adds it to
the weights. Stopped at any moment, the same command goes on from the last saved state, and ends in the same bytes.
Needs peft: pip install 'bitgrain[peft]'.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bitgrain.cli.options import add_device, add_model, add_output_style, add_trust, parse_count, progress_from
from bitgrain.cli.terminal import hide_download_bars, make_console, print_json

OPTIMIZERS = ("adamw", "adamw8bit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="what to learn: a text file, or a folder of them")
    parser.add_argument("-o", "--out", required=True, metavar="ADAPTER", help="the new folder")
    parser.add_argument("--rank", type=parse_count, default=16, metavar="R", help="inner width of adapters; default 16")
    parser.add_argument(
        "--alpha", type=_positive, default=32.0, metavar="A", help="what they add is times A / R; default 32"
    )
    parser.add_argument(
        "--targets", metavar="NAMES", help="layers to adapt, for instance q_proj,v_proj; default all but the head"
    )
    parser.add_argument("--steps", type=parse_count, default=200, metavar="N", help="gradient steps; default 200")
    parser.add_argument("--batch", type=parse_count, default=4, metavar="B", help="windows in a step; default 4")
    parser.add_argument("--seqlen", type=parse_count, default=512, metavar="L", help="tokens in a window; default 512")
    parser.add_argument(
        "--rate",
        type=_positive,
        default=2e-4,
        metavar="LR",
        help="learning rate: it rises, then falls; default 2e-4",
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw8bit: states in 8 bits; default adamw"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of adapters and order of windows; default 0")
    parser.add_argument("--restart", action="store_true", help="throw a half-done run of ADAPTER away and start over")
    add_device(parser)
    add_trust(parser)
    add_output_style(parser)


def run(args: argparse.Namespace) -> int:
    if args.json or args.quiet:
        hide_download_bars()
    from bitgrain import api
    from bitgrain.report.finetune import finetuned_to_json, render_finetuned

    began = time.monotonic()
    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("text", "rank", "alpha", "seqlen", "steps", "batch", "rate", "optimizer", "seed", "device")
    }
    if args.targets is not None:
        settings["targets"] = [name.strip() for name in args.targets.split(",") if name.strip()]
    try:
        found = api.finetune(
            args.model,
            Path(args.out).absolute(),
            trust_remote_code=args.trust_remote_code,
            restart=args.restart,
            progress=progress_from(args),
            **settings,
        )
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("stopped: the same command goes on from the last saved state", file=sys.stderr)
        return 130
    seconds = time.monotonic() - began
    if args.json:
        print_json(finetuned_to_json(found, seconds))
    elif not args.quiet:
        render_finetuned(found, seconds, make_console(), args.model, args.out)
    return 0


def _positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
