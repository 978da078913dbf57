"""Calibrated jobs on tiny models: what is chosen and told, the same bytes in every way to get there, bad input."""

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
from bitgrain.errors import BitgrainError, ModelError, NumericsError, RecipeError, TextError
from bitgrain.pipeline.blockwise import whole
from bitgrain.pipeline.blockwise.layer import UNREACHED
from calibrated_jobs import HEAD, TEXT, TUNED, activations, layers_of, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
NEAREST = {"policy": "nearest", "tokens": 1}
EMBEDDING = "model.embed_tokens.weight"


def nothing_left(out: Path) -> bool:
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


@torch.no_grad()
def divergence(model: Any, base: Any, ids: torch.Tensor) -> float:
    """KL(base || model) per token, in nats."""
    p, q = (one(input_ids=ids).logits.double().log_softmax(-1) for one in (base, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- what is chosen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("llama", "balanced"), ("gpt2", "balanced"), ("mixtral", "balanced")),
        *(("llama", "fast"), ("phi", "fast"), ("gpt-oss", "fast"), ("llama-tied", "fast")),
    ],
)
def test_the_guard_holds_and_the_manifest_tells(readable: Make, text: Path, tmp_path: Path, name: str, recipe: str):
    rules = [] if "tied" in name or name in ("gpt2", "phi") else [HEAD]
    chosen = recipe_of(recipe, text, rules=rules, experts={"tokens": 1})
    result = run(readable(name), tmp_path / "out", chosen)
    layers = layers_of(result)
    assert len(layers) == len(result.plan.quantized)
    for tensor, layer in layers.items():
        figures = layer["figures"]
        assert layer["method"] in ("gptq", "rtn", "gptq + rtn")
        assert 0 <= figures["loss"] <= figures["rtn_loss"], tensor
        assert layer["sqnr_db"] > 5
        assert layer["notes"] == []
    better = [layer["figures"]["loss"] / layer["figures"]["rtn_loss"] for layer in layers.values()]
    assert sum(better) / len(better) < 0.8
    if rules:
        assert layers["lm_head.weight"]["scheme"] == "W8A16"
        assert layers["lm_head.weight"]["method"] == "gptq"
    told = result.manifest["calibration"]
    assert (told["tokens"], told["windows"], told["seqlen"], told["sources"]) == (120, 5, 24, ["text.txt"])
    assert str(tmp_path) not in str(dict(result.manifest))
    assert result.manifest["solver"] == chosen.solver

    loaded: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    model: Any = bitgrain.load(readable(name), device="cpu")
    ids = zoo.ids_for(loaded)
    assert 0 < divergence(loaded, model, ids) < 0.05
    assert not [check for check in bitgrain.verify(tmp_path / "out", against=readable(name)) if check.ok is False]


def test_an_encoder_is_calibrated_too(readable: Make, text: Path, tmp_path: Path):
    result = run(readable("bert"), tmp_path / "out", recipe_of("balanced", text, solver="gptq"))
    layers = layers_of(result)
    assert all(layer["figures"]["loss"] <= layer["figures"]["rtn_loss"] for layer in layers.values())
    assert layers["pooler.dense.weight"]["method"] == "gptq"  # outside the blocks
    with pytest.raises(ModelError, match=r"BertModel predicts no tokens; leave tuning\.end_to_end out"):
        run(readable("bert"), tmp_path / "tuned", recipe_of("best", text))
    assert nothing_left(tmp_path / "tuned")


