"""Add an adapter to the weights of its base, as a dense model.

OUT is what the adapter was trained on, ADAPTER what `bitgrain finetune` or peft wrote. MODEL is a plain checkpoint that
transformers loads, and that can be quantized again. Needs peft: pip install 'bitgrain[peft]'.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from bitgrain.cli.options import DTYPES, add_device, add_model, add_trust, torch_dtype
from bitgrain.cli.terminal import make_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder")
    parser.add_argument("-o", "--out", required=True, metavar="NEW", help="the new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default as OUT loads")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    add_device(parser)
    add_trust(parser)


def run(args: argparse.Namespace) -> int:
    from bitgrain import api
    from bitgrain.report.tables import command, say

    api.merge(
        args.model,
        args.adapter,
        Path(args.out).absolute(),
        dtype=torch_dtype(args.dtype),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if not args.quiet:
        console = make_console()
        say(console, f"{args.out} is written", "bold")
        say(console, "next", "bold")
        command(console, f"bitgrain quantize {shlex.quote(args.out)} --scheme W4A16 -o NEW")
    return 0
