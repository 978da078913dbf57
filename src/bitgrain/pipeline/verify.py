"""Does the written folder hold what we meant? Asked of readers that are not ours.

1. Every file has the size and hash that the manifest says.
2. Every quantized layer, read by safetensors and decoded by compressed-tensors, equals what bitgrain decodes; every
   kept tensor equals the original's bytes (with the original at hand), but those that transforms or tuning changed.
3. transformers loads the folder, and its logits equal those of `bitgrain.load`. It passes over scales of keys and
   values, which vLLM reads, so both run with keys and values as they are; the scales are looked at by themselves.

With `readers`, engines are asked for logits of any layout that they read. Last it tells, unchecked, what the engines'
rules say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.errors import CheckpointError
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.checks import Check
from bitgrain.pipeline.engines import judge_stored
from bitgrain.pipeline.foreign_check import check_logits, random_ids
from bitgrain.pipeline.load import load
from bitgrain.pipeline.output_files import MANIFEST
from bitgrain.pipeline.readers.registry import get_reader
from bitgrain.pipeline.readers.transformers_reader import quiet
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.pipeline.verify_files import verify_gguf, verify_onnx
from bitgrain.runtime.device import resolve_device

LOGIT_TOLERANCE = 1e-4
"""Largest difference of float32 logits between the two readers; in 16-bit models, relative to the logits' spread."""


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    readers: Sequence[str] = (),
    device: str = "auto",
    trust_remote_code: bool = False,
) -> list[Check]:
    """Check a folder or file that bitgrain wrote.

    against  the original model, for the tensors that were kept; for ONNX, the checkpoint that it was made of
    readers  engines whose logits are compared with ours (`pipeline.readers`); without any, transformers is asked about
             compressed-tensors
    Raises CheckpointError if it is no quantized checkpoint, SchemeError for an unknown reader; everything else that is
    wrong is a failed Check.
    """
    wanted = [get_reader(name) for name in readers]
    if (Path(out) / "model.onnx").is_file():
        return verify_onnx(Path(out), None if against is None else resolve_model(against).path, wanted)
    source = resolve_model(out, gguf=True)
    if source.path.is_file():
        return verify_gguf(source.path, wanted)
    stored = QuantizedCheckpoint(source.path)
    checks = [_check_files(source.path)]
    foreign = stored.layout.name == "compressed-tensors"
    if foreign:
        checks.append(_check_layers(stored))
    else:
        own = stored.layout.name == "bitgrain"
        untold = "no other library reads quant_method bitgrain" if own else f"{stored.layout.name} is not checked here"
        checks.append(Check("layers", None, untold))
    if stored.config.get("kv_cache_scheme"):
        checks.append(_check_cache(stored, trust_remote_code))
    if against is not None:
        checks.append(_check_kept(stored, resolve_model(against).path))
    kind = stored.layout.name
    checks += [check_logits(source.path, kind, reader, source.path, trust_remote_code) for reader in wanted]
    if foreign and not wanted:
        refusal = _known_refusal(source.path)
        if refusal is None:
            checks.append(_check_logits(source.path, stored, device, trust_remote_code))
        else:
            checks.append(Check("logits", None, f"transformers, as the plan said: {refusal}"))
    checks.append(_engines(stored))
    return checks


def _engines(stored: QuantizedCheckpoint) -> Check:
    """What the engines' rules say: nothing that was run."""
    kept = {name: stored.checkpoint.entries[name].shape for name in stored.kept()}
    verdicts = judge_stored(list(stored.layers.values()), kept, stored.layout.name)
    told = [
        f"{verdict.title} {'loads it' if verdict.loads else 'does not load it'}"
        + (f" ({'; '.join(verdict.reasons[:2])})" if verdict.reasons else "")
        for verdict in verdicts
    ]
    return Check("engines", None, f"by their rules: {', '.join(told)}")


