"""Bad input: one clear error, and nothing left behind that looks whole or that no run could resume."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bitgrain
import zoo
from bitgrain.errors import (
    BitgrainError,
    CheckpointError,
    ModelError,
    NumericsError,
    OutputError,
    PlanError,
    RecipeError,
    TextError,
)
from bitgrain.pipeline import planning

Tiny = Callable[[str], Path]
Q = "model__layers__0__self_attn__q_proj__weight"


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A llama that may be spoilt."""
    return zoo.edited(tiny("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    zoo.build("llama").save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def refused(model: str | Path, kind: type[BitgrainError], words: str, out: Path, *args: Any, **more: Any) -> str:
    """The job fails with one error of `kind` that says `words`, and leaves nothing beside the model."""
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(kind) as caught:
        bitgrain.quantize(model, out, *(args or ("W4A16",)), **{"workers": 1, **more})
    text = str(caught.value)
    assert type(caught.value) is kind
    assert words in text, text
    assert text.strip()
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return text


def test_no_such_folder(tmp_path: Path):
    refused(tmp_path / "none", ModelError, "does not exist", tmp_path / "out")


def test_missing_shard(sharded: Path, tmp_path: Path):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, CheckpointError, victim.name, tmp_path / "out")


def test_truncated_shard(sharded: Path, tmp_path: Path):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(sharded, CheckpointError, victim.name, tmp_path / "out")


def test_corrupt_header(copy: Path, tmp_path: Path):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[8] ^= 0xFF
    (copy / "model.safetensors").write_bytes(data)
    refused(copy, CheckpointError, "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/x.safetensors"])
