"""A language model of 1.1 billion random parameters, end to end: bitgrain beside other engines.

    python benchmarks/generate.py --cache FOLDER                 # some six minutes, once the models are in FOLDER
    python benchmarks/generate.py --cache FOLDER --only W4A8,llama.cpp
    python benchmarks/generate.py --cache FOLDER --busy 1        # beside a process that needs a core

Each contestant is a process of its own. In each round each one reads a prompt of 512 tokens, and generates 64 after a
short one. The first run makes the models, which takes minutes and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine_line, random_llama, write_results
from generate_report import report
from rounds import HERE, Contestant, PeerError, add_options, busy, median, rest, say, wanted

CACHE = Path.home() / ".cache" / "bitgrain-benchmarks"
LEAST_ROUNDS = 2
BUSY_TOKENS = 16
"""Generated beside busy processes: some engines become very slow there."""


@dataclass(frozen=True)
class Entry:
    """A contestant: its library's module, and the file in the cache that it reads."""

    name: str
    module: str
    file: str
    more: str = ""
    on_request: bool = False


ENTRIES = (
    Entry("bitgrain W4A8", "llm_bitgrain", "llama1b-w4a8-head8"),
    Entry("bitgrain W4A16", "llm_bitgrain", "llama1b-w4a16-head8"),
    Entry("bitgrain W8A8", "llm_bitgrain", "llama1b-w8a8-head8"),
    Entry("bitgrain W4A8, head in bfloat16", "llm_bitgrain", "llama1b-w4a8", on_request=True),
    Entry("llama.cpp Q4_0", "llm_llama_cpp", "peers/q4_0.gguf"),
    Entry("llama.cpp Q4_K_M", "llm_llama_cpp", "peers/q4_k_m.gguf"),
    Entry("llama.cpp Q8_0", "llm_llama_cpp", "peers/q8_0.gguf"),
    Entry("OpenVINO int4 sym", "llm_openvino", "peers/openvino-int4-sym"),
    Entry("OpenVINO int4 asym", "llm_openvino", "peers/openvino-int4-asym", on_request=True),
    Entry("OpenVINO int8", "llm_openvino", "peers/openvino-int8"),
    Entry("onnxruntime-genai int4", "llm_onnxruntime_genai", "peers/onnxruntime-genai-int4"),
    Entry("transformers bfloat16", "llm_transformers", "llama1b", more=":bfloat16"),
    Entry("transformers float32", "llm_transformers", "llama1b", more=":float32", on_request=True),
)
HEAD = ("--include", "lm_head", "--fallback", "lm_head")  # 8 bits, as the peers have it, or 6
OURS: dict[str, tuple[str, ...]] = {
    "llama1b-w4a8-head8": ("--scheme", "W4A8", *HEAD),
    "llama1b-w4a16-head8": ("--scheme", "W4A16", *HEAD),
    "llama1b-w8a8-head8": ("--scheme", "W8A8", *HEAD),
    "llama1b-w4a8": ("--scheme", "W4A8"),
}
"""Arguments of `bitgrain quantize` that make our files."""


def make_file(entry: Entry, cache: Path, peers_python: Path) -> Path:
    """The file of an entry, written where it is absent. Raises PeerError where that cannot be done here."""
    file, source = cache / entry.file, random_llama(cache / "llama1b")
    if file.exists():
        return file
    say(f"{entry.name}: writing its model")
    file.parent.mkdir(parents=True, exist_ok=True)
    if entry.file in OURS:
        command = [sys.executable, "-m", "bitgrain", "quantize", source, "-o", file, "--quiet", *OURS[entry.file]]
    else:
        command = [peers_python, "-m", "contestants.llm_files", file.name, source, file]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise PeerError(lines[-1] if lines else f"its model was not written (status {done.returncode})")
    return file


def open_contestant(entry: Entry, file: Path, arguments: argparse.Namespace) -> Contestant:
    """A process that holds its model. Raises PeerError where it cannot."""
    contestant = Contestant(entry.module, arguments.threads, arguments.peers_python)
    try:
        room = max(arguments.prefill, arguments.prompt + arguments.tokens) + 8
        contestant.ask("open", file=f"{file}{entry.more}", room=room)
        contestant.ask("prefill", tokens=arguments.prefill)
    except PeerError:
        contestant.close()
        raise
    return contestant


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds until the minutes are over; at least LEAST_ROUNDS."""
    running: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    entries = [
        e for e in ENTRIES if wanted(arguments, e.name) and (arguments.all or arguments.only or not e.on_request)
    ]
    for entry in entries:
        try:
            running[entry.name] = open_contestant(
                entry, make_file(entry, arguments.cache, arguments.peers_python), arguments
            )
        except PeerError as error:
            absent[entry.name] = str(error)
            say(f"{entry.name} is left out: {error}")
    versions = {name: number for one in running.values() for name, number in one.versions.items()}
    prefill: dict[str, list[float]] = {name: [] for name in running}
    decode: dict[str, list[float]] = {name: [] for name in running}
    beside: dict[str, list[float]] = {name: [] for name in running}
    tokens: dict[str, list[int]] = {}
    began = time.monotonic()
    for done in range(arguments.rounds):
        spent = time.monotonic() - began
        if done >= LEAST_ROUNDS and spent * (done + 1) / done > 60 * arguments.minutes:
            break
        for name, one in running.items():
            rest()
            prefill[name].append(arguments.prefill / one.ask("prefill", tokens=arguments.prefill))
            rest()
            found = one.ask("decode", prompt=arguments.prompt, tokens=arguments.tokens)
            decode[name].append(arguments.tokens / found["seconds"])
            tokens[name] = found["tokens"]
        with busy(arguments.busy):
            for name, one in running.items() if arguments.busy else ():
                found = one.ask("decode", prompt=arguments.prompt, tokens=BUSY_TOKENS)
                beside[name].append(BUSY_TOKENS / found["seconds"])
        say(f"round {done + 1} took {time.monotonic() - began - spent:.0f} s")
    results = {
        name: {
            "prefill": median(prefill[name]),
            "decode": median(decode[name]),
            "all_prefill": prefill[name],
            "all_decode": decode[name],
            "decode_beside": median(beside[name]) if beside[name] else None,
            **one.ask("memory"),
            "tokens": tokens[name][:16],
        }
        for name, one in running.items()
    }
    for one in running.values():
        one.close()
    keys = ("threads", "busy", "prefill", "prompt", "tokens")
    return {
        "settings": {key: getattr(arguments, key) for key in keys},
        "versions": versions,
        "absent": absent,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder of the models ({CACHE})")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt whose reading is measured")
    parser.add_argument("--prompt", type=int, default=8, help="tokens before those that are generated")
    parser.add_argument("--tokens", type=int, default=64, help="that are generated")
    parser.add_argument("--all", action="store_true", help="every contestant; more memory and time")
    parser.add_argument("--name", default="generate", help="of the files in benchmarks/results")
    add_options(parser, minutes=4.5)
    arguments = parser.parse_args()
    arguments.cache = arguments.cache.resolve()
    data = measure(arguments)
    write_results(arguments.name, data, report(data, machine_line()))


if __name__ == "__main__":
    main()
