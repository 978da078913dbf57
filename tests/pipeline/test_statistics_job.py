"""`calibrate` once, then quantize by what it wrote: the same bytes as from text, for any scheme and solver."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.calibration.statistics import layer_key
from bitgrain.calibration.statistics_file import MANIFEST, StatisticsWriter, open_statistics
from bitgrain.errors import NumericsError, OutputError, PlanError, RecipeError, ResumeError, StatisticsError, TextError
from bitgrain.pipeline import statistics as statistics_job
from bitgrain.pipeline.statistics import group_key
from bitgrain.recipes import Recipe, make_recipe
from calibrated_jobs import same_layers

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[[str], tuple[Path, Path]]
LM_HEAD = {"match": "lm_head", "scheme": "FP8"}
EMBEDDINGS = {"match": "embed_tokens", "scheme": "W8A16"}
OWN = {
    "weight": {"format": "int8"},
    "input": {"format": "int8", "granularity": "per_tensor", "zero_point": "integer", "range": "search"},
}


def text_of(folder: Path) -> dict[str, Any]:
    return {"text": str(folder / "text.txt"), "windows": 7, "seqlen": 24, "batch": 3}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A zoo model with a tokenizer and a text, and its statistics."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = zoo.save(name, tmp_path_factory.mktemp("calibrated") / name)
            zoo.save_tokenizer(folder)
            (folder / "text.txt").write_text("".join(random.Random(0).choices(ascii_letters, k=200)))
            out = folder.with_name("statistics")
            bitgrain.calibrate(folder, out, calibration=text_of(folder), workers=1)
            made[name] = folder, out
        return made[name]

    return make


def recipe_for(folder: Path, **settings: Any) -> Recipe:
    return make_recipe(**{"calibration": {**text_of(folder), "activations": "full"}, **settings})


def layers_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "manifest.json").read_text())["layers"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"scheme": "W4A16_ASYM", "solver": "gptq"}),
        ("llama", {"scheme": "W8A8_STATIC", "rules": [LM_HEAD, {"match": "v_proj", "keep": True}]}),
        ("llama", {"scheme": OWN, "solver": "gptq", "rules": [LM_HEAD]}),
        ("llama", {"scheme": "W3A16", "range": "weighted"}),
        ("llama-tied", {"scheme": "NVFP4A16", "solver": "gptq", "rules": [EMBEDDINGS]}),
        ("gpt2", {"scheme": "FP8", "solver": "gptq", "input_range": "kl"}),
        ("phi3", {"scheme": "FP8", "input_range": "percentile"}),
        ("mixtral", {"scheme": "W8A8_STATIC", "solver": "gptq"}),
        ("gpt-oss", {"scheme": "W8A8_STATIC", "solver": "gptq", "input_range": "moving_average"}),
        ("bert", {"scheme": "W4A16", "solver": "gptq"}),
        ("llama", {"scheme": "LLM_INT8_STATIC", "rules": [{"match": "lm_head", "include": True}]}),
        ("mixtral", {"scheme": "W4A8", "columns": {"share": 0.02}, "solver": "gptq"}),
        ("gpt-oss", {"scheme": "W4A16", "columns": {"share": 0.02}}),
        ("llama", {"scheme": "W4A16", "columns": {"share": 0.02, "by": "weight"}, "solver": "gptq"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_same_as_from_text(name: str, settings: dict[str, Any], calibrated: Make, tmp_path: Path):
    folder, statistics = calibrated(name)
    recipe = recipe_for(folder, **settings)
    bitgrain.quantize(folder, tmp_path / "text", recipe=recipe, workers=1)
    bitgrain.quantize(folder, tmp_path / "saved", recipe=recipe, statistics=statistics, workers=2)
    by_text, saved = zoo.contents(tmp_path / "text"), zoo.contents(tmp_path / "saved")
    assert saved.keys() == by_text.keys()
    told = {"README.md", "manifest.json"}  # where the calibration came from, and hashes
    assert {file for file in saved if saved[file] != by_text[file]} <= told
    assert same_layers(layers_of(tmp_path / "saved"), layers_of(tmp_path / "text"))


def test_no_text_is_needed_then(calibrated: Make, tmp_path: Path):
    folder, statistics = calibrated("llama")
    shutil.copytree(folder, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "text.txt"):
        (tmp_path / "model" / file).unlink()
    with pytest.raises(TextError):
        bitgrain.quantize(tmp_path / "model", tmp_path / "out", "W4A16", solver="gptq")
    made = bitgrain.quantize(tmp_path / "model", tmp_path / "out", "W4A16", solver="gptq", statistics=statistics)
    assert {layer["method"] for layer in made.manifest["layers"] if layer["scheme"]} <= {"gptq", "rtn"}
    assert made.manifest["calibration"]["windows"] == 7
    assert made.manifest["calibration"]["statistics"]["activations"] == "full"
    assert any("calibrated by the statistics" in note for note in made.plan.notes)


def test_a_folder_is_the_same_however_it_is_made(calibrated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, statistics = calibrated("mixtral")
    expected = zoo.contents(statistics)
    bitgrain.calibrate(folder, tmp_path / "workers", calibration=text_of(folder), workers=3)
    assert zoo.contents(tmp_path / "workers") == expected
    monkeypatch.setattr(statistics_job, "HOLD_BYTES", 0)
    bitgrain.calibrate(folder, tmp_path / "lean", calibration=text_of(folder), workers=2)
    assert zoo.contents(tmp_path / "lean") == expected


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_killed_run_goes_on(killed_at: int, calibrated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the second block, and at lm_head; with other text it begins anew."""
    folder, statistics = calibrated("mixtral")
    settings: dict[str, Any] = {"workers": 1}
    blocks: list[int] = []
    walk, add = statistics_job._Walk._block, StatisticsWriter.add

    def counted(self: Any, index: int, *args: Any) -> Any:
        blocks.append(index)
        return walk(self, index, *args)

    def killed(self: StatisticsWriter, layers: Any) -> None:
        if self.files == killed_at:
            raise KeyboardInterrupt
        add(self, layers)

    monkeypatch.setattr(statistics_job._Walk, "_block", counted)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(StatisticsWriter, "add", killed)
            with pytest.raises(KeyboardInterrupt):
                bitgrain.calibrate(folder, tmp_path / "out", calibration=text_of(folder), **settings)
    assert blocks == {1: [0, 1, 1], 2: [0, 1]}[killed_at]
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    bitgrain.calibrate(folder, tmp_path / "out", calibration=text_of(folder), **settings)
    assert zoo.contents(tmp_path / "out") == zoo.contents(statistics)
    blocks.clear()
    bitgrain.calibrate(folder, tmp_path / "other", calibration={**text_of(folder), "windows": 6}, **settings)
    assert blocks == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_what_is_kept_of_experts(calibrated: Make):
    """Each by itself, and all together, for the one static scale that they share."""
    _, statistics = calibrated("mixtral")
    stored = open_statistics(statistics)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    each = [stored.read(key) for i in range(4) if (key := layer_key(name, i)) in stored]
    together = stored.read(group_key(name))
    assert sum(one.tokens for one in each) == together.tokens == 2 * 7 * 24
    assert together.hessian is None
    assert together.rows is not None
    assert float(together.high.max()) == max(float(one.high.max()) for one in each)
    for one in each:
        assert one.hessian is not None
        assert one.rows is None
    assert stored.place("model.layers.0.self_attn.q_proj.weight") == stored.place(
        "model.layers.0.self_attn.k_proj.weight"
    )


