"""Show what quantize would do, before a weight is touched.

Sizes, memory, which layer gets which scheme, what cannot be done as asked and the remedy, and which engines can
load the result. Only headers and configs are read. Exit status 1 when there are problems.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bitgrain.cli.options import add_job, parse_size, plan_from
from bitgrain.cli.terminal import hide_download_bars, make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--layers", action="store_true", help="every layer on its own line")
    parser.add_argument(
        "--kv-memory", type=parse_size, metavar="SIZE", help="how long a context fits into SIZE, with each KV cache"
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")


def run(args: argparse.Namespace) -> int:
    if args.json:
        hide_download_bars()
    from bitgrain.pipeline.context import contexts_for
    from bitgrain.pipeline.plan_json import plan_to_json
    from bitgrain.report.plan import render_contexts, render_plan

    plan = plan_from(args)
    memory: int = args.kv_memory or 0
    contexts = contexts_for(plan, memory) if memory else None
    if args.json:
        told = {} if contexts is None else {"contexts": [asdict(one) for one in contexts]}
        print_json({**plan_to_json(plan), **told})
    else:
        render_plan(plan, make_console(), all_layers=args.layers)
        if contexts is not None:
            render_contexts(contexts, memory, make_console())
    return 1 if plan.problems else 0
