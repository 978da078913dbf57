"""Quantization-aware training in memory: what prepare leaves, what training does, and what convert and save write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import bitgrain
import zoo
from bitgrain import qat
from bitgrain.errors import ModelError, OutputError, PlanError, SchemeError, TrainingError
from bitgrain.recipes import PRESETS, make_recipe
from bitgrain.runtime.activations import InputQuantizer

Make = Callable[[str], Path]
IDS = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(0))
DYNAMIC = [name for name, one in PRESETS.items() if not one.needs_calibration and one.indivisible(256, 128) is None]


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.LayerNorm(256), nn.Linear(256, 8, bias=False))


def train(student: Any, teacher: Any, steps: int = 12, rate: float = 3e-4) -> list[float]:
    """A plain loop; the losses."""
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
    losses: list[float] = []
    student.train()
    for _ in range(steps):
        loss = qat.distillation_loss(student, teacher, {"input_ids": IDS})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    student.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", DYNAMIC)
def test_prepared_and_converted_it_is_what_quantize_leaves(name: str):
    prepared, quantized = sequential(), sequential()
    parts = bitgrain.quantize_(quantized, name)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    qat.prepare(prepared, name)
    with torch.no_grad():
        assert torch.equal(prepared(x), quantized(x))
        found = qat.convert(prepared)
        assert torch.equal(prepared(x), quantized(x))
    left = prepared.state_dict()
    assert left.keys() == quantized.state_dict().keys()
    assert all(torch.equal(tensor, left[key]) for key, tensor in quantized.state_dict().items())
    assert list(found) == list(parts)
    for key, (q,) in found.items():
        assert torch.equal(q.codes, parts[key][0].codes)
        assert torch.equal(q.dequantize(), parts[key][0].dequantize())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "W2A16"), ("llama", "W8A8_STATIC"), ("llama", "NVFP4"), ("gpt2", "W8A8_STATIC"), ("mixtral", "W4A4")],
)
def test_a_plain_loop_lowers_the_loss(name: str, scheme: str):
    teacher, student = zoo.build(name), zoo.build(name)
    qat.prepare(student, scheme, observe=3)
    losses = train(student, teacher)
    before = logits(student)
    found = qat.convert(student)
    assert min(losses[-3:]) < 0.9 * max(losses[:2])
    assert bool(found.inputs) == (scheme == "W8A8_STATIC")
    if not found.inputs:  # where there are, q, k and v then share one scale
        assert torch.equal(logits(student), before)
    for key, parts in found.items():
        dense = [part.dequantize() for part in parts]
        parameter = student.get_parameter(key)
        for one, expected in zip(parameter if len(parts) > 1 else [parameter], dense, strict=True):
            assert torch.equal(one.T if name == "gpt2" else one, expected)


@pytest.mark.parametrize("scheme", ["W4A8", "W8A8_STATIC"])
def test_the_files_are_those_of_the_disk_job(tiny: Make, tmp_path: Path, scheme: str):
    teacher, student = bitgrain.load(tiny("llama")), bitgrain.load(tiny("llama"))
    qat.prepare(student, scheme, observe=2)
    train(student, teacher, steps=4)
    found = qat.convert(student)
    result = qat.save(found, student, tiny("llama"), tmp_path / "out")
    assert result.manifest["layout"] == "compressed-tensors"
    assert all(check.ok is not False for check in bitgrain.verify(tmp_path / "out", against=tiny("llama")))
    assert torch.equal(logits(bitgrain.load(tmp_path / "out", execution="dequantize")), logits(student))
    with pytest.raises(OutputError, match="exists"):
        qat.save(found, student, tiny("llama"), tmp_path / "out")


def test_untrained_it_writes_the_weights_of_quantize(tiny: Make, tmp_path: Path):
    student = bitgrain.load(tiny("qwen3"))
    found = qat.convert(qat.prepare(student, "W4A16"))
    qat.save(found, student, tiny("qwen3"), tmp_path / "trained")
    bitgrain.quantize(tiny("qwen3"), tmp_path / "quantized", "W4A16")
    files = [zoo.contents(tmp_path / name) for name in ("trained", "quantized")]
    assert [name for name in files[0] if files[0][name] != files[1][name]] == ["manifest.json"]


def test_training_can_start_from_the_codes_of_another_solver():
    start = bitgrain.quantize_(zoo.build("llama"), make_recipe(scheme="W2A16", solver="hqq", range="mse"))
    student = qat.prepare(zoo.build("llama"), "W2A16", start=start)
    found = qat.convert(student)
    assert all(torch.equal(found[name][0].codes, parts[0].codes) for name, parts in start.items())
    with pytest.raises(ModelError, match="start holds"):
        qat.prepare(zoo.build("llama"), "W4A16", start=start)


def test_tied_weights_stay_tied():
    model = zoo.build("llama-tied")
    qat.prepare(model, make_recipe(scheme="W4A16", rules=[{"match": "lm_head", "scheme": "W8A16"}]))
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert torch.equal(head, embedding)
    qat.convert(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, head)


def test_the_trainer_lowers_the_loss_and_goes_on_from_its_checkpoints(tmp_path: Path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]

    def trained(folder: Path, steps: int, resume: bool = False) -> Any:
        student = qat.prepare(zoo.build("llama"), "W2A16")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            save_steps=4,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = qat.DistillationTrainer(student, arguments, train_dataset=data, teacher=zoo.build("llama"))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole", 8)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert min(losses[-2:]) < 0.9 * max(losses[:2])
    trained(tmp_path / "parts", 4)
    resumed = trained(tmp_path / "parts", 8, resume=True)
    first, second = qat.convert(whole.model), qat.convert(resumed.model)
    assert all(torch.equal(parts[0].dequantize(), second[name][0].dequantize()) for name, parts in first.items())


def test_nan_in_the_trainer_leaves_the_last_good_state(tmp_path: Path):
    pytest.importorskip("accelerate")
    student, teacher = qat.prepare(zoo.build("llama"), "W4A8"), zoo.build("llama")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e30, report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=0
    )
    data = [{"input_ids": ids} for ids in IDS]
    trainer = qat.DistillationTrainer(student, arguments, train_dataset=data, teacher=teacher, keep_every=1)
    with pytest.raises(TrainingError, match="lower learning rates"):
        trainer.train()
    assert bool(logits(student).isfinite().all())


def test_static_inputs_of_a_fused_group_become_one_scale():
    student = zoo.build("llama")
    qat.prepare(student, "W8A8_STATIC", observe=1)
    train(student, zoo.build("llama"), steps=3, rate=1e-3)
    found = qat.convert(student)
    scales = [found.inputs[f"model.layers.0.self_attn.{name}_proj.weight"].scale for name in "qkv"]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[1], scales[2])
    quantizer = student.model.layers[0].self_attn.q_proj.input_quantizer
    assert type(quantizer) is InputQuantizer


def test_what_cannot_be_is_said(tiny: Make, tmp_path: Path):
    module = sequential()
    with pytest.raises(ModelError, match="not prepared"):
        qat.convert(module)
    qat.prepare(module, "W8A8")
    with pytest.raises(ModelError, match="prepared for quantization-aware training already"):
        qat.prepare(module, "W8A8")
    with pytest.raises(SchemeError, match="unknown scheme"):
        qat.prepare(sequential(), "W4A61")
    student = zoo.build("mixtral")
    found = qat.convert(qat.prepare(student, "W4A16"))
    with pytest.raises(PlanError, match="bitgrain train"):
        qat.save(found, student, tiny("mixtral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
