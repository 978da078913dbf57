"""Jobs whose result has static input scales: chosen from text, block by block, and written with the weights."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
import transformers

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import calibration_windows
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError, RecipeError, SchemeError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.stream import Call
from bitgrain.numerics.ranges import MSE
from bitgrain.pipeline.blockwise import block as block_job
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Runs, Seen
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.pipeline.blockwise.static import Chosen, choose_inputs
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import PRESETS, Scheme, make_recipe
from bitgrain.runtime.watch import Key

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[[str], Path]
WINDOWS = {"windows": 5, "seqlen": 24}


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A zoo model with a tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = zoo.save(name, tmp_path_factory.mktemp("readable") / name)
            zoo.save_tokenizer(made[name])
            (made[name] / "text.txt").write_text("".join(random.Random(0).choices(ascii_letters, k=200)))
        return made[name]

    return make


def job(model: Path, out: Path, scheme: str = "W8A8_STATIC", workers: int = 1, **settings: Any) -> Path:
    calibration = {"text": str(model / "text.txt"), **WINDOWS, "batch": 2, **settings.pop("calibration", {})}
    recipe = make_recipe(**{"scheme": scheme, "input_range": "minmax", "calibration": calibration, **settings})
    bitgrain.quantize(model, out, recipe=recipe, workers=workers)
    return out


def largest_inputs(out: Path, source: Path) -> dict[str, float]:
    """Largest |x| that comes to each input quantizer of a quantized model, by original tensor name."""
    model: Any = bitgrain.load(out, device="cpu", execution="dequantize")
    found: dict[str, float] = {}

    def before(parameter: str) -> Callable[..., None]:
        def note(_: Any, args: tuple[torch.Tensor]) -> None:
            if args[0].numel():
                found[parameter] = max(found.get(parameter, 0.0), float(args[0].abs().max()))

        return note

    for name, module in model.named_modules():
        if name.endswith("input_quantizer"):
            parameter = name.replace(".input_quantizer", ".weight").removesuffix("_input_quantizer")
            module.register_forward_pre_hook(before(parameter))
    ids = calibration_windows(source / "text.txt", load_tokenizer(source), **WINDOWS).ids
    with torch.inference_mode():
        for batch in ids.split(2):
            model(input_ids=batch)
    anatomy = read_anatomy(model, zoo.read_tensors(source))
    return {weight.tensor: found[weight.targets[0]] for weight in anatomy.weights if weight.targets[0] in found}


def scales(out: Path) -> dict[str, list[float]]:
    static = QuantizedCheckpoint(out).static_inputs()
    return {name: [float(one.scale) for one in found] for name, found in static.items()}


@pytest.mark.parametrize(
    ("name", "scheme", "settings"),
    [
        ("llama", "W8A8_STATIC", {}),
        ("llama", "FP8", {"rules": [{"match": "lm_head", "scheme": "FP8"}]}),
        ("qwen3", "W8A8_STATIC", {"solver": "gptq", "target": {}}),
        ("gpt2", "FP8", {}),
        ("phi3", "W8A8_STATIC", {}),
        ("mixtral", "FP8", {}),
        ("gpt-oss", "W8A8_STATIC", {}),
        (
            "llama",
            "W8A8_STATIC",
            {"rules": [{"match": "v_proj", "keep": True}, {"match": "up_proj", "scheme": "W8A8"}]},
        ),
    ],
    ids=["llama", "lm_head", "gptq", "conv1d", "fused-on-disk", "mixtral", "gpt-oss", "mixed"],
)
def test_every_scale_is_that_of_the_quantized_model(
    name: str, scheme: str, settings: dict[str, Any], readable: Make, tmp_path: Path
):
    """Run the result on the same text: its own inputs have exactly the limits that were written."""
    source = readable(name)
    out = job(source, tmp_path / "out", scheme, **settings)
    found, largest = scales(out), largest_inputs(out, source)
    assert found
    top = {"W8A8_STATIC": 127, "FP8": 448}[scheme]
    for tensor, values in found.items():
        assert values == pytest.approx([largest[tensor] / top] * len(values), rel=1e-3), tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["FP8", "W8A8_STATIC"])
def test_transformers_runs_the_result(scheme: str, readable: Make, tmp_path: Path):
    out = job(readable("llama"), tmp_path / "out", scheme, input_range=None)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = zoo.ids_for(theirs)
    expected = zoo.outputs(theirs.eval(), ids)
    assert torch.equal(zoo.outputs(bitgrain.load(out, device="cpu", execution="dequantize"), ids), expected)


def test_neither_memory_nor_workers_nor_a_kill_change_the_bytes(
    readable: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, settings = readable("llama"), {"solver": "gptq", "target": {}, "input_range": "search"}
    whole = zoo.contents(job(source, tmp_path / "whole", **settings))
    assert zoo.contents(job(source, tmp_path / "workers", workers=3, **settings)) == whole
    solve = block_job.BlockSolver.solve

    def killed(self: block_job.BlockSolver, index: int, *args: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return solve(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(block_job.BlockSolver, "solve", killed)
        with pytest.raises(KeyboardInterrupt):
            job(source, tmp_path / "killed", **settings)
    assert zoo.contents(job(source, tmp_path / "killed", **settings)) == whole
    monkeypatch.setattr(block_job, "_HOLD_BYTES", 0)
    assert zoo.contents(job(source, tmp_path / "lean", **settings)) == whole


def test_parallel_calibration_takes_the_limits_of_the_full_model(readable: Make, tmp_path: Path):
    source = readable("llama")
    rules = [{"match": "re:.*", "keep": True}, {"match": "re:.*layers.1.*proj", "scheme": "W8A8_STATIC"}]
    kept_before = job(source, tmp_path / "late", rules=rules)  # block 0 is not quantized
    full = scales(job(source, tmp_path / "full", calibration={"activations": "full"}))
    late = {name: scale for name, scale in scales(kept_before).items() if "q_proj" in name}
    assert late
    assert late == {name: pytest.approx(full[name], rel=1e-6) for name in late}
    sequential = scales(job(source, tmp_path / "sequential"))
    assert any(full[name] != pytest.approx(sequential[name], rel=1e-6) for name in full)


@pytest.mark.parametrize("choice", ["moving_average", {"name": "percentile", "percent": 99.0}, "mse", "kl", "search"])
def test_every_range_is_a_choice(choice: Any, readable: Make, tmp_path: Path):
    """Of members of one stage the scale is the same, and no range reaches beyond min-max."""
    source = readable("llama")
    found = scales(job(source, tmp_path / "out", input_range=choice, calibration={"activations": "full"}))
    widest = scales(job(source, tmp_path / "widest", calibration={"activations": "full"}))
    assert all(found[name][0] <= widest[name][0] * (1 + 1e-6) for name in found)
    assert found != widest
    prefix = "model.layers.1.self_attn."
    assert found[f"{prefix}q_proj.weight"] == found[f"{prefix}k_proj.weight"] == found[f"{prefix}v_proj.weight"]
    assert found[f"{prefix}q_proj.weight"] != found[f"{prefix}o_proj.weight"]


def test_the_manifest_tells_the_scales(readable: Make, tmp_path: Path):
    out = job(readable("llama"), tmp_path / "out", input_range="search")
    layers = json.loads((out / "manifest.json").read_text())["layers"]
    told = {layer["tensor"]: layer["input_scale"] for layer in layers if "input_scale" in layer}
    assert told == {name: values[0] for name, values in scales(out).items()}
    assert all(0 <= layer["input_error"] < 0.01 for layer in layers if "input_scale" in layer)


def test_tuning_leaves_the_scales_alone(readable: Make, tmp_path: Path):
    source = readable("llama")
    plain = scales(job(source, tmp_path / "plain", solver="gptq"))
    tuned = job(source, tmp_path / "tuned", solver="gptq", tuning={"end_to_end": {"steps": 2}})
    assert scales(tuned) == plain
    assert zoo.read_tensors(tuned).keys() == zoo.read_tensors(tmp_path / "plain").keys()


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x) * self.gate(x))


def test_a_run_that_stands_in_front_of_a_stage_goes_on_with_rounded_inputs():
    block, hidden = Mlp().requires_grad_(False), [torch.randn(2, 3, 8), torch.randn(2, 3, 8)]
    calls = [Call((), {})] * 2
    stages = find_stages(block, ["up.weight", "gate.weight", "down.weight"], hidden[0], calls[0])

    def halves(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).round() / 2

    with Runs(block, hidden, calls, stages, workers=2) as runs:
        assert torch.equal(runs.seen(1, 0).inputs[Key("up.weight")], hidden[1].view(-1, 8))
        assert runs.seen(0, 0).inputs
        block.gate.register_forward_pre_hook(lambda _, args: (halves(args[0]),))  # `up` is past its own
        runs.round_inputs({"up.weight": halves, "gate.weight": halves})
        assert torch.equal(runs.seen(1, 0).inputs[Key("up.weight")], halves(hidden[1]).view(-1, 8))
        runs.release(0)
        runs.release(1)
        outputs = runs.outputs()
    for x, output in zip(hidden, outputs, strict=True):
        assert torch.equal(output, x + block.down(block.up(halves(x)) * block.gate.forward(halves(x))))


def chosen_for(stage: Stage, seen: Seen, layers: dict[str, StoredLayer]) -> dict[str, Chosen]:
    parameters = {name: name for name in layers}
    with Pool(1) as pool:
        return choose_inputs(
            stage, layers, parameters, lambda _: seen, [1], lambda _: torch.randn(4, 8), pool, "layers.0"
        )


def layer_of(name: str, scheme: Scheme = PRESETS["FP8"]) -> StoredLayer:
    module = name.removesuffix(".weight")
    return StoredLayer(name, module, module, "Linear", "linear", 4, 8, 1, False, torch.float32, scheme)


def test_experts_in_modules_of_their_own_share_a_scale_even_without_tokens():
    names = ("experts.0.up.weight", "experts.1.up.weight", "experts.2.up.weight")
    seen = Seen({Key(names[0]): torch.full((3, 8), 2.0), Key(names[2]): torch.full((1, 8), -448.0)})
    found = chosen_for(Stage(names, shared=False), seen, {name: layer_of(name) for name in names})
    assert {name: float(one.static.scale) for name, one in found.items()} == dict.fromkeys(names, 1.0)


def test_a_layer_that_text_never_reaches_is_named(readable: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stage = Stage(("a.weight",), shared=True)
    with pytest.raises(PlanError, match=r"^a: the calibration text never reaches it.*--keep a\b"):
        chosen_for(stage, Seen(), {"a.weight": layer_of("a.weight")})
    assert chosen_for(stage, Seen(), {"a.weight": layer_of("a.weight", PRESETS["FP8_DYNAMIC"])}) == {}
    find = block_job.find_stages

    def without_down(*args: Any) -> list[Stage]:
        return [replace(stage, reached="mlp.down_proj.weight" not in stage.names) for stage in find(*args)]

    monkeypatch.setattr(block_job, "find_stages", without_down)
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.down_proj: the calibration text never reaches it"):
        job(readable("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_search_is_for_static_inputs_only():
    with pytest.raises(RecipeError, match="range search is for static scales of inputs, not for weights"):
        make_recipe(scheme="W4A16", range="search")
    with pytest.raises(RecipeError, match="unknown range 'best'"):
        make_recipe(scheme="W4A16", input_range="best")
    (static,) = make_recipe(scheme="FP8", input_range="mse").assign([layer_of("a.weight")])
    assert static is not None
    assert static.input == replace(PRESETS["FP8"].input, range=MSE())  # type: ignore[type-var]
    assert make_recipe(scheme="FP8_DYNAMIC", input_range="mse").assign([layer_of("a.weight")]) == [
        PRESETS["FP8_DYNAMIC"]
    ]


def test_in_memory_there_is_no_text():
    with pytest.raises(SchemeError, match=r"use bitgrain\.quantize \(from disk"):
        bitgrain.quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128)), "FP8")
