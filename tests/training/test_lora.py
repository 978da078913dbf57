"""LoRA on packed weights, through peft: what is trained, saved, loaded and merged."""

import ast
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

import bitgrain
import zoo
from bitgrain.errors import BitgrainError, CheckpointError, NumericsError, SchemeError
from bitgrain.runtime.low_bit_linear import LowBitLinear, low_bit_layers
from bitgrain.training.lora import attach_lora, load_adapter, lora_config, merge_lora
from bitgrain.training.next_token import TrainSettings, train_next_token

pytest.importorskip("peft")
IDS = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))


def packed(name: str = "llama", scheme: str = "NF4") -> Any:
    model = zoo.build(name, num_hidden_layers=1) if name != "gpt2" else zoo.build(name, n_layer=1)
    bitgrain.low_bit_(model, scheme)
    return model.eval()


def trained(model: Any, **settings: Any) -> Any:
    """With adapters whose sum is not zero."""
    torch.manual_seed(1)
    adapted = attach_lora(model, lora_config(rank=4, alpha=8, **settings))
    train_next_token(adapted, IDS, TrainSettings(steps=3, batch=2, rate=2e-2))
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_only_the_adapters_change():
    model = packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    adapted = trained(model)
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in adapted.state_dict().items()}
    base = {name.replace(".base_layer", ""): tensor for name, tensor in found.items() if "lora_" not in name}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    assert all(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    assert not torch.allclose(logits(adapted), plain, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    assert torch.equal(logits(adapted.unload()), plain)


@pytest.mark.parametrize(("name", "scheme"), [("llama", "NF4"), ("gpt2", "NF4"), ("opt", "W4A16"), ("llama", "W4A8")])
def test_merging_gives_a_dense_model(name: str, scheme: str, tmp_path: Path):
    adapted = trained(packed(name, scheme))
    expected = logits(adapted)
    kinds = {path: type(part) for path, part in zoo.build(name).named_modules()}
    merged: Any = merge_lora(adapted)
    assert not list(low_bit_layers(merged))
    assert all(kinds[path] is type(part) for path, part in merged.named_modules())
    # a dense model does not round its inputs
    assert torch.allclose(logits(merged), expected, atol=0.2 if scheme == "W4A8" else 1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), logits(merged))
    assert bitgrain.low_bit_(merged, scheme) == {}


def test_adapters_are_saved_and_loaded(tmp_path: Path):
    adapted = trained(packed(), targets=["q_proj", "v_proj"])
    adapted.save_pretrained(tmp_path)
    again = load_adapter(packed(), tmp_path)
    assert torch.equal(logits(again), logits(adapted))
    assert isinstance(again.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer"), LowBitLinear)
    assert torch.allclose(logits(merge_lora(again)), logits(adapted), atol=1e-4)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_adapter(packed("gpt2"), tmp_path)
    with pytest.raises(CheckpointError, match="no adapter"):
        load_adapter(packed(), tmp_path / "nowhere")


def test_in_transformers_trainer(tmp_path: Path):
    pytest.importorskip("accelerate")
    adapted = attach_lora(packed(), lora_config(rank=4))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, use_cpu=True, activation_checkpointing=True,
    )  # fmt: skip
    rows = [{"input_ids": one, "labels": one} for one in IDS]
    trainer = transformers.Trainer(model=cast(Any, adapted), args=arguments, train_dataset=cast(Any, rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_config_of_the_users_own():
    """peft's plain LoraConfig trains too, but its merge would be lost, and is refused."""
    from peft import LoraConfig, get_peft_model

    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        adapted: Any = get_peft_model(packed(), LoraConfig(target_modules=["q_proj"]))
    train_next_token(adapted, IDS, TrainSettings(steps=1, batch=1))
    with pytest.raises(SchemeError, match="lora_config"):
        adapted.merge_and_unload()
    known = attach_lora(packed(), LoraConfig(target_modules=["q_proj"], use_dora=True, lora_bias=False))
    assert torch.allclose(logits(known), logits(merge_lora(known)), atol=1e-4)


def test_merging_in_place_and_nan_are_refused():
    adapted = trained(packed())
    with pytest.raises(SchemeError, match="merge_and_unload"):
        adapted.merge_adapter()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match="NaN or Inf"):
        adapted.merge_and_unload(safe_merge=True)


def test_bad_names_and_ranks():
    with pytest.raises(SchemeError, match=r"no adapter fits.*down_proj"):
        attach_lora(packed(), lora_config(targets=["query"]))
    with pytest.raises(SchemeError, match="at least 1"):
        lora_config(rank=0)


def test_without_peft(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lora_config, lambda: attach_lora(nn.Linear(2, 2)), lambda: load_adapter(nn.Linear(2, 2), "x")):
        with pytest.raises(BitgrainError, match=r"pip install 'bitgrain\[peft\]'"):
            call()


def test_peft_is_imported_only_when_asked_for():
    """No module imports it when it is imported itself, but the one that functions import."""
    found = set()
    for path in Path(bitgrain.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "peft" or name.endswith("lora_layer") for name in names):
                found.add(path.name)
    assert found == {"lora_layer.py"}
