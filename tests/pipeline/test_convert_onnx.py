"""ONNX files of whole models, as onnxruntime runs them: logits equal ours, without a past and with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import bitgrain
import zoo
from bitgrain.checkpoints.onnx.reader import OnnxFile
from bitgrain.errors import CheckpointError, PlanError, SchemeError
from bitgrain.pipeline import convert_onnx
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import QuantizedCheckpoint
from onnx_models import divergence, run, session

TOLERANCE = 1e-4  # of the outputs' spread

_traced: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's graph does not depend on its scheme."""
    trace = convert_onnx.trace_onnx

    def remembered(model: Any, past: Any) -> onnx.ModelProto:
        key = str(model.config.to_json_string())
        if key not in _traced:
            _traced[key] = trace(model, past).SerializeToString()
        proto = onnx.ModelProto()
        proto.ParseFromString(_traced[key])
        return proto

    monkeypatch.setattr(convert_onnx, "trace_onnx", remembered)


def expected(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return zoo.outputs(bitgrain.load(folder, execution="dequantize", kv_cache="none"), ids)


def first(found: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(next(iter(found.values())))


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("W4A16", "onnx-qdq"),
        ("W4A16", "onnx-nbits"),
        ("W4A16_ASYM", "onnx-qdq"),
        ("W4A16_ASYM", "onnx-nbits"),
        ("W4A16_CHANNEL", "onnx-nbits"),
        ("W8A16", "onnx-qdq"),
        ("W8A16", "onnx-nbits"),
        ("W3A16_ASYM", "onnx-qdq"),
        ("W2A16", "onnx-nbits"),
        ("FP8_DYNAMIC", "onnx-qdq"),
        ("FP8_BLOCK", "onnx-qdq"),
        ("W4A8", "onnx-qdq"),
    ],
)
def test_onnxruntime_gives_our_logits(scheme: str, form: str, tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "q", scheme)
    convert(tmp_path / "q", form, tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    ours, model = expected(tmp_path / "q", ids), session(tmp_path / "out")
    before = run(model, ids[:, :20])
    after = run(model, ids[:, 20:], before)
    theirs = torch.cat([first(before), first(after)], 1)
    assert (theirs - ours).abs().max() <= TOLERANCE * ours.std()
    assert (first(run(model, ids)) - theirs).abs().max() <= TOLERANCE * ours.std()

    stored, file = QuantizedCheckpoint(tmp_path / "q"), OnnxFile(tmp_path / "out" / "model.onnx")
    assert file.matrices.keys() == stored.layers.keys()
    for name in stored.layers:
        assert torch.equal(file.read(name).dequantize(), stored.quantized(name)[0].dequantize())


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "FP8"])
def test_quantized_inputs_round_as_ours(scheme: str, readable: Callable[..., Path], text: Path, tmp_path: Path):
    settings = {"calibration": {"text": str(text), "windows": 2, "seqlen": 32}}
    bitgrain.quantize(readable("llama"), tmp_path / "q", scheme, **({} if scheme == "W8A8" else settings))
    convert(tmp_path / "q", "onnx-qdq", tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, theirs = expected(tmp_path / "q", ids), first(run(session(tmp_path / "out"), ids))
    # an input that lies between two codes may round the other way, which one token then shows
    assert divergence(ours, theirs) <= 1e-4
    assert (ours - theirs).abs().median() <= 1e-4 * ours.std()


@pytest.mark.parametrize(("scheme", "form"), [("W4A16", "onnx-qdq"), ("W8A8", "onnx-qdq"), ("W4A16", "onnx-nbits")])
def test_the_reference_model_gives_our_logits(scheme: str, form: str, shared: Path, tmp_path: Path):
    bitgrain.quantize(shared / "models" / "llama", tmp_path / "q", scheme)
    convert(tmp_path / "q", form, tmp_path / "out")
    ids = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    ours, theirs = expected(tmp_path / "q", ids), first(run(session(tmp_path / "out"), ids))
    assert divergence(ours, theirs) <= 1e-4
    if scheme != "W8A8":
        assert (theirs - ours).abs().max() <= 1e-3 * ours.std()


def test_an_encoder_gives_our_hidden_states(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("bert"), tmp_path / "q", "W4A16")
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = expected(tmp_path / "q", ids)
    for form in ("onnx-qdq", "onnx-nbits"):
        result = convert(tmp_path / "q", form, tmp_path / form)
        assert "pooler.dense.weight" not in result.layers
        found = run(session(tmp_path / form), ids)
        assert list(found) == ["last_hidden_state"]
        assert (first(found) - ours).abs().max() <= TOLERANCE * ours.std()


def test_kept_matrices_stay_in_their_dtype(tmp_path: Path):
    zoo.save("llama-tied", tmp_path / "model", torch.bfloat16)
    bitgrain.quantize(tmp_path / "model", tmp_path / "q", "W4A16")
    result = convert(tmp_path / "q", "onnx-nbits", tmp_path / "out")
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    kinds = {one.name: one.data_type for one in proto.graph.initializer}
    assert kinds["model.embed_tokens.weight"] == onnx.TensorProto.BFLOAT16
    assert "lm_head.weight" not in kinds
    assert result.nbytes == sum((tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = zoo.outputs(bitgrain.load(tmp_path / "q", execution="dequantize", dtype=torch.float32), ids)
    theirs = first(run(session(tmp_path / "out"), ids))
    assert divergence(ours, theirs) <= 1e-4  # ours rounds the weights to bfloat16 first


def test_a_gguf_file_goes_to_onnx_as_well(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "q", "W4A16", layout="gptq-v2")
    convert(tmp_path / "q", "gguf", tmp_path / "q.gguf")
    result = convert(tmp_path / "q.gguf", "onnx-nbits", tmp_path / "out")
    assert result.layers
    assert result.tracing_s > 0
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = expected(tmp_path / "q.gguf", ids), first(run(session(tmp_path / "out"), ids))
    assert (theirs - ours).abs().max() <= TOLERANCE * ours.std()


def test_a_model_that_is_not_quantized_is_refused(tiny: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(tiny("llama"), "onnx-nbits", tmp_path / "out")


def test_what_onnx_cannot_say_is_refused_with_the_layer(tiny: Callable[[str], Path], tmp_path: Path):
    cases = {"NF4": "no nf4", "NVFP4A16": "no fp4_e2m1", "LLM_INT8": "have no ONNX form"}
    for scheme, reason in cases.items():
        bitgrain.quantize(tiny("llama"), tmp_path / scheme, scheme)
        with pytest.raises(PlanError, match=rf"model\.layers\.0\.mlp\.down_proj.*{reason}"):
            convert(tmp_path / scheme, "onnx-qdq", tmp_path / "out")
    bitgrain.quantize(tiny("llama"), tmp_path / "w8a8", "W8A8")
    with pytest.raises(PlanError, match="onnx-qdq can quantize them"):
        convert(tmp_path / "w8a8", "onnx-nbits", tmp_path / "out")
    with pytest.raises(PlanError, match="in one file"):
        convert(tmp_path / "w8a8", "onnx-qdq", tmp_path / "out", max_shard_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_without_the_packages_the_remedy_is_said(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bitgrain.quantize(tiny("llama"), tmp_path / "q", "W4A16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SchemeError, match=r"pip install 'bitgrain\[onnx\]'"):
        convert(tmp_path / "q", "onnx-qdq", tmp_path / "out")
