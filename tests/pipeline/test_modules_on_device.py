"""Modules in memory on the device of the jobs: rounded, calibrated, trained with, as on the CPU."""

import copy
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain import qat
from bitgrain.pipeline.layers import to_cpu
from bitgrain.recipes import PRESETS, make_recipe
from bitgrain.runtime.low_bit_linear import low_bit_layers
from bitgrain.training.next_token import TrainSettings, train_next_token
from vision import images, network

IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(0))
DYNAMIC = [name for name, one in PRESETS.items() if not one.needs_calibration and one.indivisible(256, 128) is None]


def sequential() -> Any:
    torch.manual_seed(0)
    parts = torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.LayerNorm(256), torch.nn.Linear(256, 8, bias=False)
    return torch.nn.Sequential(*parts)


def place_of(model: Any) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("name", DYNAMIC)
def test_rounded_in_place(name: str, device: str):
    mine, theirs = sequential().to(device), sequential()
    found, expected = bitgrain.quantize_(mine, name), bitgrain.quantize_(theirs, name)
    assert place_of(mine) == {device}
    for key, (q,) in found.items():
        assert q.codes.device.type == device
        assert (to_cpu(q).codes == expected[key][0].codes).double().mean() > (0.99 if "GGUF" in name else 0.9999)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = theirs(x)
        torch.testing.assert_close(mine(x.to(device)).cpu(), y, rtol=0, atol=0.03 * float(y.abs().max()))


@pytest.mark.parametrize("solver", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("name", ["W4A16", "W8A8_STATIC", "LLM_INT8_STATIC"])
def test_calibrated(name: str, solver: str, device: str):
    """Batches may lie on the CPU; what they show is where the module is."""
    batches = [torch.randn(40, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    recipe, outputs = make_recipe(scheme=name, solver=solver), list[torch.Tensor]()
    for place in ("cpu", device):
        module = sequential().to(place)
        bitgrain.quantize_(module, recipe, calibration=bitgrain.calibrate(module, batches))
        with torch.no_grad():
            outputs.append(module(batches[0].to(place)).cpu())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0.1 * float(outputs[0].abs().max()))


def test_a_convolutional_network(device: str):
    net, theirs = network().to(device), network()
    recipe = make_recipe(scheme="W8A8_STATIC", solver="gptq")
    for one, place in ((net, device), (theirs, "cpu")):
        batches = [images(4, 1).to(place), images(3, 2).to(place)]
        bitgrain.quantize_(one, recipe, calibration=bitgrain.calibrate(one, batches))
    with torch.no_grad():
        y = theirs(images(5, 9))
        torch.testing.assert_close(net(images(5, 9).to(device)).cpu(), y, rtol=0, atol=0.05 * float(y.abs().max()))


@pytest.mark.parametrize("scheme", ["W2A16", "W4A8", "W8A8_STATIC", "NVFP4"])
def test_training_lowers_the_loss(scheme: str, device: str):
    teacher, student = zoo.build("llama").to(device), zoo.build("llama").to(device)
    qat.prepare(student, scheme, observe=3)
    student.train()
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=3e-4)
    losses: list[float] = []
    for _ in range(12):
        loss = qat.distillation_loss(student, teacher, {"input_ids": IDS.to(device)})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < 0.95 * max(losses[:2])
    found = qat.convert(student.eval())
    assert place_of(student) == {device}
    assert all(part.codes.device.type == device for parts in found.values() for part in parts)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_adapters_on_packed_weights(optimizer: str, device: str):
    pytest.importorskip("peft")
    from bitgrain.training.lora import attach_lora, lora_config

    model = zoo.build("llama", num_hidden_layers=1).to(device)
    bitgrain.low_bit_(model, "NF4")
    assert list(low_bit_layers(model))
    before = copy.deepcopy(model.state_dict())
    adapted = attach_lora(model, lora_config(rank=4, alpha=8))
    losses = train_next_token(adapted, IDS, TrainSettings(steps=6, batch=4, rate=2e-2, optimizer=optimizer))
    assert place_of(adapted) == {device}
    assert losses[-1] < losses[0]
    held = {
        key.replace("base_model.model.", "").replace(".base_layer", ""): x for key, x in adapted.state_dict().items()
    }
    assert all(torch.equal(held[key], tensor) for key, tensor in before.items())


def test_fp8_training(device: str):
    from bitgrain.training.fp8 import fp8_training_

    model = zoo.build("llama", num_hidden_layers=1).to(device)
    fp8_training_(model)
    losses = train_next_token(model, IDS, TrainSettings(steps=6, batch=4, rate=1e-3))
    assert place_of(model) == {device}
    assert losses[-1] < losses[0]
