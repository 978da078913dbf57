"""Hostile files for every reader: `make fuzz ARGS="--seconds 600 --only gguf"`.

A valid checkpoint of each layout is damaged at random, over and over: bits flipped, parts cut, doubled and moved,
numbers in JSON and binary headers replaced by telling ones, names by paths out of the folder. Each is opened and every
tensor read and dequantized, in a child process whose memory is limited to what it had plus twice the size of the files
(and a fixed slack for Python itself), with a limit on time, and with every file that it opens watched. A reader passes
if each either is read or raises a BitgrainError; anything else is kept as a file, and ends the run with status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bitgrain
from bitgrain.checkpoints.layouts import WRITABLE
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.checkpoints.onnx.reader import OnnxFile
from bitgrain.errors import BitgrainError
from bitgrain.pipeline.stored import open_stored

SLACK = 96 << 20
"""Bytes that Python, torch and their pools take whatever the file holds."""
SECONDS_EACH = 30
TELLING = (0, 1, -1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**64 - 1)
WORDS = (
    "",
    "../../../../etc/passwd",
    "/etc/passwd",
    "BF16",
    "F64",
    "I4",
    "U8",
    "model.safetensors",
    "\0",
    "x" * 5000,
)
SOURCES = ("W4A16", "W8A16", "W4A16_ASYM", "NF4_BNB", "FP4_BNB", "NF4", "MXFP4A16", "W8A8", "NVFP4A16", "W8A16INT16")
"""Schemes that some layout may hold: the first that it does is its seed."""


def read_everything(path: Path) -> None:
    """What an untrusted checkpoint goes through: opened, every tensor read, every quantized one dequantized."""
    if (path / "model.onnx").exists():
        file = OnnxFile(path / "model.onnx")
        for name in file.matrices:
            file.read(name).dequantize()
        file.kept()
        return
    stored = open_stored(next(path.glob("*.gguf"), path))
    for name in stored.originals():
        stored.dense(name)
    stored.static_inputs()
    stored.columns()


def make_seeds(where: Path) -> dict[str, Path]:
    """A small valid checkpoint in each layout, by its name."""
    model = where / "model"
    _tiny_model(model)
    made: dict[str, Path] = {}
    for scheme in SOURCES:
        source = where / f"source-{scheme}"
        bitgrain.quantize(model, source, scheme)
        for name in WRITABLE:
            if name in made:
                continue
            try:
                bitgrain.quantize(model, where / name, scheme, layout=name)
            except BitgrainError:
                shutil.rmtree(where / name, ignore_errors=True)
                continue
            made[name] = where / name
    source = where / "source-W4A16"
    (where / "gguf").mkdir()
    bitgrain.convert(source, "gguf", where / "gguf" / "model.gguf")
    for form in FORMS:
        bitgrain.convert(source, form, where / form)
    return made | {name: where / name for name in ("gguf", *FORMS)} | _torchao_seeds(model, where)


def _torchao_seeds(model: Path, where: Path) -> dict[str, Path]:
    """What transformers writes with torchao, which bitgrain only reads; nothing where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    configs = {
        "torchao-float8": Float8WeightOnlyConfig(),
        "torchao-int8": Int8DynamicActivationInt8WeightConfig(),
        "torchao-intx": IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }
    for name, config in configs.items():
        how = TorchAoConfig(config)
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=how)
        made.save_pretrained(where / name)
    return {name: where / name for name in configs}


def _tiny_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.float16).save_pretrained(folder)


def damage(folder: Path, rng: random.Random) -> None:
    """One to four damages to the files in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES)
    for _ in range(rng.randint(1, 4)):
        path = rng.choice(files)
        data = path.read_bytes()
        if path.suffix == ".json":
            path.write_bytes(_damage_json(data, rng))
        elif path.suffix == ".safetensors" and rng.random() < 0.7:
            path.write_bytes(_damage_header(data, rng))
        else:
            path.write_bytes(_damage_bytes(data, rng))


SUFFIXES = (".json", ".safetensors", ".gguf", ".onnx", ".data")


def _damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose JSON header lies; its length is told as it is, or not."""
    size = int.from_bytes(data[:8], "little")
    header = _damage_json(data[8 : 8 + size], rng)
    told = len(header) if rng.random() < 0.9 else rng.choice(TELLING) & (2**64 - 1)
    return told.to_bytes(8, "little") + header + data[8 + size :]