def test_hessians_are_those_of_the_inputs(calibrated: Make):
    """An oracle: transformers' own model with hooks."""
    from bitgrain.calibration.text import load_tokenizer
    from bitgrain.calibration.windows import calibration_windows

    folder, statistics = calibrated("llama")
    model: Any = bitgrain.load(folder, device="cpu", execution="dequantize")
    given: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = given.setdefault(name + ".weight", [])
            module.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=calibration_windows(folder / "text.txt", load_tokenizer(folder), windows=7, seqlen=24).ids)
    stored = open_statistics(statistics)
    assert set(stored.keys) == set(given)
    for name, parts in given.items():
        x = torch.cat(parts).double()
        hessian = x.T @ x / len(x)
        one = stored.read(name)
        assert one.hessian is not None
        scale = hessian.diagonal().sqrt()
        assert float(((one.hessian - hessian) / (scale[:, None] * scale)).abs().max()) < 1e-4
        assert one.tokens == len(x) == 7 * 24


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": {}}, "target in the recipe"),
        ({"tuning": {"end_to_end": {}, "blockwise": {}}}, "tuning.blockwise and tuning.end_to_end in the recipe"),
        ({"transforms": ["smoothquant"]}, "transforms in the recipe"),
    ],
)
def test_what_needs_activations_is_refused(settings: dict[str, Any], words: str, calibrated: Make, tmp_path: Path):
    folder, statistics = calibrated("llama")
    recipe = make_recipe(scheme="W4A16", solver="gptq", **settings)
    with pytest.raises(PlanError, match=words):
        bitgrain.quantize(folder, tmp_path / "out", recipe=recipe, statistics=statistics)
    assert not list(tmp_path.iterdir())


