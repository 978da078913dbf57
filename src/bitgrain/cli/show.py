"""Show what is in a checkpoint: its layout, bits, and how each layer is stored.

Of any layout that bitgrain reads; headers only, no weight is loaded.
"""

from __future__ import annotations

import argparse

from bitgrain.cli.options import add_model
from bitgrain.cli.terminal import make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "FILE")
    parser.add_argument("--all-layers", action="store_true", help="every tensor on a line of its own")
    parser.add_argument("--json", action="store_true", help="the contents as JSON")


def run(args: argparse.Namespace) -> int:
    from bitgrain import api
    from bitgrain.report.show import contents_to_json, render_contents

    found = api.show(args.file)
    if args.json:
        print_json(contents_to_json(found))
    else:
        render_contents(found, make_console(), all_layers=args.all_layers)
    return 0
