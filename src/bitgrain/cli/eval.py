"""Measure perplexity, and the distance from the original model.

Perplexity and tokens per second of OUT on a text; with --against also the original's perplexity, the KL divergence
from it in nats per token (mean and 99th percentile), and how often both name the same next token.
"""

from __future__ import annotations

import argparse

from bitgrain.cli.options import DTYPES, add_device, add_json_file, add_model, add_trust, parse_count, torch_dtype
from bitgrain.cli.terminal import check_json_target, hide_download_bars, make_console, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "OUT")
    parser.add_argument("--against", metavar="MODEL", help="the original, to compare with")
    parser.add_argument(
        "--kv-cache",
        nargs="+",
        metavar="S",
        help="keep keys and values as S says (int8, int4, int2, kivi-int4, kivi-int2, fp8, none); several make a table",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        metavar="S",
        help="multiply Q, K, P, V as S says (int8, int8-tile, int8-int8, int8-fp8, int4-fp8); likewise",
    )
    parser.add_argument(
        "--execution",
        choices=["dequantize", "kernels", "reference"],
        default="dequantize",
        help="how quantized layers compute: dequantize (the default: dense weights, activations simulated), kernels "
        "(packed weights, as bitgrain.load runs them), reference (the kernels' slow twins)",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, or a folder of .txt and .md files")
    parser.add_argument("--seqlen", type=parse_count, default=512, metavar="L", help="tokens in a window; default 512")
    parser.add_argument("--windows", type=parse_count, metavar="N", help="at most N windows; default all of the text")
    parser.add_argument("--batch-size", type=parse_count, default=4, metavar="B", help="windows at once; default 4")
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in; default the checkpoint's")
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="begin the text with what the tokenizer adds, as most published perplexities do",
    )
    add_trust(parser)
    add_json_file(parser)


def run(args: argparse.Namespace) -> int:
    only_json = args.json == "-"
    check_json_target(args.json)
    if only_json:
        hide_download_bars()
    from bitgrain import api
    from bitgrain.progress import make_progress
    from bitgrain.report.evaluation import render_evaluation, render_variants

    variants = {f"kv cache {name}": api.Variant(kv_cache=name) for name in args.kv_cache or ()}
    variants |= {f"attention {name}": api.Variant(attention=name) for name in args.attention or ()}
    found = api.evaluate_variants(
        args.out,
        list(variants.values()) or [api.Variant()],
        text=args.text,
        # what is run in another way is measured against the same model run plainly
        against=args.out if variants and args.against is None else args.against,
        seqlen=args.seqlen,
        windows=args.windows,
        device=args.device,
        dtype=torch_dtype(args.dtype),
        batch_size=args.batch_size,
        special_tokens=args.special_tokens,
        execution=args.execution,
        trust_remote_code=args.trust_remote_code,
        progress=make_progress("quiet" if only_json else "rich"),
    )
    if not only_json and variants:
        render_variants(dict(zip(variants, found, strict=True)), make_console(), model=args.out, text=args.text)
    elif not only_json:
        render_evaluation(found[0], make_console(), model=args.out, against=args.against, text=args.text)
    if args.json is not None:
        each = {name: one.to_json() for name, one in zip(variants, found, strict=False)}
        write_json(each or found[0].to_json(), args.json)
    return 0
