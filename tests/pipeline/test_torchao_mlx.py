"""Whole models: torchao's files are read, MLX's are written and read, and both are converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

import bitgrain
from bitgrain.errors import CheckpointError, PlanError, SchemeError
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import QuantizedCheckpoint

IDS = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
SAVED = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig",
         "IntxWeightOnlyConfig")  # fmt: skip


@pytest.fixture
def saved(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A folder that transformers wrote with a config of torchao."""

    def save(name: str, **settings: Any) -> Path:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = TorchAoConfig(getattr(quantization, name)(**settings))
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return save


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAVED)
def test_weights_of_torchao_are_read(name: str, saved: Callable[..., Path], tmp_path: Path):
    folder = saved(name)
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    stored = QuantizedCheckpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = support.unflatten_tensor_state_dict(tensors, file.metadata())
    theirs = found[0] if isinstance(found, tuple) else found
    assert len(stored.layers) == 14
    assert all(torch.equal(stored.dense(key), theirs[key].dequantize()) for key in stored.layers)
    assert all((layer.scheme.input is not None) == ("Dynamic" in name) for layer in stored.layers.values())
    assert torch.isfinite(bitgrain.load(folder, execution="dequantize")(IDS).logits).all()
    with pytest.raises(SchemeError, match="read, not written"):
        convert(folder, "torchao", tmp_path / "out")
    convert(folder, "bitgrain", tmp_path / "out")
    own = QuantizedCheckpoint(tmp_path / "out")
    assert all(torch.equal(own.dense(key), stored.dense(key)) for key in stored.layers)


@pytest.mark.filterwarnings("ignore")
def test_unpacked_integers_in_groups_with_zero_points(saved: Callable[..., Path]):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    settings = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32),
                "mapping_type": quantization.MappingType.ASYMMETRIC}  # fmt: skip
    stored = QuantizedCheckpoint(saved("IntxWeightOnlyConfig", **settings))
    spec = next(iter(stored.layers.values())).scheme.weight
    assert (str(spec.format), str(spec.granularity), spec.zero_point) == ("int4", "per_group(32)", "integer")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"Int8Tensor"', '"Int4Tensor"', "is a Int4Tensor"),
        ("[1, 128]", "[1, 100]", "do not divide"),
        ("[1, 128]", "[0, 128]", "do not divide"),
        ("[1, 128]", '"1"', "block_size"),
        ('"bfloat16"', '"quint8"', "dtype"),
        ('{"_type": "Int8Tensor"', '["Int8Tensor"', "do not describe it"),
    ],
)
def test_damaged_files_of_torchao_are_refused(old: str, new: str, told: str, saved: Callable[..., Path]):
    path = saved("Int8WeightOnlyConfig") / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {key: text.replace(old, new) if "q_proj" in key else text for key, text in file.metadata().items()}
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match=told):
        QuantizedCheckpoint(path.parent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_symmetric_integers_go_to_mlx_and_come_back(dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    bitgrain.quantize(tmp_path / "model", tmp_path / "first", "W4A16", solver="rtn")
    convert(tmp_path / "first", "mlx", tmp_path / "mlx")
    convert(tmp_path / "mlx", "compressed-tensors", tmp_path / "back")
    folders = [QuantizedCheckpoint(tmp_path / name) for name in ("first", "mlx", "back")]
    for name in folders[0].layers:
        dense = [stored.dense(name) for stored in folders]
        assert torch.equal(dense[0], dense[1])
        assert torch.equal(dense[0], dense[2])
    ours, theirs = (bitgrain.load(tmp_path / name)(IDS).logits for name in ("first", "mlx"))
    assert torch.equal(ours, theirs)
    config = folders[1].config
    assert (config["bits"], config["group_size"], config["lm_head"]) == (4, 128, False)


def test_quantize_writes_mlx_and_what_it_cannot_say_is_refused(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "mlx", "W3A16", layout="mlx", solver="rtn")
    assert QuantizedCheckpoint(tmp_path / "mlx").layout.name == "mlx"
    with pytest.raises(PlanError, match="weight-only"):
        bitgrain.quantize(tiny("llama"), tmp_path / "w8", "W8A8", layout="mlx", solver="rtn")
    bitgrain.quantize(tiny("llama"), tmp_path / "asym", "W4A16_ASYM", solver="rtn")
    with pytest.raises(PlanError, match=r"as uint4 .* with minima"):
        convert(tmp_path / "asym", "mlx", tmp_path / "out")


def test_an_older_file_of_mlx_without_quantization_config_loads(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "mlx", "W4A16", layout="mlx", solver="rtn")
    path = tmp_path / "mlx" / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config")
    path.write_text(json.dumps(config))
    assert torch.isfinite(bitgrain.load(tmp_path / "mlx")(IDS).logits).all()
