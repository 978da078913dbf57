"""Jobs whose weights keep columns in 16 bits: chosen from text where asked, written, left out of quantized inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.errors import ModelError, PlanError, RecipeError, SchemeError
from bitgrain.numerics import fake_quantize
from bitgrain.pipeline.blockwise.columns import columns_of
from bitgrain.pipeline.load import shared_columns
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import get_scheme, make_recipe
from bitgrain.runtime.activations import InputQuantizer
from calibrated_jobs import TUNED

pytestmark = pytest.mark.usefixtures("device")

STATIC = get_scheme("LLM_INT8_STATIC")
WEIGHT = {"share": 0.02, "by": "weight"}
RANDOM = {"share": 0.02, "by": "random"}


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stretched")
    zoo.stretch(zoo.build("llama")).save_pretrained(folder)
    zoo.save_tokenizer(folder)
    return folder


def job(model: Path, text: Path, out: Path, scheme: str = "LLM_INT8_STATIC", **settings: Any) -> Any:
    calibration = {"text": str(text), "windows": 5, "seqlen": 24, "batch": 2, **settings.pop("calibration", {})}
    recipe = make_recipe(scheme=scheme, calibration=calibration, **settings)
    return bitgrain.quantize(model, out, recipe=recipe, workers=1)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("workers", [1, 2])
def test_outlier_channels_are_found_and_left_out(workers: int, stretched: Path, text: Path, tmp_path: Path):
    result = job(stretched, text, tmp_path / "out", solver="gptq" if workers == 2 else "rtn")
    stored = QuantizedCheckpoint(tmp_path / "out")
    assert result.plan.layout.name == "bitgrain"
    assert result.plan.bytes_after == bytes_of(tmp_path / "out")
    columns = stored.columns()
    assert len(columns) == 14
    for name, (index,) in columns.items():
        assert len(index) == STATIC.weight.columns.count(stored.layers[name].in_features)  # type: ignore[union-attr]
        if "o_proj" not in name and "down_proj" not in name:
            assert 9 in index.tolist()
    assert torch.equal(columns["model.layers.0.self_attn.q_proj.weight"][0],
                       columns["model.layers.0.self_attn.v_proj.weight"][0])  # fmt: skip
    model = zoo.stretch(zoo.build("llama"))
    ids, base = zoo.ids_for(model), zoo.outputs(model, zoo.ids_for(model))
    found = zoo.outputs(bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"), ids)
    assert torch.equal(found, zoo.outputs(simulated(model, stored), ids))
    job(stretched, text, tmp_path / "plain", "W8A8")
    plain = zoo.outputs(bitgrain.load(tmp_path / "plain", device="cpu", execution="dequantize"), ids)
    assert float((found - base).norm()) < 0.3 * float((plain - base).norm())
    checks = bitgrain.verify(tmp_path / "out", against=stretched)
    assert not [check for check in checks if check.ok is False]


def simulated(model: Any, stored: QuantizedCheckpoint) -> Any:
    """`model` with weights and inputs rounded by hand."""
    original = zoo.build("llama")
    zoo.stretch(original)
    for name, (index,) in stored.columns().items():
        module, kept = model.get_submodule(name.removesuffix(".weight")), index.long()
        before = original.get_parameter(name)
        dense = stored.dense(name)
        assert torch.equal(dense[:, kept], before[:, kept].half().float())
        module.weight.data.copy_(dense)

        def rounded(_: Any, args: tuple[torch.Tensor], kept: torch.Tensor = kept) -> torch.Tensor:
            x = args[0].clone()
            x[..., kept] = 0.0
            x = fake_quantize(x, STATIC.input)  # type: ignore[arg-type]
            x[..., kept] = args[0][..., kept]
            return x

        module.register_forward_pre_hook(rounded)
    return model


@pytest.mark.parametrize(
    ("name", "activations"), [("mixtral", "quantized"), ("qwen3-moe", "full"), ("gpt-oss", "quantized")]
)
def test_experts_keep_the_same_columns(
    name: str, activations: str, readable: Callable[..., Path], text: Path, tmp_path: Path
):
    model = readable(name)
    result = job(model, text, tmp_path / "out", calibration={"activations": activations}, solver="gptq")
    assert result.plan.bytes_after == bytes_of(tmp_path / "out")
    found: dict[str, set[tuple[int, ...]]] = {}
    for tensor, indices in QuantizedCheckpoint(tmp_path / "out").columns().items():
        if ".experts." in tensor:
            key = tensor.partition(".experts.")[0] + tensor.removesuffix(".weight").rpartition(".")[2]
            found.setdefault(key, set()).update(tuple(index.tolist()) for index in indices)
    assert found
    assert all(len(kept) == 1 for kept in found.values())
    loaded = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    original = bitgrain.load(model, device="cpu")
    base, now = (zoo.outputs(one, zoo.ids_for(original)) for one in (original, loaded))
    assert float(((now - base).norm(dim=-1) / base.norm(dim=-1)).median()) < 0.05  # a few tokens go to other experts
    quantizers = [one for one in loaded.modules() if isinstance(one, InputQuantizer)]
    assert quantizers
    assert all(one.columns is not None for one in quantizers)


@pytest.mark.parametrize("columns", [{"share": 0.03}, WEIGHT, RANDOM], ids=["activation", "weight", "random"])
def test_weight_only_schemes_with_a_head(columns: Any, stretched: Path, text: Path, tmp_path: Path):
    rules = [{"match": "lm_head", "include": True}]
    settings: dict[str, Any] = {"columns": columns, "rules": rules, "solver": {"name": "gptq", "candidates": ["mse"]}}
    settings["transforms"] = [] if "by" in columns else ["awq"]
    plain = job(stretched, text, tmp_path / "plain", "W2A16", rules=rules)
    result = job(stretched, text, tmp_path / "out", "W2A16", **settings, target={})
    assert result.plan.bytes_after == bytes_of(tmp_path / "out") > plain.plan.bytes_after
    kept = {layer["tensor"]: layer for layer in result.manifest["layers"] if layer["scheme"]}
    assert len(kept) == 15
    assert all(layer["figures"]["loss"] <= layer["figures"]["rtn_loss"] for layer in kept.values())
    bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")


def test_tuning_leaves_them_as_they_are(stretched: Path, text: Path, tmp_path: Path):
    for name, tuning in (("plain", {}), ("tuned", {**TUNED["tuning"], "blockwise": {"steps": 2}})):
        job(stretched, text, tmp_path / name, "W4A8", columns=RANDOM, tuning=tuning, rules=[
            {"match": "lm_head", "include": True}])  # fmt: skip
    plain, tuned = (zoo.read_tensors(tmp_path / name) for name in ("plain", "tuned"))
    kept = [name for name in plain if ".column_" in name]
    assert len(kept) == 30
    assert all(torch.equal(plain[name], tuned[name]) for name in kept)
    told = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["tuning"]
    assert told["kl_after"] <= told["kl_before"]


def test_without_text(stretched: Path, tmp_path: Path):
    """By weight and random need none; a module in memory gives what the disk job gives."""
    for columns in (WEIGHT, RANDOM):
        out = tmp_path / columns["by"]
        result = bitgrain.quantize(stretched, out, "W4A8", columns=columns)
        assert result.plan.calibration is None
        assert result.plan.bytes_after == bytes_of(out)
        loaded, model = bitgrain.load(out, device="cpu", execution="dequantize"), bitgrain.load(stretched, device="cpu")
        parts = bitgrain.quantize_(model, make_recipe(scheme="W4A8", columns=columns))
        assert all(part.columns is not None for of in parts.values() for part in of)
        ids = zoo.ids_for(model)
        assert torch.equal(zoo.outputs(model, ids), zoo.outputs(loaded, ids))
    with pytest.raises(SchemeError, match="LLM_INT8_STATIC has columns kept by activation, which only data can give"):
        bitgrain.quantize_(bitgrain.load(stretched, device="cpu"), "LLM_INT8_STATIC")


def test_bad_input(readable: Callable[..., Path], text: Path, tmp_path: Path):
    with pytest.raises(PlanError, match="it shares its quantized inputs with other matrices"):
        job(readable("mixtral"), text, tmp_path / "out", "W4A8", columns=WEIGHT)
    with pytest.raises(RecipeError, match="share above 0 and at most"):
        make_recipe(scheme="W4A16", columns={"share": 0.8})
    with pytest.raises(RecipeError, match=r"unknown key 'columns\.shares'; did you mean 'share'"):
        make_recipe(scheme="W4A16", columns={"shares": 0.1})
    with pytest.raises(RecipeError, match="dynamic scales only"):
        make_recipe(scheme="W8A8_STATIC", columns={"share": 0.1})
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    for given in ({"columns": 0.01}, {"scheme": "LLM_INT8_STATIC"}):
        with pytest.raises(PlanError, match="bits weighs codes alone"):
            bitgrain.plan(readable("llama"), bits=4.0, calibration=calibration, **given)
    one, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert shared_columns([one, one], "up") is one
    assert shared_columns([None], "up") is None
    for differing in ([one, other], [one, None], [None, one]):
        with pytest.raises(ModelError, match="up: its matrices share their quantized inputs and keep different"):
            shared_columns(differing, "up")


def test_a_block_that_text_does_not_reach(readable: Callable[..., Path], text: Path, tmp_path: Path):
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    made = bitgrain.plan(readable("llama"), recipe=make_recipe(scheme="LLM_INT8_STATIC", calibration=calibration))
    layer = next(iter(made.quantized.values()))
    with pytest.raises(PlanError, match=r"the calibration text never reaches it, so its columns .*choose columns by"):
        columns_of(layer, torch.ones(layer.shape))
