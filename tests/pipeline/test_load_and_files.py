"""The files beside the weights, and what `load` says to folders that it cannot read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import bitgrain
import zoo
from bitgrain.errors import BitgrainError, CheckpointError, ModelError, SchemeError
from bitgrain.progress import Progress
from bitgrain.recipes import load_recipe, make_recipe

Tiny = Callable[[str], Path]


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_manifest_tells_of_every_layer_and_file(tiny: Tiny, tmp_path: Path):
    recipe = make_recipe(scheme="W4A16", rules=[{"match": "o_proj", "keep": True}])
    result = bitgrain.quantize(tiny("llama"), tmp_path / "out", recipe=recipe, workers=1)
    manifest = manifest_of(tmp_path / "out")
    assert manifest == result.manifest
    layers = {layer["tensor"]: layer for layer in manifest["layers"]}
    assert set(layers) == {weight.tensor for weight in result.plan.anatomy.weights}
    kept = layers["model.layers.0.self_attn.o_proj.weight"]
    assert kept["scheme"] is None
    done = layers["model.layers.0.self_attn.q_proj.weight"]
    assert done["scheme"] == "W4A16"
    assert 15 < done["sqnr_db"] < 30
    assert 0.99 < done["cosine"] < 1
    assert done["max_error"] > 0
    assert done["warnings"] == []
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(manifest["versions"]) >= {"bitgrain", "torch", "transformers"}
    text = (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert str(tiny("llama").parent) not in text


def test_measures_in_the_manifest_are_those_of_the_written_weights(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W8A16", workers=1)
    before = zoo.read_tensors(tiny("llama"))
    after: Any = bitgrain.load(tmp_path / "out", execution="dequantize").state_dict()
    for layer in manifest_of(tmp_path / "out")["layers"]:
        if layer["scheme"]:
            x, y = before[layer["tensor"]].double(), after[layer["tensor"]].double()
            assert layer["max_error"] == pytest.approx(float((x - y).abs().max()), rel=1e-5)
            assert layer["mse"] == pytest.approx(float((x - y).square().mean()), rel=1e-5)


def test_a_ruined_layer_is_warned_of_and_an_exact_one_has_no_sqnr(tiny: Tiny, tmp_path: Path):
    name = "model.layers.0.self_attn.v_proj.weight"
    ruined, exact = torch.ones(128, 128) * 1e-3, "model.layers.0.self_attn.k_proj.weight"
    ruined[:, 0] = 1.0
    model = zoo.edited(tiny("llama"), tmp_path / "model", **{name.replace(".", "__"): ruined[:64],
                       exact.replace(".", "__"): torch.zeros(64, 128)})  # fmt: skip
    bitgrain.quantize(model, tmp_path / "out", "W2A16", workers=1)
    layers = {layer["tensor"]: layer for layer in manifest_of(tmp_path / "out")["layers"]}
    assert layers[exact]["sqnr_db"] is None
    assert layers[exact]["warnings"] == []
    bad = {name: layer["warnings"] for name, layer in layers.items() if layer.get("warnings")}
    assert all("SQNR is only" in warnings[0] for warnings in bad.values())


def test_recipe_and_card_say_what_was_done(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "w4a16", on_indivisible="skip", workers=1)
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe == make_recipe(scheme="w4a16", on_indivisible="skip")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "llama"
    assert "# llama, W4A16" in card
    assert "AutoModelForCausalLM" in card
    bitgrain.quantize(tiny("gpt2"), tmp_path / "own", "W4A16", workers=1)
    assert 'bitgrain.load("gpt2-quantized")' in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")


def test_card_says_what_has_no_kernel(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W8A16INT16", workers=1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'bitgrain.load("llama-quantized", execution="dequantize")' in card
    assert re.search(r"there is no kernel for .*\(inputs in int16\)\.", card)
    with pytest.raises(SchemeError, match="inputs in int16"):
        bitgrain.load(tmp_path / "out", device="cpu")


def test_side_files_are_copied_and_code_only_when_trusted(tiny: Tiny, tmp_path: Path):
    model = zoo.edited(tiny("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_x.py", "notes.md", "old.bin"):
        (model / name).write_text(name)
    (model / "original").mkdir()
    bitgrain.quantize(model, tmp_path / "out", "W4A16", workers=1)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"} <= copied
    assert not copied & {"modeling_x.py", "notes.md", "old.bin", "original"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "chat_template.jinja"
    bitgrain.quantize(model, tmp_path / "trusted", "W4A16", workers=1, trust_remote_code=True)
    assert (tmp_path / "trusted" / "modeling_x.py").read_text() == "modeling_x.py"


def test_config_is_the_originals_and_quantization_config(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    before = json.loads((tiny("llama") / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    config = after.pop("quantization_config")
    assert after == before
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    bitgrain.quantize(tiny("llama-tied"), tmp_path / "tied", "W4A16", workers=1)
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    bitgrain.quantize(tiny("llama"), tmp_path / "fp4", "NVFP4", workers=1)
    assert json.loads((tmp_path / "fp4" / "config.json").read_text())["dtype"] == "bfloat16"


def test_progress_counts_every_byte(tiny: Tiny, tmp_path: Path):
    class Recorder(Progress):
        def __init__(self) -> None:
            self.total, self.seen, self.finished = 0, 0, False

        def start(self, total: int, unit: str, title: str, done: int = 0) -> None:
            assert unit == "bytes"
            assert "llama" in title
            self.total, self.seen = total, done

        def advance(self, amount: int, note: str = "") -> None:
            self.seen += amount

        def finish(self) -> None:
            self.finished = True

    recorder = Recorder()
    result = bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1, progress=recorder)
    assert recorder.total == recorder.seen == result.plan.bytes_before
    assert recorder.finished


def test_plain_checkpoints_load_as_they_are(tiny: Tiny):
    loaded: Any = bitgrain.load(tiny("qwen3"))
    expected = zoo.build("qwen3").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert bitgrain.load(tiny("qwen3"), dtype=torch.bfloat16).dtype == torch.bfloat16  # type: ignore[attr-defined]


def damaged(tiny: Tiny, tmp_path: Path, change: Callable[[dict[str, Any]], None], name: str = "llama") -> Path:
    bitgrain.quantize(tiny(name), tmp_path / "out", "W4A16", workers=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    return tmp_path / "out"


def test_load_refuses_other_methods(tiny: Tiny, tmp_path: Path):
    out = damaged(tiny, tmp_path, lambda config: config.update(quant_method="eetq"))
    with pytest.raises(CheckpointError, match=r"is quantized with eetq; bitgrain reads the layouts compressed-"):
        bitgrain.load(out, execution="dequantize")


def test_load_refuses_a_layout_of_which_there_is_nothing(tiny: Tiny, tmp_path: Path):
    out = damaged(tiny, tmp_path, lambda config: config.update(quant_method="gptq", bits=4, group_size=128))
    with pytest.raises(CheckpointError, match="says gptq, but nothing is stored so"):
        bitgrain.load(out, execution="dequantize")


@pytest.mark.parametrize("lost", ["weight_packed", "weight_scale", "weight_shape"])
def test_load_refuses_incomplete_layers(tiny: Tiny, tmp_path: Path, lost: str):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    tensors = zoo.read_tensors(tmp_path / "out")
    del tensors[f"model.layers.0.mlp.up_proj.{lost}"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ModelError), match="up_proj"):
        bitgrain.load(tmp_path / "out", execution="dequantize")


def test_load_refuses_layers_that_the_model_does_not_have(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    zoo.edit_config(tmp_path / "out", num_hidden_layers=1, layer_types=None)
    with pytest.raises(CheckpointError, match=r"quantized layers that the model does not have: model\.layers\.1"):
        bitgrain.load(tmp_path / "out", execution="dequantize")


def test_damaged_configs_are_errors_for_the_user(tiny: Tiny, tmp_path: Path):
    def break_it(config: dict[str, Any]) -> None:
        config["schemes"][0]["weight"]["format"] = "int99"

    out = damaged(tiny, tmp_path, break_it, "gpt2")
    with pytest.raises(BitgrainError, match="int99"):
        bitgrain.load(out, execution="dequantize")


def test_parts_of_one_parameter_need_one_activation_scheme(tiny: Tiny, tmp_path: Path):
    """w1 and w3 of an expert become one parameter in memory: two kinds of inputs for it make no sense."""
    rules = [{"match": "re:.*w3", "scheme": "FP8_DYNAMIC"}]
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", recipe=make_recipe(scheme="W8A8", rules=rules), workers=1)
    with pytest.raises(ModelError, match="experts have different activation schemes; give them one scheme"):
        bitgrain.load(tmp_path / "out", execution="dequantize")


def test_mixed_recipe_end_to_end(tiny: Tiny, tmp_path: Path):
    rules = [
        {"match": "down_proj", "scheme": "W8A16"},
        {"match": "layers.0.self_attn.o_proj", "scheme": "FP8_DYNAMIC"},
        {"match": "lm_head", "scheme": "W8A16"},
        {"match": "layers.1.mlp.gate_proj", "keep": True},
    ]
    bitgrain.quantize(tiny("llama"), tmp_path / "out", recipe=make_recipe(scheme="W4A16", rules=rules), workers=1)
    checks = bitgrain.verify(tmp_path / "out", against=tiny("llama"))
    assert [check.name for check in checks if not check.ok] == ["engines"]
    assert len(checks) == 5
