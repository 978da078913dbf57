"""The jobs finetune and merge: adapters that appear whole, resumed to the same bytes, and what is said of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bitgrain
from bitgrain.errors import CheckpointError, ModelError, NumericsError, OutputError, ResumeError, SchemeError, TextError
from bitgrain.pipeline.finetune import Finetuned
from bitgrain.progress import QuietProgress
from bitgrain.training import next_token
from bitgrain.training.lora import load_adapter

pytestmark = pytest.mark.usefixtures("device")

pytest.importorskip("peft")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"rank": 4, "seqlen": 24, "batch": 2, "steps": 8, "rate": 1e-2, "save_every": 2}


class Killed(Exception):
    pass


class KillAt(QuietProgress):
    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        assert note.startswith("loss ")
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def base(readable: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "nf4"
    bitgrain.quantize(readable("llama"), out, "NF4")
    return out


@pytest.fixture
def go(base: Path, text: Path) -> Callable[..., Finetuned]:
    return lambda out, **changes: bitgrain.finetune(base, out, **{"text": text, **SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_killed_and_resumed_it_ends_in_the_same_bytes(go: Any, tmp_path: Path, optimizer: str):
    whole = go(tmp_path / "whole", optimizer=optimizer)
    assert whole.after < whole.before
    assert len(whole.losses) == 8
    out = tmp_path / "out"
    for step in (1, 4, 3):
        with pytest.raises(Killed):
            go(out, optimizer=optimizer, progress=KillAt(step))
        assert not out.exists()
    again = go(out, optimizer=optimizer, workers=2)
    assert contents(out) == contents(tmp_path / "whole")
    assert (again.losses, again.before, again.after) == (whole.losses, whole.before, whole.after)
    assert not out.with_name("out.partial").exists()


def test_merged_it_is_a_plain_model(go: Any, base: Path, tmp_path: Path):
    adapter, merged, again = tmp_path / "adapter", tmp_path / "merged", tmp_path / "again"
    found = go(adapter)
    assert set(contents(adapter)) == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert json.loads((adapter / "training.json").read_text())["losses"] == list(found.losses)
    assert found.base_nbytes < found.dense_nbytes
    adapted = load_adapter(bitgrain.load(base, device="cpu", low_bit=True), adapter)
    assert found.trained == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    bitgrain.merge(base, adapter, merged)
    assert not merged.with_name("merged.partial").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-4)
    assert not torch.allclose(
        logits(plain), logits(bitgrain.load(base, device="cpu", execution="dequantize")), atol=1e-2
    )
    bitgrain.quantize(merged, again, "NF4")
    assert (
        logits(bitgrain.load(again, device="cpu", execution="dequantize")) - logits(plain)
    ).square().mean() < 0.1 * logits(plain).square().mean()


def test_a_killed_merge_leaves_nothing_that_looks_whole(
    go: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter, merged, partial = tmp_path / "adapter", tmp_path / "merged", tmp_path / "merged.partial"
    go(adapter, steps=2)
    monkeypatch.setattr("bitgrain.pipeline.merge.fsync_tree", lambda folder: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        bitgrain.merge(base, adapter, merged)
    assert not merged.exists()
    monkeypatch.undo()
    bitgrain.merge(base, adapter, merged)
    assert not partial.exists()
    with pytest.raises(OutputError, match="exists already"):
        bitgrain.merge(base, adapter, merged)
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(OutputError, match="in the way"):
        bitgrain.merge(base, adapter, tmp_path / "other")
    with pytest.raises(CheckpointError, match="no adapter"):
        bitgrain.merge(base, base, tmp_path / "new")


def test_nan_keeps_the_last_good_state(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, out, honest = tmp_path / "whole", tmp_path / "out", next_token.next_token_loss
    go(whole)
    calls = 0

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(ids)
        return honest(model, ids) * (torch.nan if calls > 10 else 1.0)

    monkeypatch.setattr(next_token, "next_token_loss", loss)
    with pytest.raises(NumericsError, match=r"stopped in step 6: the loss is nan.*last good state, that of step 4"):
        go(out)
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(ResumeError, match="rate"):
        go(out, rate=1e-3)
    go(out)
    assert contents(out) == contents(whole)


def test_bad_input(go: Any, base: Path, readable: Callable[..., Path], text: Path, tmp_path: Path):
    out, longer = tmp_path / "out", readable("llama", max_position_embeddings=1000)
    with pytest.raises(TextError, match=r"37 windows of 24 tokens, 2 of which.*one batch needs 40"):
        go(out, batch=40)
    with pytest.raises(TextError, match="888 tokens and one window needs 1000"):
        bitgrain.finetune(longer, out, text=text, seqlen=1000)
    for seqlen in (1, 2000):
        with pytest.raises(TextError, match="takes 2 to 64"):
            go(out, seqlen=seqlen)
    with pytest.raises(ModelError, match="BertModel predicts no next token"):
        bitgrain.finetune(readable("bert"), out, text=text)
    with pytest.raises(SchemeError, match="no adapter fits"):
        go(out, targets=["query"])
    with pytest.raises(SchemeError, match="rate above 0"):
        go(out, rate=-1.0)
    with pytest.raises(OutputError, match="exists already"):
        go(base)
    with pytest.raises(TextError, match="does not exist"):
        go(out, text=tmp_path / "nothing.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_model_and_named_targets(readable: Callable[..., Path], text: Path, tmp_path: Path):
    found = bitgrain.finetune(
        readable("llama"), tmp_path / "out", text=text, targets=["q_proj"], **{**SETTINGS, "steps": 2}
    )
    assert (found.packed, found.trained) == (0, 2 * 4 * (128 + 128))
    assert found.base_nbytes == found.dense_nbytes
