"""Convert a quantized checkpoint to another engine's layout.

Exactly, or not at all: every dequantized number stays the same, or the layers that the target cannot hold are named
with the reason. Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse

from bitgrain.cli.options import add_model, add_output_style, add_trust, parse_size, progress_from
from bitgrain.cli.terminal import make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "IN")
    parser.add_argument(
        "--to", required=True, metavar="LAYOUT", help="compressed-tensors, bitgrain, onnx-qdq, onnx-nbits, ..."
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the new folder or file")
    parser.add_argument("--max-shard-size", type=parse_size, metavar="SIZE", help="of one weight file (default: 5GB)")
    parser.add_argument("--restart", action="store_true", help="throw a half-done run of OUT away and start over")
    add_trust(parser)
    add_output_style(parser)


def run(args: argparse.Namespace) -> int:
    from bitgrain import api
    from bitgrain.report.convert import converted_to_json, render_converted

    settings = {} if args.max_shard_size is None else {"max_shard_bytes": args.max_shard_size}
    result = api.convert(
        getattr(args, "in"),
        args.to,
        args.out,
        trust_remote_code=args.trust_remote_code,
        restart=args.restart,
        progress=progress_from(args),
        **settings,
    )
    if args.json:
        print_json(converted_to_json(result))
    elif not args.quiet:
        render_converted(result, make_console())
    return 0