def test_calibration_beats_rounding_on_a_trained_model(tmp_path: Path):
    from bitgrain.demo import demo_model_path

    source = demo_model_path()
    calibration = {"windows": 6, "seqlen": 48, "batch": 3}
    ids = calibration_windows("builtin", load_tokenizer(source), windows=6, seqlen=48).ids
    model: Any = bitgrain.load(source, device="cpu", dtype=torch.float32)
    found: dict[str, float] = {}
    for name in ("rtn", "fast", "balanced"):
        how: dict[str, Any] = {"solver": "rtn"} if name == "rtn" else {"recipe": name, "calibration": calibration}
        bitgrain.quantize(source, tmp_path / name, "W4A16", workers=2, **how)
        found[name] = divergence(
            bitgrain.load(tmp_path / name, device="cpu", dtype=torch.float32, execution="dequantize"), model, ids
        )
    assert found["balanced"] < 0.8 * found["fast"]
    assert found["fast"] < 0.8 * found["rtn"]
    (tmp_path / "text.txt").write_text(TEXT)
    scored = bitgrain.evaluate(tmp_path / "balanced", text=tmp_path / "text.txt", against=source, seqlen=48, windows=2)
    assert scored.kl is not None
    assert 0 < scored.kl < 0.05


def test_what_is_gathered_under_full_activations_is_of_the_original(readable: Make, text: Path, tmp_path: Path):
    """Parallel calibration: no layer sees what others lost, so block 0 of both and no other block agree."""
    results = {
        how: layers_of(run(readable("llama"), tmp_path / how, recipe_of("fast", text, **activations(how))))
        for how in ("full", "quantized")
    }
    first = "model.layers.0.self_attn.q_proj.weight"
    last = "model.layers.1.mlp.down_proj.weight"
    assert results["full"][first]["figures"] == results["quantized"][first]["figures"]
    assert results["full"][last]["figures"] != results["quantized"][last]["figures"]


# --- what calibration does not reach -----------------------------------------------------------------------------


def test_experts_without_tokens_are_rounded_and_named(readable: Make, text: Path, tmp_path: Path):
    """Logits g, -g, g / 2, 0: the largest is always one of the first two."""
    source = readable("mixtral", num_experts_per_tok=1)
    gate = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([gate, -gate, gate / 2, 0 * gate])
    changes = {f"model__layers__{i}__block_sparse_moe__gate__weight": rows.clone() for i in (0, 1)}
    model = zoo.edited(source, tmp_path / "model", **changes)
    for name, recipe in (
        ("plain", recipe_of("balanced", text, solver="gptq", experts=NEAREST)),
        ("nested", recipe_of("balanced", text, "NVFP4A16", solver="gptq", experts=NEAREST)),
    ):
        result = run(model, tmp_path / name, recipe)
        for tensor, layer in layers_of(result).items():
            idle = ".experts.2." in tensor or ".experts.3." in tensor
            assert layer["notes"] == ([UNREACHED] if idle else []), tensor
            assert layer["method"] == ("rtn" if idle else "gptq"), tensor
            assert ("loss" in layer["figures"]) == (not idle)
        assert bool(
            bitgrain.load(tmp_path / name, device="cpu", execution="dequantize")(input_ids=torch.arange(9)[None])
            .logits.isfinite()
            .all()
        )


