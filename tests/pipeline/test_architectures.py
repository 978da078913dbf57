"""Every architecture of the zoo: what is written, and that a reader gets every parameter back, none left at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import bitgrain
import zoo
from bitgrain.numerics import quantize
from bitgrain.pipeline.layers import matrices
from bitgrain.pipeline.quantize import QuantizeResult
from bitgrain.pipeline.stored import QuantizedCheckpoint

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]
MOE = ("mixtral", "qwen3-moe", "gpt-oss")


def dense_twin(source: Path, folder: Path, result: QuantizeResult) -> Any:
    """The original with every quantized tensor replaced by what `numerics.quantize` makes of it, in transformers."""
    folder.mkdir()
    tensors = zoo.read_tensors(source)
    for name, layer in result.plan.quantized.items():
        parts = [quantize(m, layer.scheme.weight).dequantize(layer.dtype) for m in matrices(tensors[name], layer)]
        parts = [part.T if layer.transposed else part for part in parts]
        tensors[name] = (torch.stack(parts) if layer.experts > 1 else parts[0]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    model_class = getattr(transformers, zoo.ZOO[source.name][0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, scheme) for name in zoo.ZOO for scheme in ("W4A16", "W8A8")), ("opt", "FP8_DYNAMIC")]
)
def test_what_is_loaded_is_what_was_meant(tiny: Tiny, tmp_path: Path, name: str, scheme: str):
    source, out = tiny(name), tmp_path / "out"
    result = bitgrain.quantize(source, out, scheme, workers=1)
    loaded: Any = bitgrain.load(out, device="cpu", execution="dequantize")
    twin = dense_twin(source, tmp_path / "twin", result)
    assert type(loaded) is type(twin)
    mine, expected = loaded.state_dict(), twin.state_dict()
    assert mine.keys() == expected.keys()
    assert [key for key in mine if not torch.equal(mine[key], expected[key])] == []
    assert loaded.all_tied_weights_keys == twin.all_tied_weights_keys
    assert not loaded.training

    ids = zoo.ids_for(twin)
    if scheme == "W4A16":
        assert torch.allclose(zoo.outputs(loaded, ids), zoo.outputs(twin, ids), atol=1e-5)
    else:
        assert not torch.allclose(zoo.outputs(loaded, ids), zoo.outputs(twin, ids), atol=1e-5)  # inputs are rounded
        quantizers = {key for key, module in loaded.named_modules() if type(module).__name__ == "InputQuantizer"}
        assert quantizers
        assert not any("lm_head" in key or "embed" in key or "router" in key for key in quantizers)

    verdict = next(v for v in result.plan.engines if v.engine == "transformers")
    if verdict.loads:
        theirs: Any = getattr(transformers, zoo.ZOO[name][0]).from_pretrained(out).eval()
        same = zoo.outputs(bitgrain.load(out, device="cpu", rounding="transformers", execution="dequantize"), ids)
        assert float((zoo.outputs(theirs, ids) - same).abs().max()) <= 1e-4
    checks = bitgrain.verify(out, against=source)
    if verdict.loads or result.plan.layout.name == "bitgrain":
        assert not [check for check in checks if check.ok is False]
        assert sum(check.ok is True for check in checks) >= 2


@pytest.mark.parametrize("name", zoo.ZOO)
def test_names_on_disk_are_the_originals(tiny: Tiny, tmp_path: Path, name: str):
    out = tmp_path / "out"
    result = bitgrain.quantize(tiny(name), out, "W4A16", workers=1)
    before, after = zoo.read_tensors(tiny(name)), zoo.read_tensors(out)
    quantized = set(result.plan.quantized)
    assert quantized
    for tensor in before.keys() - quantized:
        assert torch.equal(before[tensor], after[tensor])
    modules = {tensor.removesuffix(".weight") for tensor in quantized}
    for tensor in after.keys() - before.keys():
        assert tensor.rpartition(".")[0].removesuffix(".weight") in modules
    stored = QuantizedCheckpoint(out)
    assert {key: (shape.shape, shape.dtype) for key, shape in stored.originals().items()} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in before.items()
    }
    assert sorted(stored.kept()) == sorted(before.keys() - quantized)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4"])
def test_experts_are_quantized_and_routers_kept(tiny: Tiny, tmp_path: Path, name: str, scheme: str):
    result = bitgrain.quantize(tiny(name), tmp_path / "out", scheme, workers=1)
    anatomy = result.plan.anatomy
    quantized = result.plan.quantized
    in_blocks = sum(layer.elements for t, layer in quantized.items() if anatomy.block_of[t] is not None)
    assert in_blocks >= 0.9 * anatomy.parameters.in_blocks
    roles = {weight.tensor: weight.role for weight in anatomy.weights}
    assert {role for tensor, role in roles.items() if tensor in quantized} == {"linear", "expert"}
    routers = [tensor for tensor, role in roles.items() if role == "router"]
    assert len(routers) == 2
    after = zoo.read_tensors(tmp_path / "out")
    for router in routers:
        assert torch.equal(after[router], zoo.read_tensors(tiny(name))[router])


def test_nvfp4_experts_join_under_one_scale(tiny: Tiny, tmp_path: Path):
    """vLLM joins w1 and w3 of an expert, and q, k and v: their shared scales must be equal."""
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", "NVFP4", workers=2)
    after = zoo.read_tensors(tmp_path / "out")
    scales = {name.removesuffix(".weight_global_scale"): float(t) for name, t in after.items() if "global" in name}
    experts = [name for name in scales if name.endswith(".w1")]
    assert len(experts) == 8
    for name in experts:
        assert scales[name] == scales[f"{name[:-1]}3"]
    for block in (0, 1):
        attention = f"model.layers.{block}.self_attn"
        assert len({scales[f"{attention}.{part}_proj"] for part in "qkv"}) == 1


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_in_memory_equals_disk(tiny: Tiny, tmp_path: Path, name: str, scheme: str):
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme, workers=1)
    loaded: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    memory: Any = bitgrain.load(tiny(name), device="cpu")
    if scheme in ("W8A8", "FP8_DYNAMIC"):
        from bitgrain.pipeline.load import experts_run_one_by_one

        experts_run_one_by_one(memory.config)
    bitgrain.quantize_(memory, scheme)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), memory.parameters(), strict=True))
    ids = zoo.ids_for(loaded)
    assert torch.allclose(zoo.outputs(loaded, ids), zoo.outputs(memory, ids), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "MXFP4"])
def test_sixteen_bit_checkpoints(tmp_path: Path, dtype: torch.dtype, scheme: str):
    source = zoo.save("llama", tmp_path / "llama", dtype)
    result = bitgrain.quantize(source, tmp_path / "out", scheme, workers=1)
    loaded: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    assert loaded.dtype == dtype
    twin = dense_twin(source, tmp_path / "twin", result)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), twin.parameters(), strict=True))
    scales = {n: t.dtype for n, t in zoo.read_tensors(tmp_path / "out").items() if n.endswith("weight_scale")}
    assert set(scales.values()) == {torch.uint8 if scheme == "MXFP4" else dtype}
    assert (
        bitgrain.load(tmp_path / "out", device="cpu", dtype=torch.float32, execution="dequantize").dtype
        == torch.float32
    )  # type: ignore[attr-defined]