def test_statistics_or_text(calibrated: Make, tmp_path: Path):
    folder, statistics = calibrated("llama")
    with pytest.raises(RecipeError, match="either them or calibration text"):
        bitgrain.plan(folder, "W4A16", statistics=statistics, calibration="builtin")
    with pytest.raises(RecipeError, match="either them or bits"):
        bitgrain.plan(folder, statistics=statistics, bits=4)
    with pytest.raises(StatisticsError, match="holds no statistics"):
        bitgrain.plan(folder, "W4A16", statistics=tmp_path)


def test_statistics_of_another_model_are_refused(calibrated: Make, tmp_path: Path):
    """Even where it has the same shapes; a copy elsewhere is the same model."""
    folder, statistics = calibrated("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = zoo.read_tensors(folder)[name]
    other = zoo.edited(folder, tmp_path / "other", **{name.replace(".", "__"): weight * 1.01})
    with pytest.raises(StatisticsError, match="calibrated on another model"):
        bitgrain.plan(other, "W4A16", statistics=statistics)
    shutil.copytree(folder, tmp_path / "copy")
    assert bitgrain.plan(tmp_path / "copy", "W4A16", statistics=statistics).statistics is not None


def test_other_statistics_do_not_continue_a_run(calibrated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, statistics = calibrated("llama")
    settings: dict[str, Any] = {"solver": "gptq", "workers": 1}

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bitgrain.pipeline.quantize.solve_saved_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            bitgrain.quantize(folder, tmp_path / "out", "W4A16", statistics=statistics, **settings)
    shutil.copytree(statistics, tmp_path / "statistics")
    manifest = tmp_path / "statistics" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"windows": 7', '"windows": 8'))
    with pytest.raises(ResumeError):
        bitgrain.quantize(folder, tmp_path / "out", "W4A16", statistics=tmp_path / "statistics", **settings)
    bitgrain.quantize(folder, tmp_path / "out", "W4A16", statistics=statistics, **settings)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_bad_activations_leave_nothing(calibrated: Make, tmp_path: Path):
    folder, _ = calibrated("llama")
    huge = zoo.edited(folder, tmp_path / "model", model__layers__0__mlp__down_proj__weight=torch.full((128, 256), 1e38))
    with pytest.raises(NumericsError, match=r"layers\.0|layers\.1"):
        bitgrain.calibrate(huge, tmp_path / "out", calibration=text_of(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(OutputError, match="exists already"):
        bitgrain.calibrate(folder, tmp_path / "model", calibration=text_of(folder))


def test_the_doctor_speaks(calibrated: Make, tmp_path: Path):
    folder, _ = calibrated("mixtral")
    text = {**text_of(folder), "windows": 1, "seqlen": 4}
    found = bitgrain.calibrate(folder, tmp_path / "statistics", calibration=text)
    assert any("4 calibration tokens for a layer of 256 inputs" in note for note in found.notes)
    starved = [note for note in found.notes if "no calibration token reached" in note]
    assert starved
    assert "mlp.experts" in starved[0]
    recipe = make_recipe(scheme="W4A16", solver="gptq", calibration=text)
    made = bitgrain.quantize(folder, tmp_path / "out", recipe=recipe, workers=1)
    assert starved[0] in made.manifest["notes"]
    assert any("4 calibration tokens for a layer of 256 inputs" in note for note in made.plan.notes)
