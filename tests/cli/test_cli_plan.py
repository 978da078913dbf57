from pathlib import Path

import pytest

from bitgrain.pipeline.engine_rules import SGLANG, TRANSFORMERS, VLLM
from bitgrain.recipes import PRESETS


def test_the_plan_of_the_built_in_model(run, model: Path):
    ran = run("plan", model, "--scheme", "W4A16")
    assert ran.status == 0
    assert ran.err == ""
    for part in ("LlamaForCausalLM, 1.97 M parameters, 3 blocks", "3.9 MB -> 1.8 MB", "4.127 in quantized layers"):
        assert part in ran.out
    assert "model.layers.{0-2}.self_attn.q_proj  3  256x256   W4A16" in ran.out
    assert "kept (embedding)" in ran.out
    assert "peak RAM" in ran.out
    assert "compressed-tensors layout" in ran.out
    engines = f"{VLLM.name} {VLLM.version}, {SGLANG.name} {SGLANG.version}, "
    assert engines + f"transformers {TRANSFORMERS.version}, bitgrain  yes" in ran.out
    assert all(line == line.rstrip() for line in ran.out.splitlines())
    assert max(map(len, ran.out.splitlines())) <= 100
    assert "\x1b" not in ran.out


def test_all_layers(run, model: Path):
    ran = run("plan", model, "-s", "W4A16", "--layers")
    assert [line.split()[0] for line in ran.out.splitlines() if ".q_proj" in line] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(3)
    ]


def test_json(run, model: Path):
    ran = run("plan", model, "-s", "W4A16", "--json", "--max-shard-size", "1MB")
    assert ran.status == 0
    assert ran.json["coverage"] == {"W4A16": 1474560, "kept": 493312}
    assert ran.json["problems"] == []
    assert len(ran.json["shards"]) > 1


def test_how_long_a_context_fits(run, model: Path):
    ran = run("plan", model, "--scheme", "W4A16", "--kv-memory", "10MB")
    assert ran.status == 0
    table = ran.out.split("context that fits into 10.0 MB")[1].splitlines()[2:]
    tokens = {line.split()[0]: int("".join(line.split()[3:])) for line in table if line}
    assert tokens["int2"] > tokens["int4"] > tokens["int8"]
    assert tokens["kivi-int4"] > 2 * tokens[next(iter(tokens))]
    ran = run("plan", model, "--scheme", "W4A16", "--kv-memory", "10MB", "--json")
    assert {one["name"]: one["tokens"] for one in ran.json["contexts"]} == tokens


def test_problems_are_status_1_and_name_the_remedy(run, shared: Path):
    model = shared / "models" / "stories260k"
    ran = run("plan", model, "-s", "W4A16")
    assert ran.status == 1
    assert "this cannot be done as asked:" in ran.out
    assert "model.layers.{0-4}.mlp.down_proj: weight per_group(128) does not divide 172 input features" in ran.out
    assert "choose --on-indivisible pad, channel or skip" in ran.out
    assert len(ran.out.splitlines()) < 50
    assert run("plan", model, "-s", "W4A16", "--json").status == 1
    ran = run("plan", model, "-s", "W4A16", "--on-indivisible", "channel")
    assert ran.status == 0
    assert "W4A16/channel" in ran.out
    ran = run("plan", model, "-s", "NVFP4A16", "--on-indivisible", "skip")
    assert "kept (groups do not divide it)" in ran.out
    ran = run("plan", model, "-s", "W4A16", "--on-indivisible", "pad")
    assert "W4A16 (padded)" in ran.out


def test_an_unknown_scheme_lists_all(run, model: Path):
    ran = run("plan", model, "-s", "W4A61")
    assert ran.status == 1
    assert "did you mean W4A16?" in ran.err
    assert all(name in ran.err for name in PRESETS)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("scheme: W4A16\nsovler: rtn\n", "unknown key 'sovler'; did you mean 'solver'?"),
        ("scheme: W4A16\nrules:\n- {match: q_porj, keep: true}\n", "did you mean 'q_proj'?"),
        ("- W4A16\n", "holds no recipe"),
    ],
)
def test_a_bad_recipe(run, model: Path, tmp_path: Path, yaml: str, message: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml)
    ran = run("plan", model, "--recipe", file)
    assert ran.status == 1
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_a_recipe_and_what_replaces_its_keys(run, model: Path, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: W4A16\nrules:\n- {match: down_proj, scheme: W8A16}\n")
    assert set(run("plan", model, "--recipe", file, "--json").json["coverage"]) == {"W4A16", "W8A16", "kept"}
    coverage = run("plan", model, "--recipe", file, "-s", "W3A16", "--json").json["coverage"]
    assert set(coverage) == {"W3A16", "W8A16", "kept"}


def test_no_model(run, tmp_path: Path):
    ran = run("plan", tmp_path / "nowhere", "-s", "W4A16")
    assert ran.status == 1
    assert "nowhere does not exist" in ran.err
    ran = run("plan", tmp_path, "-s", "W4A16")
    assert ran.status == 1
    assert "no config.json" in ran.err
