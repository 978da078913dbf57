"""List the schemes: what each gives weights and activations, what it costs on disk, and which engines load it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bitgrain.cli.terminal import make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="as the README has it")
    how.add_argument("--engines", action="store_true", help="layout x scheme x engine, as docs/engines.md has it")
    how.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    from bitgrain.report.engines import engine_tables_markdown
    from bitgrain.report.schemes import describe_schemes, render_schemes, scheme_table_markdown

    if args.markdown:
        print(scheme_table_markdown())
    elif args.engines:
        print(engine_tables_markdown())
    elif args.json:
        print_json([asdict(row) for row in describe_schemes()])
    else:
        render_schemes(make_console())
    return 0
