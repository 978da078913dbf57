"""The plan knows it all before a weight is touched: bytes, coverage, units, engines, every problem."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.errors import PlanError, RecipeError, TextError
from bitgrain.pipeline import planning
from bitgrain.pipeline.engine_rules import VLLM
from bitgrain.pipeline.engines import Verdict
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.plan_json import plan_to_json
from bitgrain.pipeline.planning import make_plan
from bitgrain.recipes import Scheme, make_recipe

Tiny = Callable[[str], Path]


def plan(folder: Path, scheme: Any = "W4A16", rules: tuple[dict[str, Any], ...] = (), **more: Any) -> Plan:
    settings = {key: more.pop(key) for key in ("on_indivisible", "calibration") if key in more}
    return make_plan(folder, make_recipe(scheme=scheme, rules=list(rules), **settings), **more)


def verdict(found: Plan, engine: str) -> Verdict:
    return next(one for one in found.engines if one.engine == engine)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss", "bert"])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "NVFP4"])
@pytest.mark.parametrize("shard", [5_000_000_000, 150_000])
def test_predicted_bytes_are_written_bytes(tiny: Tiny, tmp_path: Path, name: str, scheme: str, shard: int):
    found = plan(tiny(name), scheme, max_shard_bytes=shard, workers=1)
    written = bitgrain.quantize(tiny(name), tmp_path / "out", scheme, max_shard_bytes=shard, workers=1)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model*")}
    assert found.bytes_after == sum(files.values())
    assert {one.file: one.nbytes for one in found.shards} == {
        file: size for file, size in files.items() if file.endswith(".safetensors")
    }
    assert ("model.safetensors.index.json" in files) == (len(found.shards) > 1) == (shard == 150_000)
    assert found.bytes_before == sum(tensor.nbytes for tensor in zoo.read_tensors(tiny(name)).values())
    on_disk = zoo.read_tensors(tmp_path / "out")
    planned = {placed.spec.name: placed.spec for one in found.shards for placed in one.tensors}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in on_disk.items()} == {
        n: (spec.dtype, spec.shape) for n, spec in planned.items()
    }
    stored = sum(tensor.nbytes for tensor in on_disk.values())
    parameters = sum(tensor.numel() for tensor in zoo.read_tensors(tiny(name)).values())
    assert found.bits_per_parameter == pytest.approx(8 * stored / parameters)
    assert written.manifest["bytes_after"] == found.bytes_after


@pytest.mark.parametrize("name", zoo.ZOO)
def test_coverage_counts_every_parameter_once(tiny: Tiny, name: str):
    tensors = zoo.read_tensors(tiny(name))
    rule = {"match": "re:.*[01].*(down_proj|c_proj|dense|fc2|w2|experts).*", "scheme": "W8A16"}
    found = plan(tiny(name), rules=(rule,))
    coverage = found.coverage()
    assert sum(coverage.values()) == sum(tensor.numel() for tensor in tensors.values())
    by_scheme = Counter[str]()
    for tensor, layer in found.quantized.items():
        by_scheme[layer.scheme.name] += tensors[tensor].numel()
    assert {key: value for key, value in coverage.items() if key != "kept"} == by_scheme
    assert set(by_scheme) >= {"W8A16"}


def test_bits_per_weight_are_the_papers(tiny: Tiny):
    """int4 in groups of 128 with 16-bit scales: 4.125; NVFP4: 4.5 and the shared scales; MXFP4: 4.25."""
    folder = tiny("llama")
    assert plan(folder, "W4A16").bits_per_weight == pytest.approx(4 + 32 / 128, rel=0.01)  # this one is float32
    assert plan(folder, "MXFP4A16").bits_per_weight == pytest.approx(4.25)
    assert plan(folder, "NVFP4A16").bits_per_weight == pytest.approx(4.5, rel=0.01)
    assert plan(folder, "W8A8", rules=({"match": "Linear", "keep": True},)).bits_per_weight == 0


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("size", [1, 200_000, 64_000_000])
def test_units_hold_every_tensor_once_and_never_part_fused_groups(
    tiny: Tiny, name: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planning, "_UNIT_BYTES", size)
    found = plan(tiny(name), "W8A16")
    entries = found.checkpoint.entries
    assert Counter(tensor for unit in found.units for tensor in unit.tensors) == Counter(list(entries))
    assert len({unit.name for unit in found.units}) == len(found.units)
    unit_of = {tensor: unit.name for unit in found.units for tensor in unit.tensors}
    fused: dict[str, set[str]] = {}
    for weight in found.anatomy.weights:
        if weight.fused:
            fused.setdefault(weight.fused, set()).add(unit_of[weight.tensor])
    assert all(len(units) == 1 for units in fused.values())
    for unit in found.units:
        assert len({found.anatomy.block_of[tensor] for tensor in unit.tensors}) == 1
        assert unit.nbytes == sum(entries[tensor].nbytes for tensor in unit.tensors)
        groups = {w.fused or w.tensor for w in found.anatomy.weights if w.tensor in unit.tensors}
        assert unit.nbytes <= size or len(groups) <= 1 or size == 64_000_000
    assert found.peak_ram > 0
    if size == 1:
        assert len(found.units) > len(found.anatomy.block_names) + 1


def test_fused_groups_of_llama_share_a_unit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "_UNIT_BYTES", 1)
    units = [set(unit.tensors) for unit in plan(tiny("llama")).units]
    qkv = {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    assert qkv in units
    assert {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")} in units


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """hidden 96, intermediate 128: groups of 128 divide only down_proj."""
    return zoo.save("llama", tmp_path / "narrow", hidden_size=96, intermediate_size=128, head_dim=24)


def test_indivisible_is_a_problem_by_default(narrow: Path):
    found = plan(narrow)
    assert len(found.problems) == 2 * 6  # all but down_proj, in both blocks
    assert found.problems[0] == (
        "model.layers.0.mlp.gate_proj: weight per_group(128) does not divide 96 input features; "
        "choose --on-indivisible pad, channel or skip"
    )
    with pytest.raises(PlanError) as caught:
        found.require_possible()
    assert all(problem in str(caught.value) for problem in found.problems)


def test_indivisible_channel(narrow: Path):
    found = plan(narrow, on_indivisible="channel")
    assert not found.problems
    schemes = {p.weight.module.rpartition(".")[2]: p.layer.scheme.name for p in found.layers if p.layer}
    assert schemes["q_proj"] == "W4A16/channel"
    assert schemes["down_proj"] == "W4A16"
    assert found.layout.name == "compressed-tensors"
    assert any("12 layers do not get the scheme as asked: model.layers.0" in note for note in found.notes)
    assert set(found.coverage()) == {"W4A16", "W4A16/channel", "kept"}


def test_indivisible_skip(narrow: Path):
    found = plan(narrow, on_indivisible="skip")
    assert not found.problems
    assert {p.weight.module.rpartition(".")[2] for p in found.layers if p.layer} == {"down_proj"}
    kept = next(p for p in found.layers if p.weight.module.endswith("q_proj"))
    assert kept.note == "kept, W4A16: weight per_group(128) does not divide 96 input features"


def test_indivisible_pad_takes_our_own_layout(narrow: Path):
    found = plan(narrow, on_indivisible="pad")
    assert not found.problems
    assert found.layout.name == "bitgrain"
    assert set(found.coverage()) == {"W4A16", "kept"}
    assert "written in the bitgrain layout, because per_group(128) does not divide the 96 inputs" in found.notes[0]
    assert "(and 11 more such layers)" in found.notes[0]


def test_fp4_cannot_go_by_channel(narrow: Path):
    found = plan(narrow, "MXFP4", on_indivisible="channel")
    assert not found.problems  # 96 = 3 * 32
    odd = plan(narrow, {"weight": {"format": "fp4_e2m1", "granularity": "per_group(64)"}}, on_indivisible="channel")
    assert "model.layers.0.mlp.gate_proj: weight per_group(64) does not divide 96" in odd.problems[0]
    assert "use --on-indivisible skip" in odd.problems[0]


@pytest.mark.parametrize(
    ("scheme", "engine", "loads", "words"),
    [
        ("W4A16", "vLLM", True, ""),
        ("W8A8", "vLLM", True, ""),
        ("W8A8", "transformers", True, "divides int8 activations by 127.5"),
        ("FP8_DYNAMIC", "SGLang", True, ""),
        ("NVFP4", "transformers", True, ""),
        ("W3A16", "vLLM", True, "3-bit weights like these run in its Humming kernels"),
        ("W3A16", "SGLang", False, "no kernel for 3-bit weights, only 4 and 8"),
        ("W3A16", "transformers", True, ""),
        ("W2A16", "SGLang", False, "no kernel for 2-bit weights"),
        ("W8A16_TENSOR", "vLLM", False, "scales per channel or per group"),
        ("W8A16_TENSOR", "SGLang", False, "scales per channel or per group"),
        ("W4A8", "vLLM", True, "Humming"),
        ("W4A8", "SGLang", False, "no kernel for 4-bit weights with int8 activations"),
        ("W4AFP8", "SGLang", False, "no kernel for 4-bit weights with FP8 activations"),
        ("MXFP4A16", "SGLang", False, "MXFP4 is run for experts only"),
        ("W8A16INT16", "vLLM", False, "quant_method bitgrain is read by bitgrain.load only"),
        ("W8A16INT16", "transformers", False, "quant_method bitgrain"),
    ],
)
def test_verdicts_on_llama(tiny: Tiny, scheme: str, engine: str, loads: bool, words: str):
    found = plan(tiny("llama"), scheme)
    assert verdict(found, engine).loads is loads
    assert words in "; ".join(verdict(found, engine).reasons)
    assert bool(verdict(found, engine).reasons) >= (not loads)
    assert verdict(found, "bitgrain").loads


def test_mixed_schemes_in_a_fused_group_do_not_load_in_vllm(tiny: Tiny):
    for rule in ({"match": "q_proj", "scheme": "W8A16"}, {"match": "layers.1.self_attn.k_proj", "keep": True}):
        found = plan(tiny("llama"), rules=(rule,))
        assert not verdict(found, "vLLM").loads
        assert any("fuses have different schemes: model.layers." in r for r in verdict(found, "vLLM").reasons)
        assert verdict(found, "transformers").loads
    whole = plan(tiny("llama"), rules=({"match": "re:.*(q|k|v)_proj", "scheme": "W8A16"},))
    assert verdict(whole, "vLLM").loads


def test_packed_zero_points_beside_another_scheme_do_not_load_in_transformers(tiny: Tiny):
    alone = plan(tiny("llama"), "W4A16_ASYM")
    assert verdict(alone, "transformers").loads
    beside = plan(tiny("llama"), "W4A16_ASYM", rules=({"match": "down_proj", "scheme": "W8A16"},))
    assert not verdict(beside, "transformers").loads
    assert "packed zero points" in verdict(beside, "transformers").reasons[0]


@pytest.mark.parametrize(
    ("scheme", "loads", "words"),
    [
        ("W4A16", True, ""),
        ("NVFP4", False, "without their global scale, silently wrong"),
        ("W4A16_ASYM", False, "experts with zero points"),
        ("W8A8", False, "int8 experts with quantized activations"),
        ("FP8_BLOCK", False, "block-wise FP8 experts"),
        ("FP8_DYNAMIC", True, "does not quantize the inputs of experts"),
    ],
)
def test_verdicts_on_experts(tiny: Tiny, scheme: str, loads: bool, words: str):
    found = verdict(plan(tiny("qwen3-moe"), scheme), "transformers")
    assert found.loads is loads
    assert words in "; ".join(found.reasons)


@pytest.mark.parametrize(("name", "why"), [("gpt2", "as [in, out] (Conv1D)"), ("gpt-oss", "stored as [in, out]")])
def test_what_compressed_tensors_cannot_hold_is_for_bitgrain_only(tiny: Tiny, name: str, why: str):
    found = plan(tiny(name))
    assert found.layout.name == "bitgrain"
    assert [v.engine for v in found.engines if v.loads] == ["bitgrain"]
    assert "written in the bitgrain layout, because " in found.notes[0]
    assert why in found.notes[0]
    assert not found.problems


def test_notes_say_what_is_kept_and_what_becomes_bfloat16(tiny: Tiny):
    (note,) = plan(tiny("mixtral")).notes
    start, _, kept = note.partition(": ")
    assert start == "kept in full precision"
    assert sorted(kept.split(", ")) == ["1 embedding", "1 lm_head", "2 router"]
    assert plan(tiny("llama"), "NVFP4").decodes_to_bfloat16
    assert any("config.json says bfloat16" in note for note in plan(tiny("llama"), "NVFP4").notes)
    assert not plan(tiny("llama"), "NVFP4A16").decodes_to_bfloat16


def test_unknown_tensors_are_copied_and_noted(tiny: Tiny, tmp_path: Path):
    from safetensors.torch import save_file

    folder = zoo.edited(tiny("llama"), tmp_path / "more")
    save_file({**zoo.read_tensors(folder), "extra.weight": torch.ones(3)}, folder / "model.safetensors")
    found = plan(folder)
    assert any("1 tensors are unknown to the model and copied: extra.weight" in note for note in found.notes)
    bitgrain.quantize(folder, tmp_path / "out", "W4A16", workers=1)
    assert torch.equal(zoo.read_tensors(tmp_path / "out")["extra.weight"], torch.ones(3))


def test_all_problems_are_listed_at_once(tiny: Tiny, tmp_path: Path):
    name = "model.layers.1.mlp.down_proj.weight"
    codes = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    folder = zoo.edited(
        tiny("llama"), tmp_path / "bad", **{name: codes, "model__layers__0__self_attn__o_proj__weight": None}
    )
    found = plan(
        folder,
        rules=(
            {"match": "q_proj", "scheme": {"weight": {"format": "int4", "granularity": "per_group(48)"}}},
            {"match": "embed_tokens", "scheme": "W8A8"},
        ),
    )
    for words in (
        "1 parameters of the model are not in its files: model.layers.0.self_attn.o_proj.weight",
        f"{name} is stored as torch.float8_e4m3fn: only float weights can be quantized",
        "model.layers.0.self_attn.q_proj: weight per_group(48) does not divide 128",
        "model.embed_tokens: W8A8 would quantize token ids; give embeddings a weight-only scheme",
    ):
        assert any(words in problem for problem in found.problems), words
    with pytest.raises(PlanError) as caught:
        found.require_possible()
    assert str(caught.value).count("\n") == len(found.problems)


def test_static_inputs_bring_calibration_text(tiny: Tiny, tmp_path: Path):
    """Whatever the solver; what needs no text is not given any."""
    folder = zoo.edited(tiny("llama"), tmp_path / "model")
    zoo.save_tokenizer(folder)
    (tmp_path / "text.txt").write_text("what the model is shown " * 3)
    found = plan(folder, "FP8", calibration={"text": str(tmp_path / "text.txt"), "windows": 3, "seqlen": 16})
    assert not found.problems
    assert found.calibration is not None
    assert found.calibration.ids.shape == (3, 16)
    assert plan(folder, "FP8_DYNAMIC").calibration is None
    with pytest.raises(TextError, match="tokenizer missing"):
        plan(tiny("llama"), "FP8")


def test_nothing_to_quantize_is_a_problem(tiny: Tiny):
    assert plan(tiny("llama"), rules=({"match": "Linear", "keep": True},)).problems == ("no layer would be quantized",)


def test_quantized_inputs_of_an_embedding_make_no_sense(tiny: Tiny):
    """Its inputs are token ids."""
    (problem,) = plan(tiny("llama"), rules=({"match": "embed_tokens", "scheme": "W8A8"},)).problems
    assert problem.startswith("model.embed_tokens")
    assert not plan(tiny("llama"), rules=({"match": "embed_tokens", "scheme": "W8A16"},)).problems


def test_convolutions_by_name(tmp_path: Path):
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256, conv_dim=(32, 32),
        conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=128,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "speech")
    found = plan(tmp_path / "speech", "W8A16", rules=({"match": "Conv1d", "scheme": "W8A16"},))
    assert not found.problems
    convolutions = {layer.original: layer.shape for layer in found.quantized.values() if layer.role == "conv"}
    assert convolutions == {(32, 1, 3): (32, 3), (32, 32, 3): (32, 96)}
    assert found.layout.name == "bitgrain"
    zoo.save_tokenizer(tmp_path / "speech")  # as of a model with convolutions that reads text
    learned = plan(tmp_path / "speech", "W8A16", rules=({"match": "Conv1d", "scheme": "FP8"},))
    assert any("is a convolution, which text does not calibrate" in problem for problem in learned.problems)


def test_idle_rule_is_an_error_at_once(tiny: Tiny):
    with pytest.raises(RecipeError, match=r"'lm_head' matches no layer"):
        plan(tiny("llama-tied"), rules=({"match": "lm_head", "scheme": "W8A16"},))


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_below_one_are_refused(tiny: Tiny, workers: int):
    with pytest.raises(PlanError, match="at least 1"):
        plan(tiny("llama"), workers=workers)


def test_json_of_a_plan_is_complete(tiny: Tiny):
    import json

    found = plan(tiny("mixtral"), "W4A16", rules=({"match": "q_proj", "scheme": "W8A16"},))
    described = json.loads(json.dumps(plan_to_json(found)))
    assert described["architecture"] == "MixtralForCausalLM"
    assert described["coverage"] == found.coverage()
    assert {layer["module"]: layer["scheme"] for layer in described["layers"]} == {
        p.weight.module: p.layer.scheme.name if p.layer else None for p in found.layers
    }
    assert described["problems"] == []
    versions = {verdict["engine"]: verdict["version"] for verdict in described["engines"]}
    assert list(versions) == ["vLLM", "SGLang", "transformers", "bitgrain"]
    assert versions["vLLM"] == VLLM.version
    assert all(isinstance(p.layer.scheme, Scheme) for p in found.layers if p.layer)


def test_planning_reads_no_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    from bitgrain.checkpoints.reader import Checkpoint

    def refuse(*_: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "_read_bytes", refuse)
    assert plan(tiny("mixtral"), "NVFP4").bytes_after > 0
