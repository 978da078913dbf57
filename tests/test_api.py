"""The public names: imported when first used, and each works as its docstring says."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain import api
from bitgrain.errors import BitgrainError, PlanError, RecipeError
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.quantize import QuantizeResult
from bitgrain.recipes import make_recipe


def run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light():
    found = run(
        "import sys, json, bitgrain\n"
        "bitgrain.BitgrainError, bitgrain.__version__, bitgrain.__all__\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'bitgrain.api'} & set(sys.modules))))"
    )
    assert found == []


def test_names_arrive_when_used():
    assert set(bitgrain.__all__) >= {
        *("BitgrainError", "__version__", "evaluate", "load", "plan", "quantize", "quantize_", "quantize_tensor"),
        "verify",
    }
    for name in bitgrain.__all__:
        assert getattr(bitgrain, name) is not None
    assert bitgrain.quantize is api.quantize
    assert all(getattr(api, name) is getattr(bitgrain, name) for name in bitgrain.__all__ if name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = bitgrain.quantise  # type: ignore[attr-defined]
    assert not hasattr(bitgrain, "__wrapped__")  # what inspection tools ask of every module


def test_signatures_are_those_of_the_docs():
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(bitgrain.quantize)[:3] == ["model", "out", "scheme"]
    assert names(bitgrain.plan)[:2] == ["model", "scheme"]
    assert {"recipe", "on_indivisible", "solver", "revision", "max_shard_bytes", "workers"} <= set(names(bitgrain.plan))
    assert names(bitgrain.load)[0] == "folder"
    assert {"device", "dtype", "trust_remote_code", "rounding"} <= set(names(bitgrain.load))
    assert {"text", "against", "tokenizer", "seqlen", "windows", "device"} <= set(names(bitgrain.evaluate))
    assert names(bitgrain.quantize_)[:3] == ["module", "scheme", "calibration"]
    assert names(bitgrain.quantize_tensor)[:2] == ["x", "spec"]
    assert all(inspect.getdoc(getattr(bitgrain, name)) for name in bitgrain.__all__ if name != "__version__")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", tmp_path_factory.mktemp("api") / "llama")


def test_plan_then_quantize_then_load(model: Path, tmp_path: Path):
    planned = bitgrain.plan(model, "W4A16", on_indivisible="skip")
    assert isinstance(planned, Plan)
    assert not planned.problems
    result = bitgrain.quantize(str(model), str(tmp_path / "out"), "W4A16", on_indivisible="skip")
    assert isinstance(result, QuantizeResult)
    assert result.out == tmp_path / "out"
    assert result.plan.bytes_after == planned.bytes_after
    loaded: Any = bitgrain.load(str(tmp_path / "out"))
    assert zoo.outputs(loaded, zoo.ids_for(loaded)).isfinite().all()


def test_recipes_may_be_files_or_values(model: Path, tmp_path: Path):
    recipe = make_recipe(scheme="W8A16", rules=[{"match": "lm_head", "scheme": "W8A16"}])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for given in (recipe, tmp_path / "r.yaml", str(tmp_path / "r.yaml")):
        assert bitgrain.plan(model, recipe=given).recipe == recipe
        changed = bitgrain.plan(model, "W4A16", recipe=given, on_indivisible="skip", solver="RTN").recipe
        assert (changed.scheme, changed.on_indivisible, changed.solver) == ("W4A16", "skip", "RTN")
        assert changed.rules == recipe.rules
    with pytest.raises(RecipeError, match="say what to do"):
        bitgrain.plan(model)


def test_solver_names_reach_the_recipe(model: Path):
    assert bitgrain.plan(model, "W4A16", solver="rtn").recipe.solver == "rtn"
    with pytest.raises(RecipeError, match="unknown solver 'gptqq'"):
        bitgrain.plan(model, "W4A16", solver="gptqq")


def test_every_error_is_a_bitgrain_error(model: Path, tmp_path: Path):
    with pytest.raises(BitgrainError):
        bitgrain.quantize(model, tmp_path / "out", "FP8")
    with pytest.raises(PlanError):
        bitgrain.load(model, device="nowhere")


def test_evaluate_takes_modules_with_a_tokenizer(shared: Path, tmp_path: Path):
    folder = shared / "models" / "stories260k"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 8)
    original, module = bitgrain.load(folder), bitgrain.load(folder)
    bitgrain.quantize_(module, "W8A16")
    found = bitgrain.evaluate(module, text=text, against=original, tokenizer=folder, seqlen=32, windows=2)
    assert found.kl is not None
    assert 0 < found.kl < 0.01
    assert found.windows == 2
    assert found.seqlen == 32
    alone = bitgrain.evaluate(folder, text=text, seqlen=32, windows=2)
    assert alone.kl is None
    assert alone.perplexity == pytest.approx(found.base_perplexity, rel=1e-6)
    with pytest.raises(RecipeError, match="a module brings no tokenizer"):
        bitgrain.evaluate(module, text=text)


def test_quantize_tensor_is_one_call():
    q = bitgrain.quantize_tensor(torch.eye(4, 32), "MXFP4")
    assert q.shape == (4, 32)
    assert torch.equal(q.dequantize(), torch.eye(4, 32))
