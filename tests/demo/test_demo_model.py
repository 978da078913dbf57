"""The built-in model: what it is made of, and that it has learned something."""

import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitgrain.demo
from bitgrain.calibration.corpus import builtin_modules, builtin_text
from bitgrain.demo import demo_model_path
from bitgrain.errors import ModelError

WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()


def test_the_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in demo_model_path().iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 6_000_000


def test_every_file_is_plain_text_that_names_no_machine_or_is_the_weights():
    for path in demo_model_path().iterdir():
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            assert "/home/" not in text
            assert str(Path.home()) not in text


def test_shape_and_dtype(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    for name, linear in linears.items():
        assert linear.in_features % 128 == 0, name
        assert linear.out_features % 128 == 0, name
    assert model.config.num_attention_heads > model.config.num_key_value_heads  # grouped queries
    assert model.config.max_position_embeddings == WINDOW


def test_the_file_holds_what_the_model_has(model):
    path = demo_model_path() / "model.safetensors"
    with safe_open(path, framework="pt") as weights:  # pyright: ignore[reportPrivateImportUsage]
        names = set(weights.keys())
    assert names == set(model.state_dict()) - {"lm_head.weight"}  # tied to the embedding
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert json.loads((demo_model_path() / "config.json").read_text())["tie_word_embeddings"] is True


def test_no_weight_is_dead_or_wild(model):
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.float().std() > 1e-3, name
        assert parameter.float().abs().max() < 50, name


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        " leading and trailing \n\n\n",
        "\ttabs\r\nand carriage returns\r",
        "non-ASCII: äöü ß 漢字 🐍 e\u0301 \u00a0\x00\x7f",
        "a ,  b . n't  don't",
        "",
    ],
)
def test_the_tokenizer_loses_nothing(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_round_trips_source_code(tokenizer):
    for name in ("heapq", "textwrap", "netrc"):
        source = dict(builtin_modules("evaluation"))[name]
        ids = tokenizer(source)["input_ids"]
        assert tokenizer.decode(ids) == source
        assert len(ids) < len(source.encode()) / 2


def test_the_tokenizer_adds_no_token_and_knows_its_special_ones(tokenizer, model):
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    ours = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ours


def test_it_predicts_text_that_it_has_not_read(tokenizer, model):
    ids = torch.tensor(tokenizer(builtin_text("evaluation"))["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    windows = windows[:: len(windows) // 12][:12]
    with torch.inference_mode():
        logits = model(input_ids=windows).logits[:, :-1].float()
    perplexity = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())
    counts = torch.bincount(ids, minlength=len(tokenizer)).double()
    share = counts[counts > 0] / counts.sum()
    unigram = math.exp(-(share * share.log()).sum().item())  # the entropy of this very text: no unigram is better
    assert unigram > 200
    assert perplexity < 50  # measured: about 30 on Python 3.11
    assert perplexity < unigram / 5


def test_a_text_of_another_sort_is_harder(tokenizer, model):
    def loss(ids: torch.Tensor) -> float:
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        return F.cross_entropy(logits, ids[1:]).item()

    ids = torch.tensor(tokenizer(builtin_text("evaluation", max_bytes=8000))["input_ids"])[:WINDOW]
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert loss(ids) + 1 < loss(shuffled)


def test_generation_writes_something(tokenizer, model):
    ids = tokenizer("def __init__(self", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert tokenizer.decode(out[0]).startswith("def __init__(self")


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bitgrain.demo, "files", lambda _: tmp_path)
    with pytest.raises(ModelError, match=r"lacks config\.json, model\.safetensors"):
        demo_model_path()


def test_a_zipped_installation_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("model/config.json", "{}")
    with zipfile.ZipFile(tmp_path / "app.zip") as archive:
        monkeypatch.setattr(bitgrain.demo, "files", lambda _: zipfile.Path(archive))
        with pytest.raises(ModelError, match="archive"):
            demo_model_path()