def test_index_that_points_outside(sharded: Path, tmp_path: Path, escape: str):
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = escape
    index.write_text(json.dumps(table))
    refused(sharded, CheckpointError, escape, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "index"), [(Q, (5, 7)), ("model__norm__weight", (3,)), ("model__embed_tokens__weight", (1, 1))]
)
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_nan_is_found_in_quantized_and_in_kept_tensors(
    tiny: Tiny, tmp_path: Path, tensor: str, index: tuple[int, ...], bad: float, scheme: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(planning, "_UNIT_BYTES", 50_000)
    name = tensor.replace("__", ".")
    spoilt = zoo.read_tensors(tiny("llama"))[name].clone()
    spoilt[index] = bad
    model = zoo.edited(tiny("llama"), tmp_path / "model", **{tensor: spoilt})
    text = refused(model, NumericsError, name, tmp_path / "out", scheme)
    assert "1 NaN" in text or "1 Inf" in text


def test_nan_in_an_expert_names_the_expert(tiny: Tiny, tmp_path: Path):
    name = "model.layers.1.mlp.experts.down_proj"
    spoilt = zoo.read_tensors(tiny("gpt-oss"))[name].clone()
    spoilt[2, 0, 0] = float("nan")
    model = zoo.edited(tiny("gpt-oss"), tmp_path / "model", **{name.replace(".", "__"): spoilt})
    refused(model, NumericsError, f"{name}[2]", tmp_path / "out")


def test_after_nan_is_repaired_the_same_command_works(tiny: Tiny, tmp_path: Path):
    spoilt = zoo.read_tensors(tiny("llama"))["model.norm.weight"].clone()
    spoilt[0] = float("nan")
    model = zoo.edited(tiny("llama"), tmp_path / "model", model__norm__weight=spoilt)
    refused(model, NumericsError, "model.norm.weight", tmp_path / "out")
    save_file(zoo.read_tensors(tiny("llama")), model / "model.safetensors", metadata={"format": "pt"})
    bitgrain.quantize(model, tmp_path / "out", "W4A16", workers=1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_scales_that_float16_cannot_hold(tmp_path: Path):
    model = zoo.save("llama", tmp_path / "model", torch.float16)
    tensors = zoo.read_tensors(model)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 60000.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    own = {"scheme": {"weight": {"format": "ternary", "granularity": "per_tensor"}}}
    bitgrain.quantize(model, tmp_path / "fits", recipe=_recipe(tmp_path, own), workers=1)
    narrow = {"scheme": {"weight": {"format": "ternary", "granularity": "per_tensor", "scale": "fp8_e4m3"}}}
    recipe = _recipe(tmp_path, narrow)
    text = refused(model, NumericsError, "q_proj", tmp_path / "out", None, recipe=recipe)
    assert "overflow" in text


def _recipe(tmp_path: Path, settings: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_unknown_scheme(tiny: Tiny, tmp_path: Path):
    text = refused(tiny("llama"), RecipeError, "unknown scheme 'W4A61'", tmp_path / "out", "W4A61")
    assert "did you mean W4A16?" in text


def test_no_scheme_at_all(tiny: Tiny, tmp_path: Path):
    refused(tiny("llama"), RecipeError, "a scheme (for instance W4A16) or a recipe", tmp_path / "out", None)


def test_recipe_typo(tiny: Tiny, tmp_path: Path):
    path = _recipe(tmp_path, {"scheme": "W4A16", "on_indivisibel": "skip"})
    text = refused(tiny("llama"), RecipeError, "'on_indivisibel'", tmp_path / "out", None, recipe=path)
    assert "did you mean 'on_indivisible'?" in text
    assert str(path) in text


def test_idle_rule(tiny: Tiny, tmp_path: Path):
    path = _recipe(tmp_path, {"scheme": "W4A16", "rules": [{"match": "down_prj", "scheme": "W8A16"}]})
    text = refused(tiny("llama"), RecipeError, "matches no layer", tmp_path / "out", None, recipe=path)
    assert "did you mean 'down_proj'?" in text


def test_existing_out(tiny: Tiny, tmp_path: Path):
    (tmp_path / "out").mkdir()
    refused(tiny("llama"), OutputError, "never overwritten", tmp_path / "out")


def test_missing_parent(tiny: Tiny, tmp_path: Path):
    with pytest.raises(OutputError, match="parent folder does not exist"):
        bitgrain.quantize(tiny("llama"), tmp_path / "no" / "out", "W4A16", workers=1)
    assert not (tmp_path / "no").exists()


def test_not_enough_disk_is_noticed_before_the_start(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needed = bitgrain.plan(tiny("llama"), "W4A16").bytes_after
    real = os.statvfs

    class Full:
        def __init__(self, path: Any) -> None:
            self.f_bavail, self.f_frsize = (needed - 1), 1
            del path

    monkeypatch.setattr(os, "statvfs", Full)
    refused(tiny("llama"), PlanError, "are needed, but its disk has only", tmp_path / "out")
    monkeypatch.setattr(os, "statvfs", real)
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)


def test_unsupported_architecture(copy: Path, tmp_path: Path):
    zoo.edit_config(copy, model_type="hologram", architectures=["HologramForCausalLM"])
    refused(copy, ModelError, "HologramForCausalLM (model type hologram) is unknown", tmp_path / "out")


def test_already_quantized(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "once", "W4A16", workers=1)
    refused(tmp_path / "once", ModelError, "already quantized with compressed-tensors", tmp_path / "out")
    bitgrain.quantize(tiny("gpt2"), tmp_path / "own", "W4A16", workers=1)
    refused(tmp_path / "own", ModelError, "already quantized with bitgrain", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_weights_that_are_codes_already(tiny: Tiny, tmp_path: Path, dtype: torch.dtype):
    """Codes without a quantization_config: copying them, or rounding them again, would both be wrong."""
    model = zoo.edited(tiny("llama"), tmp_path / "model", **{Q: torch.zeros(128, 128).to(dtype)})
    text = refused(model, PlanError, "only float weights can be quantized", tmp_path / "out")
    assert Q.replace("__", ".") in text


def test_static_fp8_without_a_tokenizer(tiny: Tiny, tmp_path: Path):
    """Static scales need text, and text a tokenizer; the model has none."""
    refused(tiny("llama"), TextError, "tokenizer missing", tmp_path / "out", "FP8")


def test_weights_missing_from_the_files(tiny: Tiny, tmp_path: Path):
    model = zoo.edited(tiny("llama"), tmp_path / "model", **{Q: None})
    refused(model, PlanError, "1 parameters of the model are not in its files", tmp_path / "out")


def test_weights_of_another_shape(tiny: Tiny, tmp_path: Path):
    model = zoo.edited(tiny("llama"), tmp_path / "model", **{Q: torch.zeros(64, 128)})
    refused(model, ModelError, "do not fit config.json", tmp_path / "out")


def test_indivisible_groups(tmp_path: Path):
    model = zoo.save("llama", tmp_path / "model", hidden_size=96, intermediate_size=128, head_dim=24)
    refused(model, PlanError, "does not divide 96 input features", tmp_path / "out")


def test_unknown_device(tiny: Tiny, tmp_path: Path):
    refused(tiny("llama"), PlanError, "unknown device 'gpu'", tmp_path / "out", "W4A16", device="gpu")


def test_bad_shard_size(tiny: Tiny, tmp_path: Path):
    refused(tiny("llama"), PlanError, "at least 1", tmp_path / "out", "W4A16", max_shard_bytes=0)
