"""RPTQ through a whole job: written down, loaded again, resumed, tuned, and refused where it cannot be."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_blockwise_resume import run_interrupted

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import calibration_windows
from bitgrain.errors import CheckpointError, NumericsError, PlanError, RecipeError, SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, per_group, per_tensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.pipeline.blockwise import block as block_job
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import Scheme, make_recipe
from bitgrain.recipes.scheme import PRESETS
from calibrated_jobs import TUNED, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
WEIGHT = {"format": "int8", "restricted": True}


def scheme_of(clusters: int, format: str = "int8", zero_point: str = "integer") -> dict[str, Any]:
    inputs = {"format": format, "granularity": "per_tensor", "zero_point": zero_point, "clusters": clusters}
    return {"name": f"C{clusters}", "weight": WEIGHT, "input": inputs}


def static(out: Path) -> dict[str, StaticInput]:
    return {name: one for name, (one,) in QuantizedCheckpoint(out).static_inputs().items()}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return zoo.outputs(bitgrain.load(folder, device="cpu", dtype=torch.float32, execution="dequantize"), ids)


def ids_of(model: Path, text: Path) -> torch.Tensor:
    return calibration_windows(text, load_tokenizer(model), windows=5, seqlen=24).ids


def error(model: Path, out: Path, text: Path) -> float:
    """Standard deviation of what changed in the logits on the calibration text, relative to theirs."""
    ids = ids_of(model, text)
    before = logits(model, ids)
    return float((logits(out, ids) - before).std() / before.std())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_what_is_written_computes_what_was_meant(readable: Make, text: Path, tmp_path: Path, name: str):
    """Fine inputs leave the error of the weights, so every channel has found its column again."""
    out = tmp_path / "out"
    result = run(readable(name), out, recipe_of("rptq", text, scheme_of(16, "int16")))
    assert error(readable(name), out, text) < 0.005
    norms = json.loads((out / "config.json").read_text())["quantization_config"]["reordered_norms"]
    assert norms == result.manifest["reordered_norms"]
    assert len(norms) == 4
    assert result.manifest["notes"] == [note for note in result.manifest["notes"] if "neighbours" not in note]
    predicted = {shard.file: shard.nbytes for shard in result.plan.shards}
    assert predicted == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert {check.ok for check in bitgrain.verify(out, against=readable(name))} == {True, None}


def test_more_clusters_serve_better(readable: Make, text: Path, tmp_path: Path):
    model = readable("llama")
    errors = []
    for clusters in (1, 16):
        run(model, tmp_path / str(clusters), recipe_of("rptq", text, scheme_of(clusters, "int4"), solver="rtn"))
        errors.append(error(model, tmp_path / str(clusters), text))
    assert errors[1] < 0.8 * errors[0]


def test_one_cluster_is_per_tensor_and_one_a_channel_is_per_channel(readable: Make, text: Path, tmp_path: Path):
    model = readable("llama")
    run(model, tmp_path / "one", recipe_of("rptq", text, scheme_of(1), solver="rtn"))
    plain = scheme_of(0)
    run(model, tmp_path / "tensor", recipe_of("rptq", text, plain, solver="rtn", transforms=[]))
    one, tensor = static(tmp_path / "one"), static(tmp_path / "tensor")
    assert one.keys() == tensor.keys()
    for name, found in one.items():
        assert torch.equal(found.scale, tensor[name].scale)
        assert torch.equal(found.zero, tensor[name].zero)  # type: ignore[arg-type]
    ids = ids_of(model, text)
    assert torch.equal(logits(tmp_path / "one", ids), logits(tmp_path / "tensor", ids))

    run(model, tmp_path / "each", recipe_of("rptq", text, scheme_of(128, zero_point="none"), solver="rtn"))
    first = static(tmp_path / "each")["model.layers.0.self_attn.q_proj.weight"]
    assert first.sizes is not None
    assert first.order is not None
    source: Any = bitgrain.load(model, device="cpu")
    seen: list[torch.Tensor] = []
    source.model.layers[0].input_layernorm.register_forward_hook(lambda _, args, y: seen.append(y))
    with torch.inference_mode():
        source(input_ids=ids)
    largest = seen[0].abs().flatten(0, 1).amax(0)[first.order.long()]
    expected = largest.split([size for size in first.sizes.tolist() if size])  # channels with equal ranges share one
    scales = torch.stack([run.amax() for run in expected]) / 127.5
    torch.testing.assert_close(first.scale[0, : len(scales)], scales, rtol=0.01, atol=0)
    assert len(scales) > 120


@pytest.mark.parametrize("choice", ["moving_average", {"name": "percentile", "percent": 99.0}, "search"])
def test_every_range_is_a_choice(readable: Make, text: Path, tmp_path: Path, choice: Any):
    """Found for each cluster alone; readers of one norm have the same, and none reaches beyond min-max."""
    found, widest = (
        static(run_out(readable("llama"), tmp_path / name, text, 4, input_range=range_))
        for name, range_ in (("found", choice), ("widest", "minmax"))
    )
    prefix = "model.layers.0.self_attn."
    q, k, v = (found[f"{prefix}{name}_proj.weight"] for name in "qkv")
    assert torch.equal(q.scale, k.scale)
    assert torch.equal(q.scale, v.scale)
    assert torch.all(q.scale <= widest[f"{prefix}q_proj.weight"].scale * (1 + 1e-6))
    assert any(not torch.equal(found[name].scale, widest[name].scale) for name in found)


def run_out(model: Path, out: Path, text: Path, bits: int = 8, **changes: Any) -> Path:
    run(model, out, recipe_of("rptq", text, scheme_of(8, f"int{bits}"), **{"solver": "rtn", **changes}))
    return out


def test_interrupted_anywhere_it_ends_in_the_same_bytes(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transforms = [{"name": "rotate", "r4": True, "optional": True}, "reorder"]
    settings = recipe_of("rptq", text, scheme_of(8), transforms=transforms, **TUNED)
    run(readable("llama"), tmp_path / "whole", settings)
    out = tmp_path / "out"
    assert run_interrupted(readable("llama"), out, settings, itertools.count(3, 9)) >= 2
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")
    monkeypatch.setattr(block_job, "_HOLD_BYTES", 0)
    run(readable("llama"), tmp_path / "lean", settings)
    assert zoo.contents(tmp_path / "lean") == zoo.contents(tmp_path / "whole")


def test_where_channels_cannot_move_the_manifest_says_so(readable: Make, text: Path, tmp_path: Path):
    rules = [{"match": "pooler.dense", "keep": True}]
    result = run(readable("bert"), tmp_path / "out", recipe_of("rptq", text, scheme_of(16, "int16"), rules=rules))
    (note,) = [note for note in result.manifest["notes"] if "runs of neighbours" in note]
    assert "attention.self.key.weight and of 7 more cannot be reordered" in note
    assert error(readable("bert"), tmp_path / "out", text) < 0.005


def test_layers_without_clusters_read_reordered_channels_too(readable: Make, text: Path, tmp_path: Path):
    rules = [{"match": "k_proj", "keep": True}, {"match": "gate_proj", "scheme": "W8A16"}]
    out = tmp_path / "out"
    result = run(readable("llama"), out, recipe_of("rptq", text, scheme_of(16, "int16"), rules=rules))
    assert "model.layers.0.self_attn.k_proj.weight" in result.manifest["changed"]
    assert error(readable("llama"), out, text) < 0.005
    assert {check.ok for check in bitgrain.verify(out, against=readable("llama"))} == {True, None}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_readers_of_one_input_may_differ_in_their_schemes(readable: Make, text: Path, tmp_path: Path, name: str):
    few, plain = scheme_of(8, "int16"), scheme_of(0, "int16")
    rules = [{"match": r"re:.*(v_proj|value)", "scheme": few}, {"match": r"re:.*(k_proj|key)", "scheme": plain}]
    rules += [{"match": "pooler.dense", "keep": True}] if name == "bert" else []
    run(readable(name), tmp_path / "out", recipe_of("rptq", text, scheme_of(16, "int16"), rules=rules))
    assert error(readable(name), tmp_path / "out", text) < 0.005
    sizes = {key: one.sizes for key, one in static(tmp_path / "out").items() if ".0." in key}
    found = {len(size) if size is not None else 0 for key, size in sizes.items() if "attn" in key or "attention" in key}
    assert found == {0, 8, 16}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"transforms": []}, r"W8A8_RPTQ: only the transform reorder finds clusters.*--recipe rptq"),
        ("llama", {"transforms": ["reorder", "smoothquant"]}, "reorder comes once, and last of the transforms"),
        ("llama", {"scheme": "W8A8_STATIC"}, "reorder: no layer's inputs are in clusters; choose W8A8_RPTQ"),
        ("llama", {"scheme": scheme_of(129)}, r"q_proj: 129 clusters of 128 input channels; ask for at most 128"),
        ("llama", {"rules": [{"match": "lm_head", "include": True}]}, "lm_head is outside the blocks"),
        ("mixtral", {}, r"is an expert: W8A8_RPTQ clusters the inputs of linears inside blocks only; keep it"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    readable: Make, text: Path, tmp_path: Path, name: str, changes: dict[str, Any], words: str
):
    settings = {"scheme": "W8A8_RPTQ", **changes}
    with pytest.raises(PlanError, match=words):
        run(readable(name), tmp_path / "out", recipe_of("rptq", text, **settings))
    assert not list(tmp_path.iterdir())


def test_specs_without_a_meaning():
    int8 = IntFormat(8)
    for wrong in ({"dynamic": True, "granularity": per_tensor()}, {"granularity": per_group(8)}):
        with pytest.raises(SchemeError, match="clusters of channels are for static per_tensor inputs"):
            QuantSpec(int8, **wrong, clusters=4)
    with pytest.raises(SchemeError, match=r"clusters of channels are for static per_tensor inputs.*not -1"):
        QuantSpec(int8, per_tensor(), clusters=-1)
    with pytest.raises(SchemeError, match="clusters of channels are for static inputs, weights have groups"):
        Scheme("own", QuantSpec(int8, per_tensor(), clusters=4))
    with pytest.raises(RecipeError, match="transform 'reorder' has no setting 'clusters'"):
        make_recipe(scheme="W8A8_RPTQ", transforms=[{"name": "reorder", "clusters": 4}])
    assert "in 32 clusters of channels" in PRESETS["W8A8_RPTQ"].input.describe()  # type: ignore[union-attr]


def test_a_checkpoint_whose_order_is_lost_or_damaged(readable: Make, text: Path, tmp_path: Path):
    out = run_out(readable("llama"), tmp_path / "out", text)
    path = out / "config.json"
    config = json.loads(path.read_text())
    norms = config["quantization_config"]["reordered_norms"]
    norms["model.layers.0.input_layernorm"] = "model.layers.9.x.weight"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"reorders the output of model\.layers\.0\.input_layernorm, but model"):
        bitgrain.load(out, device="cpu", execution="dequantize")
    norms["model.layers.0.input_layernorm"] = name = "model.layers.0.self_attn.q_proj.weight"
    path.write_text(json.dumps(config))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}.input_order" in tensors:
            tensors[f"{name}.input_order"][:] = 0
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"q_proj: the order of its 128 columns does not name each once"):
        bitgrain.load(out, device="cpu", execution="dequantize")