def _damage_json(data: bytes, rng: random.Random) -> bytes:
    try:
        tree = json.loads(data)
    except ValueError:
        return _damage_bytes(data, rng)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key))
            walk(value)

    walk(tree)
    if not places or rng.random() < 0.1:
        return _damage_bytes(data, rng)
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        parent[key] = rng.choice(TELLING)
    elif kind == 1:
        parent[key] = rng.choice(WORDS)
    elif kind == 2:
        parent[key] = rng.choice([None, True, [], {}, [1], {"a": 1}, 1e308, [[[]]], [2**62, 2**62]])
    elif kind == 3:
        del parent[key]
    elif kind == 4 and isinstance(parent, dict):
        parent[rng.choice(WORDS)] = parent.pop(key)
    else:
        other, name = rng.choice(places)
        parent[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else None))
    return json.dumps(tree).encode()


def _damage_bytes(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    if not raw:
        return bytes(raw)
    start = rng.randrange(min(len(raw), rng.choice([64, 1024, len(raw)])))
    kind = rng.randrange(5)
    if kind == 0:
        raw[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        width = rng.choice([1, 2, 4, 8])
        raw[start : start + width] = (rng.choice(TELLING) & (2 ** (8 * width) - 1)).to_bytes(width, "little")
    elif kind == 2:
        del raw[start : start + rng.choice([1, 8, 1000, len(raw)])]
    elif kind == 3:
        raw[start:start] = raw[start : start + rng.choice([1, 8, 64])]
    else:
        raw[start : start + 16] = rng.randbytes(16)
    return bytes(raw)


def attempt(folder: Path, read: Callable[[Path], None]) -> str:
    """What became of one damaged checkpoint: "read", the name of a BitgrainError, or "FAILED: why"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, _in_child(folder, read).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "FAILED: took too long" if name == "SIGALRM" else f"FAILED: {name}"
    return told


def _in_child(folder: Path, read: Callable[[Path], None]) -> str:
    outside: list[str] = []
    allowed = (str(folder), sys.prefix, sys.base_prefix, str(Path(bitgrain.__file__).parents[1]), "/proc/", "/sys/")

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and not os.path.abspath(args[0]).startswith(allowed):
            outside.append(args[0])

    sys.addaudithook(watch)
    size = sum(path.stat().st_size for path in folder.iterdir())
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + 2 * size + SLACK,) * 2)
    signal.alarm(SECONDS_EACH)
    torch.set_num_threads(1)
    try:
        read(folder)
        told = "read"
    except BitgrainError as error:
        told = type(error).__name__
    except BaseException:  # noqa: BLE001 (whatever comes out is the finding)
        told = f"FAILED: {traceback.format_exc(limit=-6)}"
    return f"FAILED: opened {outside[0]}" if outside else told


def fuzz(name: str, seed_folder: Path, seconds: float, seed: int, keep: Path) -> tuple[Counter[str], list[str]]:
    """Damage and read for `seconds`; what became of them, and the failures (whose files are kept)."""
    rng, counts, failures = random.Random(f"{seed} {name}"), Counter[str](), []
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() < until and len(failures) < 20:
            folder = Path(scratch) / "x"
            shutil.copytree(seed_folder, folder)
            damage(folder, rng)
            told = attempt(folder, read_everything)
            counts[told.split(":")[0]] += 1
            if told.startswith("FAILED"):
                failures.append(told)
                shutil.copytree(folder, keep / f"{name}-{len(failures)}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for each reader (default: 600)")
    parser.add_argument("--only", action="append", help="a reader; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where files that broke a reader go")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        seeds = make_seeds(Path(scratch))
        for name, folder in seeds.items():
            if args.only and name not in args.only:
                continue
            counts, failures = fuzz(name, folder, args.seconds, args.seed, args.keep)
            told = ", ".join(f"{count} {what}" for what, count in counts.most_common())
            print(f"{name}: {sum(counts.values())} files: {told}", flush=True)
            for failure in failures:
                print(f"  {failure}", flush=True)
            status |= bool(failures)
    return status


if __name__ == "__main__":
    sys.exit(main())
