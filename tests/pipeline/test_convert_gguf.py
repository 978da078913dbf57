"""GGUF files of models: written and read back they are the same model, and foreign readers say so too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.errors import BitgrainError, CheckpointError, ModelError, OutputError, PlanError, SchemeError
from bitgrain.pipeline.contents import read_contents
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import open_stored
from bitgrain.recipes import make_recipe
from gguf_models import MODELS

gguf = pytest.importorskip("gguf")

_BLOCKS = {**zoo.GROUPED, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def save(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Path:
    monkeypatch.setitem(zoo.ZOO, name, MODELS[name])
    return zoo.save(name, folder, dtype)


def blocks(folder: Path, type_name: str, dtype: torch.dtype = torch.float16) -> Path:
    """A Llama with rows of 256, its layers quantized in the spec of a GGUF type."""
    zoo.save("llama", folder / "model", dtype, **_BLOCKS)
    zoo.save_tokenizer(folder / "model")
    spec = BLOCK_TYPES[type_name].spec
    assert spec is not None
    scheme = bitgrain.recipes.spec_model.SchemeModel.of(bitgrain.recipes.Scheme(type_name, spec))
    recipe = make_recipe(scheme=scheme.model_dump(mode="json"))
    bitgrain.quantize(folder / "model", folder / "quantized", recipe=recipe, layout="bitgrain")
    (folder / "quantized" / "tokenizer.json").unlink()
    return folder / "quantized"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 127, (2, 48), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(name, tmp_path / "model", monkeypatch)
    made = convert(folder, "gguf", tmp_path / "out.gguf")
    assert any("no tokenizer" in note for note in made.notes)
    assert made.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]
    assert logits(bitgrain.load(tmp_path / "out.gguf")).equal(logits(bitgrain.load(folder)))
    stored, plain = open_stored(tmp_path / "out.gguf"), zoo.read_tensors(folder)
    for tensor in stored.originals():
        twin = plain[tensor]
        exact = not tensor.endswith("norm.weight") or not name.startswith("gemma")  # written as 1 + weight
        torch.testing.assert_close(stored.dense(tensor), twin, rtol=0, atol=0 if exact else 2**-23)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])  # whose metadata transformers reads in full
def test_transformers_loads_the_same_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(name, tmp_path / "model", monkeypatch)
    convert(folder, "gguf:f32", tmp_path / "out.gguf")
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(bitgrain.load(folder)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K", "MXFP4"])
def test_quantized_layers_are_the_same_numbers_in_the_gguf_package(type_name: str, tmp_path: Path) -> None:
    quantized = blocks(tmp_path, type_name)
    made = convert(quantized, f"gguf:{type_name.lower()}", tmp_path / "out.gguf")
    assert {layer.scheme.name for layer in made.layers.values()} == {type_name}
    before, after = open_stored(quantized), open_stored(tmp_path / "out.gguf")
    assert list(before.layers) == list(after.layers)
    for name in before.originals():
        numbers = before.quantized(name)[0].dequantize() if name in before.layers else before.read(name).float()
        assert after.dense(name).float().equal(numbers), name
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    ours = open_gguf(tmp_path / "out.gguf")
    assert theirs.keys() == ours.tensors.keys()
    for name, tensor in theirs.items():
        data, mine = ours.read(name), ours.tensors[name]
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        assert BLOCK_TYPES[mine.type].values(data, mine.shape).float().equal(numbers.view(mine.shape)), name
    found = read_contents(tmp_path / "out.gguf")
    assert found.layout == "gguf"
    assert sum(tensor.quantized for tensor in found.tensors) == len(after.layers)
    assert sum(tensor.nbytes for tensor in found.tensors) == sum(tensor.nbytes for tensor in ours.tensors.values())


def test_plain_gguf_takes_the_smallest_type_that_is_exact(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "model", torch.float16)
    for scheme, type_name in (("W4A16", "Q4_0"), ("W8A16", "Q8_0"), ("MXFP4", "MXFP4")):
        bitgrain.quantize(tmp_path / "model", tmp_path / scheme, scheme)
        made = convert(tmp_path / scheme, "gguf", tmp_path / f"{scheme}.gguf")
        assert {layer.scheme.name for layer in made.layers.values()} == {type_name}
        assert (len(made.changed) > 0) == (scheme != "MXFP4")
        assert any("inputs" in note for note in made.notes) == (scheme == "MXFP4")
        stored = open_stored(tmp_path / scheme)
        for name in stored.layers:
            numbers = stored.quantized(name)[0].dequantize()
            assert open_stored(tmp_path / f"{scheme}.gguf").dense(name).equal(numbers)


def test_a_gguf_file_becomes_a_folder_again(tmp_path: Path) -> None:
    quantized = blocks(tmp_path, "Q4_0")
    convert(quantized, "gguf", tmp_path / "out.gguf")
    convert(tmp_path / "out.gguf", "compressed-tensors", tmp_path / "back")
    before, after = open_stored(tmp_path / "out.gguf"), open_stored(tmp_path / "back")
    assert all(before.dense(name).equal(after.dense(name)) for name in before.originals())
    a, b = (bitgrain.load(tmp_path / name, execution="dequantize") for name in ("out.gguf", "back"))
    assert logits(a).equal(logits(b))
    made = convert(tmp_path / "out.gguf", "gguf:f32", tmp_path / "plain.gguf")
    assert not made.layers
    assert logits(bitgrain.load(tmp_path / "plain.gguf")).equal(logits(a))


def test_stacked_experts_are_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("mixtral", tmp_path / "model", monkeypatch, torch.float16)
    bitgrain.quantize(folder, tmp_path / "quantized", "W4A16")
    convert(tmp_path / "quantized", "gguf", tmp_path / "out.gguf")
    tensor = open_gguf(tmp_path / "out.gguf").tensors["blk.1.ffn_down_exps.weight"]
    assert (tensor.type, tensor.shape) == ("Q4_0", (4, 128, 256))
    before, after = open_stored(tmp_path / "quantized"), open_stored(tmp_path / "out.gguf")
    assert all(before.quantized(name)[0].dequantize().equal(after.dense(name)) for name in before.layers)


def test_float_types(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "model")
    with pytest.raises(PlanError, match=r"not all of its numbers are in F16; gguf:f32 holds them"):
        convert(tmp_path / "model", "gguf:f16", tmp_path / "out.gguf")
    zoo.save("llama", tmp_path / "half", torch.bfloat16)
    for to, dtype in (("gguf", "bfloat16"), ("gguf:bf16", "bfloat16"), ("gguf:f32", "float32")):
        out = tmp_path / f"{to.replace(':', '-')}.gguf"
        convert(tmp_path / "half", to, out)
        stored = open_stored(out)
        assert stored.model_config["dtype"] == dtype
        assert all(
            stored.dense(name).float().equal(t.float()) for name, t in zoo.read_tensors(tmp_path / "half").items()
        )
        assert open_gguf(out).tensors["blk.0.attn_norm.weight"].type == "F32"
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["gguf-bf16.gguf", "gguf-f32.gguf", "gguf.gguf"]


def test_the_tokenizer_travels_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    for name in ("llama", "stories260k"):
        source = shared / "models" / name
        convert(source, "gguf", tmp_path / f"{name}.gguf")
        ours, theirs = load_tokenizer(tmp_path / f"{name}.gguf"), load_tokenizer(source)
        text = (shared / "text" / "heldout.txt").read_text()[:20000] + "  a\n\n\tb été 海 \U0001f642"
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    found = bitgrain.evaluate(
        tmp_path / "llama.gguf", text=shared / "text" / "heldout.txt", against=source.parent / "llama", windows=1
    )
    assert found.kl == 0.0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "relu"}, "llama.cpp computes llama with hidden_act silu, this model has relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of the type dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "model", **changes)
    with pytest.raises(PlanError, match=why):
        convert(tmp_path / "model", "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_refusals(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llama, out = tiny("llama"), tmp_path / "out.gguf"
    bitgrain.quantize(llama, tmp_path / "w4", "W4A16")
    bitgrain.quantize(llama, tmp_path / "nf4", "NF4")
    cases: list[tuple[Path, str, Path, type[BitgrainError], str]] = [
        (tiny("opt"), "gguf", out, ModelError, "OPTForCausalLM has no GGUF form"),
        (llama, "gguf:q4_0", out, PlanError, "it is not quantized: quantize it first"),
        (llama, "gguf:q9", out, SchemeError, "'q9' cannot be read or written"),
        (llama, "gguf", tmp_path / "folder", OutputError, "ends in .gguf"),
        (tmp_path / "w4", "gguf", out, PlanError, r"(?s)as Q4_0: scales are not all numbers of float16.*--layout gguf"),
        (tmp_path / "w4", "gguf:q8_0", out, PlanError, "as Q8_0: scales are not"),
        (tmp_path / "w4", "gguf:q4_k", out, PlanError, "rows of 128 are not whole blocks of 256"),
        (tmp_path / "nf4", "gguf", out, PlanError, "no type of GGUF has the numbers of nf4"),
    ]
    for model, to, target, kind, why in cases:
        with pytest.raises(kind, match=why):
            convert(model, to, target)
    convert(llama, "gguf", out)
    with pytest.raises(OutputError, match="exists already"):
        convert(llama, "gguf", out)
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(out, "compressed-tensors", tmp_path / "back")
    with pytest.raises(ModelError, match="is a GGUF file"):
        bitgrain.quantize(out, tmp_path / "again", "W4A16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4", "out.gguf", "w4"]


def test_files_that_do_not_hang_together_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    convert(tiny("llama"), "gguf", tmp_path / "good.gguf")
    file = open_gguf(tmp_path / "good.gguf")
    good, tensors = dict(file.metadata), [(one.name, one.type, one.shape) for one in file.tensors.values()]
    cases: list[tuple[dict[str, Any], list[Any], type[BitgrainError], str]] = [
        ({"general.architecture": "bert"}, tensors, ModelError, "the architecture 'bert'"),
        ({"llama.block_count": 3}, tensors, CheckpointError, "block_count is 3, the tensors are of 2 blocks"),
        ({"llama.embedding_length": 64}, tensors, CheckpointError, "not what the metadata say"),
        ({"llama.attention.head_count": "many"}, tensors, CheckpointError, "head_count is not a number"),
        ({"llama.attention.head_count": 0}, tensors, CheckpointError, "head_count is 0"),
        (
            {},
            [(n, "Q8_0" if s == (128,) else t, s) for n, t, s in tensors],
            CheckpointError,
            r"norm.weight is Q8_0 \[128\], which cannot be",
        ),
        ({"llama.attention.head_count": 3}, tensors, BitgrainError, "."),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, tensors, CheckpointError, "is not a number"),
        ({"llama.rope.scaling.type": "new"}, tensors, CheckpointError, "of the type 'new'"),
        ({"llama.expert_count": 8}, tensors, CheckpointError, "8 experts in the metadata"),
        ({}, [*tensors, ("blk.0.ssm_a.weight", "F32", (4,))], CheckpointError, "no tensors that llama has"),
        ({}, [*tensors, ("rope_freqs.weight", "F32", (16,))], CheckpointError, "not those of Llama 3.1"),
        ({}, tensors[:-1], BitgrainError, "."),
        (
            {},
            [
                (n, "IQ1_S" if n == "output.weight" else t, (256, 256) if n == "output.weight" else s)
                for n, t, s in tensors
            ],
            CheckpointError,
            "tensors of IQ1_S",
        ),
    ]
    for i, (changes, wanted, kind, why) in enumerate(cases):
        plan = plan_gguf({**good, **changes}, wanted)
        path = tmp_path / f"{i}.gguf"
        with GgufWriter(path, plan) as writer:
            for tensor in plan.tensors:
                writer.write(tensor.name, torch.zeros(tensor.matrix, dtype=torch.uint8))
            writer.finish()
        with pytest.raises(kind, match=why):
            bitgrain.load(path, execution="dequantize")


def test_a_head_that_was_saved_in_place_of_tied_embeddings(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama-tied"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "model", "gguf", tmp_path / "out.gguf")
    assert logits(bitgrain.load(tmp_path / "out.gguf")).equal(logits(bitgrain.load(tiny("llama-tied"))))


def test_the_command(tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bitgrain.cli.main import main

    assert main(["convert", str(tiny("llama")), "--to", "gguf:f32", "-o", str(tmp_path / "out.gguf"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "gguf:f32"
    assert len(told["notes"]) == 1
    assert main(["show", str(tmp_path / "out.gguf")]) == 0
    assert "float32" in capsys.readouterr().out


def test_quantize_into_a_file(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "model", torch.float16)
    bitgrain.quantize(tmp_path / "model", tmp_path / "out.gguf", "W4A16", layout="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]
    file = open_gguf(tmp_path / "out.gguf")
    assert file.metadata["general.name"] == "model"
    assert file.tensors["blk.0.ffn_up.weight"].type == "Q4_0"
    bitgrain.quantize(tmp_path / "model", tmp_path / "folder", "W4A16")
    a, b = open_stored(tmp_path / "out.gguf"), open_stored(tmp_path / "folder")
    assert all(a.dense(name).equal(b.quantized(name)[0].dequantize()) for name in b.layers)
    for out, layout in (("other", "gguf"), ("other.gguf", None), ("out.gguf", "gguf")):
        with pytest.raises(OutputError, match=r"GGUF file|exists already"):
            bitgrain.quantize(tmp_path / "model", tmp_path / out, "W4A16", layout=layout)
    with pytest.raises(PlanError, match=r"as Q8_0|as Q4_1|as Q4_K"):
        bitgrain.quantize(tmp_path / "model", tmp_path / "k.gguf", "W4A16", layout="gguf:q4_k")
    assert not (tmp_path / "k.gguf.quantized").exists()


@pytest.mark.parametrize(
    ("model", "scheme", "reason"),
    [
        ("llama", "W4A16_ASYM", "there are zero points.*begin with GGUF_"),
        ("llama", "NF4", "no type of GGUF has the numbers of nf4"),
        ("llama", "FP8_DYNAMIC", "no type of GGUF has the numbers of fp8_e4m3"),
        ("opt", "W4A16", "OPTForCausalLM has no GGUF form"),
    ],
)
def test_what_no_file_can_hold_is_said_in_the_plan(model: str, scheme: str, reason: str, tmp_path: Path) -> None:
    zoo.save(model, tmp_path / "model", torch.float16)
    problems = "\n".join(bitgrain.plan(tmp_path / "model", scheme, layout="gguf").problems)
    assert re.search(reason, problems)
    with pytest.raises(PlanError, match="cannot be done"):
        bitgrain.quantize(tmp_path / "model", tmp_path / "k.gguf", scheme, layout="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
