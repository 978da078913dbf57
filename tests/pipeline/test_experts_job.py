"""Jobs on models with experts: all of them are accounted for, and those that few tokens reach are treated as asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import calibration_windows
from bitgrain.errors import ModelError, RecipeError, ResumeError
from bitgrain.pipeline.blockwise import block as block_job
from bitgrain.pipeline.experts import ALONE, BORROWED, FEW
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.progress import Progress
from bitgrain.recipes import make_recipe
from calibrated_jobs import activations, layers_of, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
EVERY = ["mixtral", "qwen3-moe", "gpt-oss", *zoo.EXPERTS]
POLICIES = ["borrow", "all", "nearest"]


def recipe_for(text: Path, policy: str, tokens: int = 64, **changes: Any) -> Any:
    changes = {"on_indivisible": "channel", **activations("full"), **changes}
    return recipe_of("fast", text, experts={"policy": policy, "tokens": tokens}, **changes)


def rerouted(source: Path, folder: Path) -> Path:
    """A mixtral whose first two experts get all tokens: logits g, -g, and 0 twice. With top 1 only."""
    gate = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([gate, -gate, 0 * gate, 0 * gate])
    names = [f"model__layers__{i}__block_sparse_moe__gate__weight" for i in (0, 1)]
    return zoo.edited(source, folder, **{name: rows.clone() for name in names})


@torch.no_grad()
def routed(folder: Path, text: Path) -> dict[str, list[int]]:
    """How many tokens the routers of transformers' own model send to each expert."""
    model: Any = bitgrain.load(folder, device="cpu", execution="dequantize")
    found: dict[str, list[int]] = {}

    def counting(name: str, count: int) -> Callable[..., None]:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = next(x for x in (*args, *kwargs.values()) if not x.is_floating_point())
            found[name] = torch.bincount(index.flatten(), minlength=count).tolist()

        return before

    for name, module in model.named_modules():
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter):
            module.register_forward_pre_hook(counting(name, len(module.down_proj)), with_kwargs=True)
    model(input_ids=calibration_windows(str(text), load_tokenizer(folder), windows=5, seqlen=24).ids)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_every_expert_of_every_architecture_is_accounted_for(name: str, readable: Make, text: Path, tmp_path: Path):
    """Every parameter is quantized or kept bit by bit under its own name; experts all, routers and their like never."""
    source, out = readable(name, **({} if name in zoo.EXPERTS else {"num_hidden_layers": 1})), tmp_path / "out"
    result = run(source, out, recipe_for(text, "borrow", 40))
    anatomy, quantized = result.plan.anatomy, result.plan.quantized
    assert anatomy.missing == anatomy.unexpected == ()
    before, after = zoo.read_tensors(source), zoo.read_tensors(out)
    model: Any = getattr(transformers, {**zoo.ZOO, **zoo.EXPERTS}[name][0]).from_pretrained(source)
    in_memory = {id(p): p.numel() for n, p in model.named_parameters() if ".experts." in n and "bias" not in n}
    experts = [weight for weight in anatomy.weights if weight.role == "expert"]
    assert sum(weight.elements for weight in experts) == sum(in_memory.values()) > 0
    assert {weight.tensor for weight in experts} <= quantized.keys()
    linears = {weight.tensor for weight in anatomy.weights if weight.role == "linear"}
    assert quantized.keys() == linears | {weight.tensor for weight in experts}
    assert any("shared" in tensor for tensor in quantized) == (name in ("qwen2-moe", "deepseek-v3", "llama4"))
    gates = [tensor for tensor in before if tensor.endswith(("gate.weight", "router.weight", "router.layer.weight"))]
    gates += [tensor for tensor in before if tensor.endswith("shared_expert_gate.weight")]
    assert gates
    for tensor in before.keys() - quantized.keys():
        assert torch.equal(after[tensor], before[tensor])
    assert not quantized.keys() & set(gates)
    stored = QuantizedCheckpoint(out)
    assert stored.originals().keys() == before.keys()
    for tensor in quantized:
        assert stored.dense(tensor).shape == before[tensor].shape
    assert not [check for check in bitgrain.verify(out, against=source) if check.ok is False]
    # each has been solved with what calibration knows of it
    for tensor, layer in layers_of(result).items():
        assert layer["method"] in ("gptq", "rtn", "gptq + rtn")
        assert layer["figures"]["loss"] <= layer["figures"]["rtn_loss"], tensor
        if layer["role"] != "expert":
            assert "experts" not in layer
            continue
        few = [i for i, tokens in enumerate(layer["experts"]["tokens"]) if tokens < 40]
        assert layer["experts"]["short"] == few
        assert bool(layer["notes"]) == bool(few)
        assert all((ALONE if name == "llama4" else BORROWED) in note for note in layer["notes"])
    if name != "llama4":
        counts = {path: told["tokens"] for path, told in result.manifest["experts"].items()}
        assert counts == routed(source, text)