def _known_refusal(folder: Path) -> str | None:
    """Why transformers cannot load this checkpoint, if that was known when it was written."""
    try:
        engines = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["engines"]
        verdict = next(one for one in engines if one["engine"] == "transformers")
        return None if verdict["loads"] else "; ".join(verdict["reasons"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None  # not written by us, or damaged, which is another check's business


def _check_files(folder: Path) -> Check:
    path = folder / MANIFEST
    if not path.is_file():
        return Check("files", None, f"no {MANIFEST}: the folder was not written by bitgrain")
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError) as error:
        return Check("files", False, f"{MANIFEST} is damaged: {error}")
    wrong: list[str] = []
    for name, expected in files.items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
            continue
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                wrong.append(f"{name} has changed")
    return Check("files", not wrong, "; ".join(wrong) or f"{len(files)} files have their sha256")


def _check_layers(stored: QuantizedCheckpoint) -> Check:
    """Each quantized layer through the compressed-tensors library, from tensors read by the safetensors library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    plain = {key: value for key, value in stored.config.items() if key not in ("version", "dequantize")}
    groups = list(QuantizationConfig.model_validate(plain).config_groups.values())
    keys = list(stored.config["config_groups"])
    worst, where = 0.0, ""
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            file = stored.checkpoint.entries[name].file
            if file not in files:
                files[file] = stack.enter_context(safe_open(stored.path / file, "pt"))
            return files[file].get_tensor(name)

        for layer in stored.layers.values():
            group: Any = groups[keys.index(layer.scheme.name)]
            local = {
                spec.name.removeprefix(f"{layer.module}."): read(spec.name) for spec in stored.layout.tensors(layer)
            }
            compressor: Any = BaseCompressor.get_value_from_registry(group.format)
            dense: Tensor = compressor.decompress(local, group)["weight"]
            ours = stored.dense(layer.tensor).float()
            error = float((dense.float() - ours).abs().max()) if dense.shape == ours.shape else float("inf")
            if not error <= worst:
                worst, where = error, layer.tensor
    detail = f"{len(stored.layers)} layers as compressed-tensors decodes them, largest difference {worst:.3g} {where}"
    return Check("layers", worst == 0.0, detail.strip())


def _check_cache(stored: QuantizedCheckpoint, trust_remote_code: bool) -> Check:
    """Static scales of keys and values: the scheme as compressed-tensors reads it, sound numbers for all layers."""
    from compressed_tensors.quantization import QuantizationArgs

    name = "kv cache"
    try:
        args = QuantizationArgs.model_validate(stored.config["kv_cache_scheme"])
        scheme = stored.cache(trust_remote_code)
    except (ValueError, CheckpointError) as error:
        return Check(name, False, str(error).splitlines()[0])
    scales = [scale for layer in (scheme.scales if scheme else ()) for scale in layer or ()]
    sound = bool(scales) and all(0 < scale < float("inf") for scale in scales)
    kind = f"{args.type}{args.num_bits} per {args.strategy}"
    return Check(name, sound, f"{len(scales)} scales of keys and values, {kind}; transformers passes over them")


def _check_kept(stored: QuantizedCheckpoint, original: Path) -> Check:
    before = open_checkpoint(original)
    kept, changed = stored.kept(), _changed(stored.path)
    wrong = [
        name
        for name in kept
        if name not in before.entries or not _is_kept(before.read(name), stored.checkpoint.read(name), name in changed)
    ]
    lost = [name for name in before.entries if name not in kept and name not in stored.layers]
    problems = [f"{name} differs from the original" for name in wrong] + [f"{name} is lost" for name in lost]
    same = f"{len(set(kept) - changed)} tensors are the original's bytes"
    more = f", {len(changed)} were changed by transforms or tuning" if changed else ""
    return Check("kept tensors", not problems, "; ".join(problems[:5]) or same + more)


def _changed(folder: Path) -> set[str]:
    """Tensors that the job gave other values, as its manifest tells."""
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("changed", ()))
    except (OSError, ValueError, AttributeError, TypeError):
        return set()


def _is_kept(before: Tensor, after: Tensor, changed: bool) -> bool:
    if changed:
        fits = before.shape == after.shape and before.dtype == after.dtype
        return fits and bool(torch.isfinite(after.float()).all().item())
    return torch.equal(_bytes(before), _bytes(after))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_logits(folder: Path, stored: QuantizedCheckpoint, device: str, trust_remote_code: bool) -> Check:
    name = "logits"
    config = load_config(resolve_model(folder), trust_remote_code, drop_quantization=True)
    model_class: Any = type(build_skeleton(config, trust_remote_code))
    where = resolve_device(device)
    ids = random_ids(config)
    if ids is None:
        return Check(name, None, "a model that reads no tokens is not run")
    ids = ids.to(where)
    try:
        with quiet(), torch.inference_mode():
            theirs = model_class.from_pretrained(folder, trust_remote_code=trust_remote_code).to(where).eval()
            a = _output(theirs, ids)  # some layers are decompressed at the first forward
    except (RuntimeError, ValueError, ImportError, KeyError, AttributeError) as error:
        return Check(name, False, f"transformers does not load it: {str(error).splitlines()[0]}")
    settings: dict[str, Any] = {"device": str(where), "trust_remote_code": trust_remote_code}
    ours = load(folder, rounding="transformers", kv_cache="none", execution="dequantize", **settings)
    with quiet(), torch.inference_mode():
        b = _output(ours, ids)
    difference = float((a - b).abs().max())
    scale = 1.0 if a.dtype == torch.float32 and config.dtype in (None, torch.float32) else float(b.std())
    experts = any(".experts." in f".{layer.module}." for layer in stored.layers.values())
    inputs = any(layer.scheme.input is not None for layer in stored.layers.values())
    detail = f"transformers {type(theirs).__name__}, largest difference {difference:.3g} on {ids.numel()} random tokens"
    if experts and inputs:
        return Check(
            name, None, detail + "; transformers does not quantize the inputs of experts, so they are not compared"
        )
    return Check(name, difference <= LOGIT_TOLERANCE * scale, detail)


def _output(model: nn.Module, ids: Tensor) -> Tensor:
    result = model(input_ids=ids)
    logits = getattr(result, "logits", None)
    return (result.last_hidden_state if logits is None else logits).float()
