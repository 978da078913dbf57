"""Options that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from bitgrain.pipeline.plan import Plan
    from bitgrain.progress import Progress

INDIVISIBLE = ("error", "pad", "channel", "skip")
DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for instance 5GB or 500MB")
    return nbytes


def parse_count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_bits(text: str) -> float:
    """A number above 0 and at most 16."""
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits between 0 and 16")
    return bits


def parse_columns(text: str) -> dict[str, Any]:
    """Keys of a ColumnChoice out of `1%`, `0.01`, `1%:weight`."""
    amount, _, by = text.partition(":")
    try:
        share = float(amount[:-1]) / 100 if amount.endswith("%") else float(amount)
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.5 or by not in ("", "activation", "weight", "random"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share of the columns; write for instance 1% (at most 50%), 1%:weight or 1%:random"
        )
    return {"share": share, "by": by} if by else {"share": share}


def add_model(parser: argparse.ArgumentParser, what: str = "MODEL") -> None:
    parser.add_argument(
        what.lower(), metavar=what, help="a folder with config.json and safetensors, or a name on the Hugging Face hub"
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a model on the hub")
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto (a GPU if there is one), cpu, cuda or cuda:N; default auto"
    )


def add_output_style(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines on stderr, a summary on stdout")


def progress_from(args: argparse.Namespace) -> Progress:
    """As `add_output_style` says."""
    from bitgrain.progress import make_progress

    return make_progress("json" if args.json else "quiet" if args.quiet else "rich")


def add_json_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as JSON; - for stdout, nothing else")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=parse_count, metavar="N", help="layers worked on at once; default the number of cores"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The text that a model is shown; read back by `calibration_from`."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text for recipes that learn from activations: a file, a folder, hf:DATASET, or builtin (the default)",
    )
    parser.add_argument("--windows", type=parse_count, metavar="N", help="calibration windows; default 128")
    parser.add_argument("--seqlen", type=parse_count, metavar="L", help="tokens in a calibration window; default 512")


def calibration_from(args: argparse.Namespace) -> dict[str, Any] | None:
    """The keys of `recipes.Calibration` that `add_calibration` read; None: none was given."""
    given = {"text": args.calibration, "windows": args.windows, "seqlen": args.seqlen}
    return {key: value for key, value in given.items() if value is not None} or None


def add_experts(parser: argparse.ArgumentParser) -> None:
    """What becomes of experts that calibration hardly reached; read back by `experts_from`."""
    parser.add_argument(
        "--experts",
        choices=("borrow", "all", "nearest"),
        help="experts that few calibration tokens reach: borrow what their layer's tokens would show (default), show "
        "all tokens to all experts, or round to nearest",
    )
    parser.add_argument(
        "--expert-tokens",
        type=parse_count,
        metavar="N",
        help="how many tokens an expert needs of its own; default 4 for each input of its matrices",
    )


def experts_from(args: argparse.Namespace) -> dict[str, Any] | None:
    """The keys of `recipes.Experts` that `add_experts` read; None: none was given."""
    given = {"policy": args.experts, "tokens": args.expert_tokens}
    return {key: value for key, value in given.items() if value is not None} or None


def add_job(parser: argparse.ArgumentParser) -> None:
    """Everything that decides what a quantization does; read back by `plan_from`."""
    add_model(parser)
    parser.add_argument("-s", "--scheme", metavar="S", help="for instance W4A16; `bitgrain schemes` lists them")
    parser.add_argument(
        "--recipe",
        metavar="R",
        help="fast, balanced, best, rptq or zeroquant, or a recipe file (YAML); --scheme and others replace its keys",
    )
    add_calibration(parser)
    add_experts(parser)
    parser.add_argument(
        "--statistics", metavar="STATS", help="in place of text: what `bitgrain calibrate` wrote for this model"
    )
    parser.add_argument(
        "--bits", type=parse_bits, metavar="B", help="average bits a weight, for instance 3.5, allocated by sensitivity"
    )
    parser.add_argument(
        "--engine", metavar="E", help="with --bits: whose formats may be chosen (compressed-tensors, vllm, ...)"
    )
    parser.add_argument(
        "--layout",
        metavar="L",
        help="how the files are laid out: compressed-tensors (the default where it can hold all), gguf, ...",
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="NAME",
        help="a layer to leave as it is; or 2%%, the most sensitive up to that share of the weights; repeatable",
    )
    parser.add_argument(
        "--fallback", action="append", metavar="NAME", help="a layer to get 8 bits a weight; or 10%%, as for --keep"
    )
    parser.add_argument(
        "--include", action="append", metavar="NAME", help="quantize this too: lm_head, an embedding. Repeatable"
    )
    parser.add_argument(
        "--kv-cache", metavar="S", help="fp8: keys and values get static scales from calibration text, which vLLM reads"
    )
    parser.add_argument(
        "--on-indivisible",
        choices=INDIVISIBLE,
        help="layers that groups do not divide: stop (default), pad, use one scale a channel, or keep them as they are",
    )
    parser.add_argument("--solver", metavar="NAME", help="how codes are chosen; default rtn, round to nearest")
    parser.add_argument(
        "--columns",
        type=parse_columns,
        metavar="SHARE[:BY]",
        help="keep this share of the columns in 16 bits, for instance 1%%; BY: activation (default), weight or random",
    )
    parser.add_argument(
        "--max-shard-size", type=parse_size, metavar="SIZE", help="largest weight file, for instance 2GB; default 5GB"
    )
    add_workers(parser)
    add_source(parser)
    parser.set_defaults(complaint=_complain)


def _complain(args: argparse.Namespace) -> str | None:
    """What argparse cannot say: that one of two is needed."""
    if args.scheme is None and args.recipe is None and args.bits is None:
        return "say what to do: --scheme S (`bitgrain schemes` lists them), --bits B or --recipe FILE"
    if args.engine is not None and args.bits is None:
        return "--engine limits what --bits may choose; without --bits it has no meaning"
    if args.statistics is not None and calibration_from(args) is not None:
        return "--statistics stand in place of text: leave out --calibration, --windows and --seqlen"
    weighed = [name for name in (*(args.keep or ()), *(args.fallback or ())) if name.endswith("%")]
    if args.statistics is not None and (args.bits is not None or weighed):
        what = "--bits needs" if args.bits is not None else f"{weighed[0]} of the weights need"
        return f"{what} gradients, which --statistics do not hold: give --calibration TEXT instead"
    return None


def plan_from(args: argparse.Namespace, progress: Progress | None = None, cache: Path | None = None) -> Plan:
    """The plan of what `add_job` read. Raises BitgrainError.

    progress, cache  for `--bits`, which measures the layers first
    """
    from bitgrain import api

    settings: dict[str, Any] = {} if args.max_shard_size is None else {"max_shard_bytes": args.max_shard_size}
    return api.plan(
        args.model,
        args.scheme,
        recipe=args.recipe,
        on_indivisible=args.on_indivisible,
        solver=args.solver,
        calibration=calibration_from(args),
        experts=experts_from(args),
        statistics=args.statistics,
        columns=args.columns,
        keep=args.keep or (),
        fallback=args.fallback or (),
        include=args.include or (),
        bits=args.bits,
        kv_cache=args.kv_cache,
        engine=args.engine,
        layout=args.layout,
        device=getattr(args, "device", "auto"),
        progress=progress,
        cache=cache,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        workers=args.workers,
        **settings,
    )


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that `--dtype` names; None where it is not given."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return None if name is None else dtypes[name]