def test_a_model_that_runs_all_experts_at_once_cannot_route_to_all(readable: Make, text: Path, tmp_path: Path):
    """llama4: each expert sees its own tokens, the others as zeros, which are not counted."""
    told = run(readable("llama4"), tmp_path / "out", recipe_for(text, "nearest", 1)).manifest["experts"]
    (layer,) = told.values()
    assert sum(layer["tokens"]) == 5 * 24  # one expert a token
    with pytest.raises(ModelError, match="not told by indices"):
        run(readable("llama4"), tmp_path / "all", recipe_for(text, "all"))
    assert not (tmp_path / "all").exists()


def test_policies_decide_what_few_tokens_reach(readable: Make, text: Path, tmp_path: Path):
    source = readable("mixtral", num_experts_per_tok=1)
    model = rerouted(source, tmp_path / "model")
    found = {policy: run(model, tmp_path / policy, recipe_for(text, policy, 8)) for policy in POLICIES}
    rounded = run(model, tmp_path / "rtn", recipe_for(text, "borrow", solver="rtn"))
    assert "experts" not in rounded.manifest
    tensors = {policy: zoo.read_tensors(tmp_path / policy) for policy in [*POLICIES, "rtn"]}
    for tensor, layer in layers_of(found["borrow"]).items():
        if layer["role"] != "expert":
            assert len({layers_of(one)[tensor]["sqnr_db"] for one in found.values()}) == 1
            continue
        idle = ".experts.2." in tensor or ".experts.3." in tensor
        for policy, one in found.items():
            told = layers_of(one)[tensor]
            assert told["experts"]["policy"] == policy
            assert told["experts"]["threshold"] == 8
            assert told["experts"]["short"] == ([0] if idle else [])
            assert (told["experts"]["tokens"] == [0]) == idle
            assert told["method"] == ("rtn" if idle and policy == "nearest" else "gptq")
        codes = {policy: tensors[policy][tensor + "_packed"] for policy in tensors}
        assert torch.equal(codes["nearest"], codes["rtn"]) == idle
        assert torch.equal(codes["nearest"], codes["borrow"]) == (not idle)
        assert torch.equal(codes["all"], codes["borrow"]) == idle  # of none of its own, all is borrowed
    for policy, remedy in (("borrow", "they borrow"), ("all", "they were shown"), ("nearest", "they are rounded")):
        notes = found[policy].manifest["notes"]
        assert any(f"no calibration token reached 2 of 4 experts (2, 3): {remedy}" in note for note in notes)
        assert remedy in (tmp_path / policy / "README.md").read_text()
        assert any("experts" in note for note in found[policy].plan.notes)


def test_where_all_is_asked_the_router_decides_only_what_flows_on(readable: Make, text: Path, tmp_path: Path):
    """Two models that differ in their routers have the same experts in the first block; and no other layer knows."""
    source = readable("mixtral", num_experts_per_tok=1)
    models = {"plain": source, "rerouted": rerouted(source, tmp_path / "model")}
    for name, model in models.items():
        run(model, tmp_path / name, recipe_for(text, "all"))
    run(source, tmp_path / "nearest", recipe_for(text, "nearest"))
    plain, other, nearest = (zoo.read_tensors(tmp_path / name) for name in ("plain", "rerouted", "nearest"))
    first = [name for name in plain if ".layers.0." in name and ".experts." in name]
    assert len(first) == 4 * 3 * 3
    assert all(torch.equal(plain[name], other[name]) for name in first)
    assert not all(torch.equal(plain[name], nearest[name]) for name in first)
    rest = [name for name in plain if ".experts." not in name]
    assert all(torch.equal(plain[name], nearest[name]) for name in rest)


def test_an_expert_few_tokens_reached_is_told_of_with_their_number(readable: Make, text: Path, tmp_path: Path):
    heard: list[str] = []

    class Listening(Progress):
        def advance(self, amount: float = 1.0, note: str = "") -> None:
            heard.append(note)

    result = run(readable("gpt-oss"), tmp_path / "out", recipe_for(text, "nearest", 50), progress=Listening())
    for path, told in result.manifest["experts"].items():
        few = {i: count for i, count in enumerate(told["tokens"]) if count < 50}
        assert list(few) == told["short"]
        listed = ", ".join(f"{i}: {count}" for i, count in sorted(few.items(), key=lambda one: one[1]))
        message = f"{path}: fewer than 50 tokens reached {len(few)} of 4 experts ({listed}): they are rounded"
        assert any(note.startswith(message) for note in result.manifest["notes"]) == bool(few)
        layer = layers_of(result)[f"{path}.down_proj"]
        numbers = ", ".join(map(str, few))
        assert layer["notes"] == ([f"expert{'s' * (len(few) > 1)} {numbers}: {FEW}"] if few else [])
        assert any(f"{len(few)} experts hardly reached" in note for note in heard) == bool(few)
    assert any(told["short"] for told in result.manifest["experts"].values())