def test_of_a_stack_the_experts_without_tokens_are_named(readable: Make, text: Path, tmp_path: Path):
    source = readable("gpt-oss")
    bias = torch.tensor([0.0, -1e4, 0.0, -1e4])
    model = zoo.edited(
        source, tmp_path / "model", **{f"model__layers__{i}__mlp__router__bias": bias + i for i in (0, 1)}
    )
    layers = layers_of(run(model, tmp_path / "out", recipe_of("fast", text, experts=NEAREST)))
    for tensor, layer in layers.items():
        stack = "experts" in tensor
        assert layer["notes"] == ([f"experts 1, 3: {UNREACHED}"] if stack else [])
        assert layer["method"] == ("gptq + rtn" if stack else "gptq")
        assert layer["figures"]["loss"] <= layer["figures"]["rtn_loss"]


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_blocks_that_text_never_reaches_are_rounded_and_named(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    """A vision tower: its blocks stand in front of those that text runs through."""
    tower = {"model_type": "clip_vision_model", **zoo.WIDTHS, "image_size": 16, "patch_size": 8}
    language = {"model_type": "llama", **zoo.GROUPED}
    settings = {"text_config": language, "vision_config": tower, "image_token_index": 127, "vision_feature_layer": -1}
    monkeypatch.setitem(zoo.ZOO, "llava", ("LlavaForConditionalGeneration", settings))
    model = zoo.save("llava", tmp_path / "llava")
    zoo.save_tokenizer(model)
    keys = [
        f"{path}.self_attn.k_proj.weight" for path in ("vision_tower.encoder.layers.1", "language_model.model.layers.1")
    ]
    tensors = zoo.read_tensors(model)  # with keys that are larger than queries, one scale for both is another one
    model = zoo.edited(model, tmp_path / "edited", **{key.replace(".", "__"): 9 * tensors[key] for key in keys})
    result = run(model, tmp_path / "out", recipe_of("balanced", text, scheme, solver="gptq"))
    for tensor, layer in layers_of(result).items():
        seen = tensor.startswith("language_model")
        assert layer["notes"] == ([] if seen else [UNREACHED]), tensor
        assert layer["method"] == ("gptq" if seen else "rtn")
    if scheme == "NVFP4A16":  # engines join q, k and v under one scale, wherever they are
        after = zoo.read_tensors(tmp_path / "out")
        for path in ("vision_tower.encoder.layers.1", "language_model.model.layers.1"):
            scales = {float(after[f"{path}.self_attn.{part}_proj.weight_global_scale"]) for part in "qkv"}
            assert len(scales) == 1
    loaded: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    assert bool(loaded(input_ids=torch.arange(9)[None]).logits.isfinite().all())


# --- tuning ------------------------------------------------------------------------------------------------------


INPUTS_TOO = {
    "weight": {"format": "int4", "granularity": "per_group(128)"},
    "input": {"format": "int4", "granularity": "per_token", "dynamic": True},
}


@pytest.mark.parametrize(
    ("scheme", "rotated"),
    [("W4A16", False), (INPUTS_TOO, False), (INPUTS_TOO, True)],
    ids=["weights", "inputs-too", "rotated"],
)
def test_best_tunes_and_tells(readable: Make, text: Path, tmp_path: Path, scheme: str | dict[str, Any], rotated: bool):
    tuning = {"end_to_end": {"steps": 6, "warmup": 0, "checks": 6, "validation": 0}}
    cheap: dict[str, Any] = {"solver": "gptq", "transforms": ["rotate"] if rotated else []}
    head = [{"match": "lm_head", "scheme": scheme}]
    run(readable("llama"), tmp_path / "balanced", recipe_of("balanced", text, rules=head, **cheap))
    tuned = recipe_of("best", text, rules=head, tuning=tuning, **cheap)
    result = run(readable("llama"), tmp_path / "best", tuned)
    told = result.manifest["tuning"]
    assert told["kl_after"] <= told["kl_before"]
    assert (told["kl_after"] < told["kl_before"]) == (told["steps"] > 0)
    before, after = zoo.read_tensors(tmp_path / "balanced"), zoo.read_tensors(tmp_path / "best")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if scheme == "W4A16":  # the coarse inputs of the other head drown what so few steps can do
        assert told["steps"] > 0
        assert any(name.endswith("weight_scale") for name in changed)
        assert "model.norm.weight" in changed
    assert not any(name.endswith("weight_packed") for name in changed)  # codes stay
    kept = {name for name in before if name.endswith("norm.weight")} | ({EMBEDDING} if rotated else set())
    assert set(result.manifest["changed"]) == kept
    checks = {one.name: one for one in bitgrain.verify(tmp_path / "best", against=readable("llama"))}
    assert all(one.ok is not False for one in checks.values())
    assert f"{len(kept)} were changed by transforms or tuning" in checks["kept tensors"].detail
    if not rotated:
        zoo.edited(readable("llama"), tmp_path / "other", model__embed_tokens__weight=torch.ones(128, 128))
        (wrong,) = [one for one in bitgrain.verify(tmp_path / "best", against=tmp_path / "other") if one.ok is False]
        assert wrong.detail == f"{EMBEDDING} differs from the original"
    # what is told is what is written: the divergence from the full-precision model, head and all, on this text
    ids = calibration_windows(str(text), load_tokenizer(readable("llama")), windows=5, seqlen=24).ids
    model: Any = bitgrain.load(readable("llama"), device="cpu")
    batches = ids.split(whole.WINDOWS)
    for name, figure in (("balanced", told["kl_before"]), ("best", told["kl_after"])):
        loaded: Any = bitgrain.load(tmp_path / name, device="cpu", execution="dequantize")
        found = [divergence(loaded, model, batch) for batch in batches]
        assert sum(found) / len(found) == pytest.approx(figure, rel=1e-3, abs=2e-7)  # float32


def test_joined_experts_with_other_schemes_and_quantized_inputs_are_tuned(readable: Make, text: Path, tmp_path: Path):
    """w1 and w3 of all experts are one parameter in memory, and the inputs of each product are rounded."""
    source = readable("mixtral", num_local_experts=2)
    experts = "model.layers.0.block_sparse_moe.experts"
    weights_only = [{"match": f"{experts}.1.w1", "keep": True}, {"match": f"{experts}.0.w3", "scheme": "W8A16"}]
    for scheme, rules in (("W4A16", weights_only), ("W8A8", [])):
        settings = recipe_of("best", text, scheme, solver="gptq", rules=rules, **TUNED)
        result = run(source, tmp_path / scheme, settings)
        assert result.manifest["tuning"]["kl_after"] <= result.manifest["tuning"]["kl_before"]
        (check,) = [one for one in bitgrain.verify(tmp_path / scheme, against=source) if one.name == "kept tensors"]
        assert check.ok, check.detail
    kept = f"{experts}.1.w1.weight"
    assert torch.equal(zoo.read_tensors(tmp_path / "W4A16")[kept], zoo.read_tensors(source)[kept])


# --- bad input ---------------------------------------------------------------------------------------------------


def test_nan_weights_are_refused_and_nothing_is_left(readable: Make, text: Path, tmp_path: Path):
    tensors = zoo.read_tensors(readable("llama"))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"):
        bad = tensors[name].clone()
        bad.view(-1)[5] = float("nan")
        model = zoo.edited(readable("llama"), tmp_path / f"model-{name}", **{name.replace(".", "__"): bad})
        with pytest.raises(NumericsError, match="NaN") as caught:
            run(model, tmp_path / "out", recipe_of("balanced", text, solver="gptq"))
        assert "model.layers" in str(caught.value) or "model.norm" in str(caught.value)
        assert nothing_left(tmp_path / "out")


def test_activations_that_overflow_are_refused_by_name(readable: Make, text: Path, tmp_path: Path):
    tensors = zoo.read_tensors(readable("llama"))
    name = "model.layers.0.self_attn.v_proj.weight"
    model = zoo.edited(readable("llama"), tmp_path / "model", **{name.replace(".", "__"): 1e30 * tensors[name]})
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight: its inputs hold NaN or Inf"):
        run(model, tmp_path / "out", recipe_of("fast", text))
    assert nothing_left(tmp_path / "out")


def test_a_model_of_two_stacks_is_refused_and_nothing_is_left(text: Path, tmp_path: Path):
    config = transformers.T5Config(
        d_model=128, d_ff=128, d_kv=32, num_layers=2, num_heads=4, vocab_size=128, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    zoo.save_tokenizer(tmp_path / "t5")
    with pytest.raises(ModelError, match="is an encoder and a decoder"):
        run(tmp_path / "t5", tmp_path / "out", recipe_of("fast", text))
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "settings", "kind", "words"),
    [
        ("balancd", {}, RecipeError, r"no recipe file balancd, and no recipe of that name \(fast, balanced, best, "),
        ("fast", {"solver": "gptqq"}, RecipeError, "unknown solver 'gptqq'; known solvers: .*gptq"),
        ("fast", {"solver": {"name": "gptq", "dampening": 1}}, RecipeError, "no setting 'dampening'; it has: damping"),
        ("fast", {"solver": {"name": "gptq", "sweeps": "six"}}, RecipeError, "sweeps is a int, not 'six'"),
        ("fast", {"solver": {"name": "gptq", "damping": None}}, RecipeError, "damping is a float, not None"),
        ("fast", {"solver": {"name": "gptq", "candidates": [3]}}, RecipeError, "one of them is a str, not 3"),
        ("fast", {"solver": {"name": "gptq", "candidates": ["best"]}}, RecipeError, "unknown range 'best'"),
        ("fast", {"solver": {"name": "gptq", "order": "desc"}}, RecipeError, "order is one of act, group, none"),
        ("balanced", {"target": {"inputs": 2}}, RecipeError, r"target\.inputs: .*less than or equal to 1"),
        ("balanced", {"target": {"output": 1}}, RecipeError, r"unknown key 'target\.output'"),
        ("best", {"tuning": {"end_to_end": {"step": 3}}}, RecipeError, "tuning.end_to_end has no setting 'step'"),
        ("best", {"tuning": {"end_to_end": {"decay": "cubic"}}}, RecipeError, "the decays linear and cosine"),
        ("best", {"tuning": {"end_to_end": {"steps": -1}}}, RecipeError, "steps, warmup, validation >= 0"),
        ("best", {"tuning": {"blockwise": {"scales": "free"}}}, RecipeError, "'kept', 'factor' or 'range', not 'free'"),
        ("best", {"tuning": {"endtoend": {}}}, RecipeError, "unknown key 'tuning.endtoend'; did you mean 'end_to_end'"),
        ("fast", {"calibration": {"windos": 3}}, RecipeError, r"'calibration\.windos'; did you mean 'windows'"),
        ("fast", {"calibration": {"windows": 0}}, RecipeError, r"calibration\.windows: .*greater than or equal to 1"),
        ("fast", {"calibration": {"windows": 400}}, TextError, "enough for .* of the 400 windows of 24 asked for"),
        ("fast", {"calibration": {"text": "no/such.txt"}}, TextError, "no/such.txt"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    readable: Make,
    text: Path,
    tmp_path: Path,
    recipe: str,
    settings: dict[str, Any],
    kind: type[BitgrainError],
    words: str,
):
    with pytest.raises(kind, match=words):
        bitgrain.plan(readable("llama"), recipe=recipe_of(recipe, text, **settings))
    assert nothing_left(tmp_path / "out")


def test_a_named_recipe_needs_a_scheme_and_a_tokenizer(readable: Make, text: Path, tiny: Make, tmp_path: Path):
    with pytest.raises(RecipeError, match="the recipe balanced holds for every scheme: say which"):
        bitgrain.quantize(readable("llama"), tmp_path / "out", recipe="balanced")
    with pytest.raises(RecipeError, match="unknown scheme 'W5A17'"):
        bitgrain.quantize(readable("llama"), tmp_path / "out", "W5A17", calibration=text)
    with pytest.raises(TextError, match="tokenizer missing"):
        bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", recipe="fast", calibration=text)
    assert nothing_left(tmp_path / "out")


def test_a_text_that_is_a_little_short_is_told(readable: Make, text: Path, tmp_path: Path):
    result = run(readable("llama"), tmp_path / "out", recipe_of("fast", text, calibration={"windows": 60}))
    told = result.manifest["calibration"]
    assert told["windows"] < told["windows_asked"] == 60
    assert any("enough for" in note and "less accurate" in note for note in result.manifest["notes"])
