"""llama.cpp itself runs the GGUF files that bitgrain writes, and gives the same logits: by `make test-interop`.

llama.cpp keeps keys and values in 16 bits, so logits are compared by their KL divergence. Without BLAS it also rounds
the inputs of quantized layers to 8 bits, which is then done on our side too, as far as that can be known.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.numerics import QTensor, QuantSpec, quantize
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.readers.compare import KL_TOLERANCE, Apart
from bitgrain.pipeline.readers.llama_cpp_reader import READER
from gguf_models import MODELS

pytestmark = pytest.mark.interop

TYPES = [one.name for one in BLOCK_TYPES.values() if one.spec is not None]


@pytest.fixture(autouse=True)
def llama_cpp() -> Any:
    """The package."""
    if (why := READER.missing()) is not None:
        pytest.skip(why)
    return import_module("llama_cpp")


@torch.no_grad()
def apart(path: Path, ids: Tensor, model: Path | None = None, tile: int = 0) -> Apart:
    """Logits of a model as bitgrain loads it, and as llama.cpp runs the file; `tile`: with inputs of blocks rounded as
    llama.cpp does, in tiles of so many."""
    ours = bitgrain.load(model or path, execution="dequantize", dtype=torch.float32)
    if tile:
        for name, module in ours.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(lambda _, given: (in_eight_bits(given[0], tile),))
    return Apart.of(ours(input_ids=ids).logits, READER.logits(path, ids))


def in_eight_bits(x: Tensor, tile: int) -> Tensor:
    """Inputs as ggml multiplies them with blocks: Q8_0 (tiles of 32) or Q8_K (tiles of 256)."""
    tiles = x.unflatten(-1, (-1, tile))
    scale = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((tiles / scale).round() * (scale.half().float() if tile == 32 else scale)).flatten(-2)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.ZOO, name, MODELS[name])
    zoo.save(name, tmp_path / "model")
    convert(tmp_path / "model", "gguf:f32", tmp_path / "out.gguf")
    ids = torch.randint(0, 127, (2, 60), generator=torch.Generator().manual_seed(3))
    ids = ids[:, :8] if name == "mistral" else ids  # llama.cpp knows nothing of its sliding window
    assert apart(tmp_path / "out.gguf", ids, tmp_path / "model").kl <= 1e-6


def rounded(values: Tensor, spec: QuantSpec) -> QTensor:
    """Weights [out, in] in a spec, rounded to nearest; minima, too."""
    if spec.minimum is None:
        return quantize(values, spec)
    tiles = to_tiles(values, spec.granularity)
    low = -tiles.amin(-1).clamp(max=0)
    steps = (tiles.amax(-1) + low).clamp(min=1e-6) / spec.high
    scale, minimum = (
        quantize(numbers, storage) if isinstance(storage, QuantSpec) else numbers.to(torch.float16)
        for numbers, storage in ((steps, spec.scale), (low, spec.minimum))
    )
    s, m = (scale_values(one).repeat_interleave(tiles.shape[-1], dim=1) for one in (scale, minimum))
    codes = torch.where(s == 0, 0, (values + m) / s).round().clamp(0, spec.high)
    return QTensor(spec.format.encode(codes), scale, None, spec, minimum=minimum)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type(type_name: str, shared: Path, tmp_path: Path) -> None:
    """Files of every type: as bitgrain packs blocks, and as it writes them again from what it read."""
    convert(shared / "models" / "llama", "gguf:f32", tmp_path / "f32.gguf")
    plain, block_type = open_gguf(tmp_path / "f32.gguf"), BLOCK_TYPES[type_name]
    assert block_type.spec is not None
    data, types = {}, {}
    for name, tensor in plain.tensors.items():
        data[name], types[name] = plain.read(name), tensor.type
        if name.startswith("blk") and len(tensor.shape) == 2:
            values = BLOCK_TYPES["F32"].values(data[name], tensor.shape)
            data[name], types[name] = block_type.pack(rounded(values, block_type.spec)), type_name
    plan = plan_gguf(plain.metadata, [(name, types[name], one.shape) for name, one in plain.tensors.items()])
    with GgufWriter(tmp_path / "first.gguf", plan) as writer:
        for name, rows in data.items():
            writer.write(name, rows)
        writer.finish()
    convert(tmp_path / "first.gguf", "gguf", tmp_path / "again.gguf")
    again = open_gguf(tmp_path / "again.gguf")
    assert all(again.read(name).equal(rows) and again.tensors[name].type == types[name] for name, rows in data.items())
    ids = load_tokenizer(shared / "models" / "llama")((shared / "text" / "heldout.txt").read_text()[:4000])["input_ids"]
    windows = torch.tensor([ids[:256], ids[256:512]])
    plain = apart(tmp_path / "again.gguf", windows)
    print(f"{type_name}: {plain}")
    if not READER.rounds(windows.shape[1]):
        assert plain.kl <= 1e-6
        return
    found = apart(tmp_path / "again.gguf", windows, tile=256 if block_type.block_size == 256 else 32)
    print(f"{type_name}: {found}, inputs rounded")
    # inputs that lie between two steps still go the other way now and then, and steps of 256 numbers are long
    assert found.kl <= KL_TOLERANCE or found.kl <= 0.6 * plain.kl <= 0.001


def test_the_tokenizers_agree(llama_cpp: Any, shared: Path, tmp_path: Path) -> None:
    text = (shared / "text" / "heldout.txt").read_text()[:20000] + " 12345  a\n\n\tb été 海 \U0001f642 It's"
    for name in ("llama", "stories260k"):
        source = shared / "models" / name
        convert(source, "gguf", tmp_path / f"{name}.gguf")
        model = llama_cpp.Llama(str(tmp_path / f"{name}.gguf"), vocab_only=True, verbose=False)
        ours = load_tokenizer(source)(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ours
