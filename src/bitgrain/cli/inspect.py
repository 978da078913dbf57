"""Show ranges and outliers of a model, and what each granularity would lose.

Before anything is quantized: for each kind of layer the signal-to-noise ratio under each granularity, the layers
that lose most, and a recommendation. With --text the inputs of the layers are measured too.
"""

from __future__ import annotations

import argparse
from typing import Literal

from bitgrain.cli.options import add_device, add_json_file, add_model, add_source, parse_count
from bitgrain.cli.terminal import check_json_target, hide_download_bars, make_console, write_json


def _parse_rows(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else parse_count(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--layers",
        metavar="PATTERN",
        help="which: a name or its last parts, a class, or re:EXPRESSION; default linears",
    )
    parser.add_argument("--all", action="store_true", help="every layer, not only the worst")
    parser.add_argument("--text", metavar="FILE", help="measure activations as well, on this text")
    parser.add_argument("--seqlen", type=parse_count, default=512, metavar="L", help="tokens in a window; default 512")
    parser.add_argument("--windows", type=parse_count, default=8, metavar="N", help="windows of the text; default 8")
    parser.add_argument(
        "--max-rows",
        type=_parse_rows,
        metavar="N",
        help="rows of a matrix that losses are measured on, or all; default all but in very large ones",
    )
    add_device(parser)
    add_source(parser)
    add_json_file(parser)


def run(args: argparse.Namespace) -> int:
    only_json = args.json == "-"
    check_json_target(args.json)
    if only_json:
        hide_download_bars()
    from bitgrain import api
    from bitgrain.progress import make_progress
    from bitgrain.report.inspection import render_inspection

    found = api.inspect(
        args.model,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        layers=args.layers,
        text=args.text,
        seqlen=args.seqlen,
        windows=args.windows,
        device=args.device,
        max_rows="auto" if args.max_rows is None else None if args.max_rows == "all" else args.max_rows,
        progress=make_progress("quiet" if only_json else "rich"),
    )
    if not only_json:
        render_inspection(found, make_console(), all_layers=args.all)
    if args.json is not None:
        write_json(found.to_json(), args.json)
    return 0
