"""Train a quantized model: quantization-aware training, distilled from the full-precision model.

MODEL is quantized first, as --recipe says, and trained from there: the weights behind the codes, and learned scales
(LSQ). OUT is what `bitgrain quantize` would write for the scheme, and appears only when it is whole; stopped at any
moment, the same command goes on where it was, and ends in the same bytes. Needs memory for the whole model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.cli.options import (
    INDIVISIBLE,
    add_device,
    add_model,
    add_output_style,
    add_source,
    add_workers,
    parse_count,
)
from bitgrain.cli.quantize import carry_out

if TYPE_CHECKING:
    from bitgrain.pipeline.plan import Plan
    from bitgrain.progress import Progress

_SETTINGS = ("steps", "batch", "windows", "seqlen", "rate", "scale_rate", "seed", "loss", "autocast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "-s", "--scheme", required=True, metavar="S", help="for instance W4A8; `bitgrain schemes` lists them"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--text", required=True, metavar="TEXT", help="what to train on: a file, a folder, hf:DATASET, or builtin"
    )
    parser.add_argument(
        "--recipe", default="train", metavar="R", help="where to start from: a named recipe or a file; default train"
    )
    parser.add_argument("--steps", type=parse_count, metavar="N", help="gradient steps; default 450")
    parser.add_argument("--batch", type=parse_count, metavar="N", help="windows in a step; default 4")
    parser.add_argument("--windows", type=parse_count, metavar="N", help="windows of the text to use; default all")
    parser.add_argument("--seqlen", type=parse_count, metavar="L", help="tokens in a window; default 512")
    parser.add_argument("--rate", type=float, metavar="R", help="learning rate of weights, in steps of the grid")
    parser.add_argument("--scale-rate", type=float, metavar="R", help="of scales, in steps of the grid's end")
    parser.add_argument("--loss", choices=("distill", "next_token"), help="default distill: KL from the original model")
    parser.add_argument("--seed", type=int, metavar="N", help="of the order of the windows; default 0")
    parser.add_argument(
        "--autocast", action="store_true", default=None, help="compute in bfloat16 where the hardware has it"
    )
    parser.add_argument("--keep", action="append", metavar="NAME", help="a layer to leave as it is; repeatable")
    parser.add_argument("--include", action="append", metavar="NAME", help="quantize this too: lm_head, an embedding")
    parser.add_argument("--on-indivisible", choices=INDIVISIBLE, help="layers that groups do not divide; default stop")
    parser.add_argument("--restart", action="store_true", help="throw a half-done run of OUT away and start over")
    add_device(parser)
    add_workers(parser)
    add_source(parser)
    add_output_style(parser)


def run(args: argparse.Namespace) -> int:
    return carry_out(args, _plan)


def _plan(args: argparse.Namespace, progress: Progress, cache: Path) -> Plan:
    from bitgrain import api

    given: dict[str, Any] = {name: getattr(args, name) for name in _SETTINGS}
    recipe = api.training_recipe(
        args.scheme, args.text, args.recipe, {name: value for name, value in given.items() if value is not None}
    )
    return api.plan(
        args.model,
        recipe=recipe,
        on_indivisible=args.on_indivisible,
        keep=args.keep or (),
        include=args.include or (),
        device=args.device,
        progress=progress,
        cache=cache,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        workers=args.workers,
    )