def test_static_inputs_of_experts_that_no_token_reached_are_those_of_the_others(
    readable: Make, text: Path, tmp_path: Path
):
    """Engines run all experts of a kind with one scale, which is of all tokens that reached any."""
    model = rerouted(readable("mixtral", num_experts_per_tok=1), tmp_path / "model")
    run(model, tmp_path / "out", recipe_for(text, "nearest", 1, scheme="FP8"))
    scales = {k: float(t) for k, t in zoo.read_tensors(tmp_path / "out").items() if k.endswith("input_scale")}
    for block in (0, 1):
        for part in ("w1", "w2", "w3"):
            found = {v for k, v in scales.items() if f".layers.{block}." in k and ".experts." in k and f".{part}." in k}
            assert len(found) == 1


@pytest.mark.parametrize(("name", "policy"), [("mixtral", "borrow"), ("gpt-oss", "all")])
def test_neither_workers_nor_a_kill_change_the_bytes(
    name: str, policy: str, readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Under the balanced recipe, where each stage sees what the quantized stages before it give."""
    recipe = recipe_of("balanced", text, solver="gptq", experts={"policy": policy})
    run(readable(name), tmp_path / "one", recipe)
    expected = zoo.contents(tmp_path / "one")
    run(readable(name), tmp_path / "three", recipe, workers=3)
    assert zoo.contents(tmp_path / "three") == expected
    solve = block_job.BlockSolver.solve

    def killed(self: block_job.BlockSolver, index: int, *args: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return solve(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(block_job.BlockSolver, "solve", killed)
        with pytest.raises(KeyboardInterrupt):
            run(readable(name), tmp_path / "killed", recipe)
    other = recipe_of("balanced", text, solver="gptq", experts={"policy": policy, "tokens": 3})
    with pytest.raises(ResumeError, match="experts"):
        run(readable(name), tmp_path / "killed", other)
    run(readable(name), tmp_path / "killed", recipe)
    assert zoo.contents(tmp_path / "killed") == expected


def test_of_experts_that_are_kept_nothing_is_told(readable: Make, text: Path, tmp_path: Path):
    rules = [{"match": "re:.*experts[.]1[.].*", "keep": True}]
    result = run(readable("mixtral", num_hidden_layers=1), tmp_path / "out", recipe_for(text, "borrow", rules=rules))
    (told,) = result.manifest["experts"].values()
    assert [count is None for count in told["tokens"]] == [False, True, False, False]
    assert not any("no calibration token" in note for note in result.manifest["notes"])
    assert len(result.plan.quantized) == 4 + 3 * 3


# --- what is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ("most", "experts.policy: Input should be 'borrow', 'all' or 'nearest'"),
        ({"tokens": -3}, "experts.tokens: Input should be greater than or equal to 1"),
        ({"tokens": 0}, "experts.tokens: Input should be greater than or equal to 1"),
        ({"polcy": "all"}, "unknown key 'experts.polcy'; did you mean 'policy'"),
    ],
)
def test_a_policy_that_does_not_exist(experts: Any, words: str, readable: Make):
    with pytest.raises(RecipeError, match=words):
        bitgrain.plan(readable("mixtral"), "W4A16", experts=experts)


def test_what_is_asked_replaces_what_the_recipe_says(readable: Make, text: Path, tmp_path: Path):
    source, recipe = readable("mixtral"), make_recipe(scheme="W4A16", solver="gptq", experts={"tokens": 7})
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    chosen = bitgrain.plan(source, recipe=recipe, experts="nearest", calibration=calibration).recipe.experts
    assert (chosen.policy, chosen.tokens) == ("nearest", 7)
    (tmp_path / "recipe.yaml").write_text("scheme: W4A16\nsolver: gptq\nexperts: {policy: all}\n")
    planned = bitgrain.plan(source, recipe=tmp_path / "recipe.yaml", calibration=calibration, experts={"tokens": 9})
    assert (planned.recipe.experts.policy, planned.recipe.experts.tokens) == ("all", 9)
    assert "calibration is routed to all experts" in planned.notes
    dense = bitgrain.plan(readable("llama"), recipe=tmp_path / "recipe.yaml", calibration=calibration)
    assert not any("expert" in note for note in dense.notes)
    assert not any("expert" in note for note in bitgrain.plan(source, "W4A16").notes if "kept" not in note)
    assert json.loads(json.dumps(planned.recipe.model_dump()))["experts"] == {"policy": "all", "tokens": 9}
