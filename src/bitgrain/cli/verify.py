"""Check that a written folder holds what was meant.

Asked of readers that are not bitgrain's own: every file's hash, every layer as the compressed-tensors library
decodes it, the logits of transformers; with --against also that kept tensors are the original's bytes.
Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse

from bitgrain.cli.options import add_device, add_model, add_trust
from bitgrain.cli.terminal import make_console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "OUT")
    parser.add_argument(
        "--against", metavar="MODEL", help="the original, for the tensors that were kept; for ONNX, what it was made of"
    )
    parser.add_argument(
        "--with",
        dest="readers",
        action="append",
        metavar="ENGINE",
        help="compare logits with this engine's: transformers, llama.cpp, onnxruntime, gptqmodel; repeatable",
    )
    add_device(parser)
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="the checks as JSON")


def run(args: argparse.Namespace) -> int:
    from bitgrain import api
    from bitgrain.report.checks import render_checks

    checks = api.verify(
        args.out,
        against=args.against,
        readers=args.readers or (),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        print_json([{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks])
    else:
        render_checks(checks, make_console())
    return 1 if any(check.ok is False for check in checks) else 0
