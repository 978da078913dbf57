"""Static scales of keys and values through a whole job: planned to the byte, written, loaded, measured, refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import bitgrain
import zoo
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.recipes.kv_cache import read_cache
from bitgrain.runtime.kv_cache import KVCache, past_argument
from calibrated_jobs import recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]


@torch.no_grad()
def largest(model: torch.nn.Module, ids: torch.Tensor) -> list[tuple[float, float]]:
    """Largest |key| and |value| of each layer, by a plain cache of transformers."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, use_cache=True, **{past_argument(model): cache})
    return [(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in cache.layers]


@pytest.mark.parametrize(("name", "scheme"), [("llama", "W8A8"), ("gemma", "W4A16"), ("mixtral", "LLM_INT8")])
def test_scales_reach_as_far_as_the_quantized_model(readable: Make, text: Path, tmp_path: Path, name: str, scheme: str):
    made = bitgrain.plan(readable(name), recipe=recipe_of("fast", text, scheme, kv_cache="fp8"))
    result = run(readable(name), tmp_path / "out", made.recipe)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors*"))
    assert written == result.plan.bytes_after
    tensors = zoo.read_tensors(tmp_path / "out")
    scales = {name: value for name, value in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4
    assert all(value.shape == (1,) for value in scales.values())
    assert result.manifest["kv_cache"]["scales"] == {name: float(value) for name, value in scales.items()}
    model = bitgrain.load(tmp_path / "out", device="cpu", kv_cache="none", execution="dequantize")
    assert made.calibration is not None
    for layer, (key, value) in enumerate(largest(model, made.calibration.ids)):
        prefix = f"model.layers.{layer}.self_attn"
        torch.testing.assert_close(float(scales[f"{prefix}.k_scale"]) * 448, key, rtol=1e-4, atol=0)
        torch.testing.assert_close(float(scales[f"{prefix}.v_scale"]) * 448, value, rtol=1e-4, atol=0)


def test_compressed_tensors_reads_the_scheme_and_transformers_the_rest(readable: Make, text: Path, tmp_path: Path):
    run(readable("llama"), tmp_path / "out", recipe_of("fast", text, "W8A8", kv_cache="fp8"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plain = {key: value for key, value in config.items() if key != "version"}
    args = QuantizationConfig.model_validate(plain).kv_cache_scheme
    assert args is not None
    assert (args.num_bits, args.type, args.strategy, args.dynamic) == (8, "float", "tensor", False)
    checks = {check.name: check for check in bitgrain.verify(tmp_path / "out", against=readable("llama"))}
    assert checks.pop("engines").ok is None  # rules, which nothing checks
    assert {check.ok for check in checks.values()} == {True}
    assert "4 scales" in checks["kv cache"].detail
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


def test_load_and_eval_use_them(readable: Make, text: Path, tmp_path: Path):
    run(readable("llama"), tmp_path / "out", recipe_of("fast", text, "W8A16", kv_cache="fp8"))
    model = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    ids = zoo.ids_for(model)
    found = getattr(model(input_ids=ids), past_argument(model))
    assert isinstance(found, KVCache)
    stored = zoo.read_tensors(tmp_path / "out")
    assert found.scheme.scales[1] == (
        float(stored["model.layers.1.self_attn.k_scale"]),
        float(stored["model.layers.1.self_attn.v_scale"]),
    )
    assert found.layers[1].held_keys.scale == stored["model.layers.1.self_attn.k_scale"]
    kwargs = {"text": text, "seqlen": 24, "windows": 2, "against": readable("llama")}
    own, named, plain, other = (
        bitgrain.evaluate(tmp_path / "out", kv_cache=name, **kwargs) for name in (None, "fp8", "none", "int8")
    )
    assert own.kl == named.kl
    assert len({own.kl, plain.kl, other.kl}) == 3


def test_any_number_of_workers_gives_the_same_bytes(readable: Make, text: Path, tmp_path: Path):
    recipe = recipe_of("balanced", text, "W4A16", kv_cache={"name": "fp8", "range": "mse"}, solver="gptq")
    for workers in (1, 3):
        run(readable("llama"), tmp_path / str(workers), recipe, workers)
    assert zoo.contents(tmp_path / "1") == zoo.contents(tmp_path / "3")


def test_what_cannot_be(readable: Make, text: Path, tmp_path: Path):
    def problems(name: str, cache: str) -> str:
        recipe = recipe_of("fast", text, "W8A8", solver="rtn", kv_cache=cache)
        return " ".join(bitgrain.plan(readable(name), recipe=recipe).problems)

    assert "chooses its scales at run time" in problems("llama", "int8")
    assert "keeps no keys and values" in problems("bert", "fp8")
    with pytest.raises(bitgrain.BitgrainError, match="no setting 'bits'"):
        recipe_of("fast", text, kv_cache={"name": "fp8", "bits": 8})
    with pytest.raises(bitgrain.BitgrainError, match="unknown KV cache scheme 'fp9'"):
        recipe_of("fast", text, kv_cache="fp9")
    with pytest.raises(SchemeError, match="no moving average"):
        read_cache({"name": "fp8", "range": "moving_average"})
    run(readable("llama"), tmp_path / "out", recipe_of("fast", text, "W8A16", kv_cache="fp8"))
    name = "model__layers__0__self_attn__k_scale"
    broken = zoo.edited(tmp_path / "out", tmp_path / "broken", **{name: None})
    (broken / "manifest.json").unlink()
    for path in broken.glob("*.safetensors"):
        if path.name != "model.safetensors":
            path.unlink()
    (broken / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_scale is missing"):
        bitgrain.load(broken, device="cpu", execution="dequantize")


def test_statistics_hold_no_keys_and_values(readable: Make, text: Path, tmp_path: Path):
    calibration = {"text": str(text), "windows": 3, "seqlen": 24}
    bitgrain.calibrate(readable("llama"), tmp_path / "stats", calibration=calibration)
    made = bitgrain.plan(readable("llama"), "W8A8", statistics=tmp_path / "stats", kv_cache="fp8")
    assert any("kv_cache in the recipe: needs activations" in problem for problem in made.problems)
