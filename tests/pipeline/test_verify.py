"""verify notices every kind of damage, and says where."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bitgrain
import zoo
from bitgrain.errors import CheckpointError
from bitgrain.recipes import make_recipe

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]


@pytest.fixture
def out(tiny: Tiny, tmp_path: Path) -> Path:
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    return tmp_path / "out"


def checks(out: Path, against: Path | None = None) -> dict[str, bool | None]:
    return {check.name: check.ok for check in bitgrain.verify(out, against=against)}


def spoil(out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = zoo.read_tensors(out)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def test_a_sound_folder(tiny: Tiny, out: Path):
    sound = {"files": True, "layers": True, "logits": True, "engines": None}
    assert checks(out) == sound
    assert checks(out, tiny("llama")) == {**sound, "kept tensors": True}


def test_engines_are_told_by_their_rules_as_the_plan_has_them(tiny: Tiny, tmp_path: Path):
    """Joined layers of different schemes are found by names, without the model."""
    rule = {"match": "layers.1.self_attn.k_proj", "keep": True}
    result = bitgrain.quantize(
        tiny("llama"), tmp_path / "out", recipe=make_recipe(scheme="W4A16", rules=[rule]), workers=1
    )
    (found,) = [check for check in bitgrain.verify(tmp_path / "out") if check.name == "engines"]
    vllm, _, transformers, _ = result.plan.engines
    assert found.ok is None
    assert vllm.reasons == ("layers that it fuses have different schemes: model.layers.1.self_attn.qkv",)
    assert f"{vllm.title} does not load it ({vllm.reasons[0]})" in found.detail
    assert f"{transformers.title} loads it" in found.detail


def test_a_changed_kept_tensor(tiny: Tiny, out: Path):
    spoil(out, "model.norm.weight", lambda t: t * 1.5)
    found = {check.name: check for check in bitgrain.verify(out, against=tiny("llama"))}
    assert found["files"].ok is False
    assert "model.safetensors has changed" in found["files"].detail
    assert found["kept tensors"].ok is False
    assert "model.norm.weight differs from the original" in found["kept tensors"].detail
    assert found["layers"].ok


def test_changed_codes_are_a_changed_file(out: Path):
    spoil(out, "model.layers.0.mlp.up_proj.weight_packed", lambda t: t + 1)
    assert checks(out)["files"] is False


def test_files_that_are_gone(out: Path):
    (out / "generation_config.json").unlink()
    (found,) = [check for check in bitgrain.verify(out) if check.name == "files"]
    assert found.ok is False
    assert "generation_config.json is missing" in found.detail
    (out / "manifest.json").unlink()
    (found,) = [check for check in bitgrain.verify(out) if check.name == "files"]
    assert found.ok is None
    assert "no manifest.json" in found.detail


def test_damaged_manifest(out: Path):
    (out / "manifest.json").write_text("{")
    (found,) = [check for check in bitgrain.verify(out) if check.name == "files"]
    assert found.ok is False
    assert "manifest.json is damaged" in found.detail


def test_a_config_that_means_something_else_is_noticed_by_the_foreign_reader(out: Path):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (out / "config.json").write_text(json.dumps(config))
    found = checks(out)
    assert found["files"] is False
    assert found["logits"] is False  # transformers then looks for a quantized lm_head


def test_the_wrong_original(tiny: Tiny, tmp_path: Path, out: Path):
    more = zoo.edited(tiny("llama"), tmp_path / "more")
    save_file({**zoo.read_tensors(more), "extra": torch.ones(2)}, more / "model.safetensors", {"format": "pt"})
    found = {check.name: check for check in bitgrain.verify(out, against=more)}
    assert found["kept tensors"].ok is False
    assert found["kept tensors"].detail == "extra is lost"


def test_our_own_layout_says_what_was_not_looked_at(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("gpt2"), tmp_path / "own", "W4A16", workers=1)
    assert checks(tmp_path / "own", tiny("gpt2")) == {
        "files": True,
        "layers": None,
        "kept tensors": True,
        "engines": None,
    }


def test_experts_with_quantized_inputs_are_not_compared_but_told(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("mixtral"), tmp_path / "moe", "FP8_DYNAMIC", workers=1)
    found = {check.name: check for check in bitgrain.verify(tmp_path / "moe")}
    assert found["logits"].ok is None
    assert "does not quantize the inputs of experts" in found["logits"].detail


@pytest.mark.parametrize("scheme", ["W8A8", "NVFP4", "W4A16_ASYM"])
def test_what_transformers_cannot_load_is_a_failed_check(tiny: Tiny, tmp_path: Path, scheme: str):
    """The plan said no; verify finds the same, and nothing escapes."""
    result = bitgrain.quantize(tiny("mixtral"), tmp_path / "moe", scheme, workers=1)
    assert not next(v for v in result.plan.engines if v.engine == "transformers").loads
    found = {check.name: check for check in bitgrain.verify(tmp_path / "moe", against=tiny("mixtral"))}
    assert found["logits"].ok is not True
    assert found["layers"].ok
    assert found["kept tensors"].ok


def test_an_unquantized_folder_is_an_error(tiny: Tiny):
    with pytest.raises(CheckpointError, match="is not quantized; bitgrain reads the layouts compressed-tensors"):
        bitgrain.verify(tiny("llama"))
