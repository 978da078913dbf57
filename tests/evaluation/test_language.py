import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.errors import ModelError, NumericsError, TextError
from bitgrain.evaluation import language
from bitgrain.evaluation.language import BaseReference, Evaluation, evaluate_model, record_base
from bitgrain.runtime.kv_cache import get_cache_scheme

VOCAB = 11


class Bigram(nn.Module):
    """Logits depend on the token alone: row t of the table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.config = SimpleNamespace(vocab_size=table.shape[1])
        self.calls: list[int] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.calls.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def random_table(seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def random_windows(n: int = 5, length: int = 13, vocab: int = VOCAB) -> torch.LongTensor:
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(9))  # type: ignore[return-value]


def tiny_llama(seed: int, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def slow_twin(model: nn.Module, base: nn.Module, windows: Tensor) -> dict[str, float]:
    """Token by token, numpy float64."""
    nll, base_nll, kl, top = [], [], [], []
    for window in windows:
        with torch.no_grad():
            q_logits = model(input_ids=window[None]).logits[0].double().numpy()
            p_logits = base(input_ids=window[None]).logits[0].double().numpy()
        for position in range(len(window)):
            q, p = q_logits[position], p_logits[position]
            log_q = q - q.max() - math.log(np.exp(q - q.max()).sum())
            log_p = p - p.max() - math.log(np.exp(p - p.max()).sum())
            kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
            top.append(q.argmax() == p.argmax())
            if position + 1 < len(window):
                nll.append(-log_q[window[position + 1]])
                base_nll.append(-log_p[window[position + 1]])
    return {
        "perplexity": math.exp(np.mean(nll)),
        "base_perplexity": math.exp(np.mean(base_nll)),
        "kl": float(np.mean(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(np.mean(top)),
    }


def figures(result: Evaluation) -> dict[str, float]:
    names = ("perplexity", "base_perplexity", "kl", "kl_p99", "top1")
    return {name: value for name, value in result.to_json().items() if name in names and value is not None}


# --- closed forms --------------------------------------------------------------------------------------------------


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    result = evaluate_model(Bigram(torch.zeros(VOCAB, VOCAB)), random_windows())
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert (result.base_perplexity, result.kl, result.kl_p99, result.top1) == (None, None, None, None)
    assert (result.tokens, result.windows, result.seqlen) == (65, 5, 13)
    assert result.tokens_per_s > 0


def test_a_model_compared_with_itself():
    model = tiny_llama(0)
    result = evaluate_model(model, random_windows(), base=model)
    assert (result.kl, result.kl_p99, result.top1) == (0.0, 0.0, 1.0)
    assert result.perplexity == result.base_perplexity


def test_divergence_of_known_distributions():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.75, 0.125, 0.125])
    base, model = Bigram(p.log().expand(3, 3)), Bigram(q.log().expand(3, 3))
    result = evaluate_model(model, random_windows(vocab=2), base=base)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.125)
    assert result.kl == pytest.approx(expected, rel=1e-6)
    assert result.kl_p99 == pytest.approx(expected, rel=1e-6)
    assert result.base_perplexity == pytest.approx(2.0, rel=1e-6)


def test_what_the_quantized_model_excludes_is_infinitely_far():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    result = evaluate_model(Bigram(q.log().expand(2, 2)), random_windows(vocab=2), base=Bigram(p.log().expand(2, 2)))
    assert (result.perplexity, result.kl, result.kl_p99) == (math.inf, math.inf, math.inf)


def test_the_last_position_is_compared_but_not_predicted_from():
    """Token 10 stands last only: what follows it cannot matter to the perplexity, but does to the divergence."""
    windows = random_windows(vocab=10)
    windows[:, -1] = 10
    table = random_table(1)
    changed = table.clone()
    changed[10] *= -1
    result = evaluate_model(Bigram(changed), windows, base=Bigram(table))
    assert result.perplexity == result.base_perplexity
    assert result.kl is not None
    assert result.kl > 0.01


# --- the slow twin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length", "batch"), [(1, 2, 4), (1, 30, 1), (7, 13, 3), (9, 40, 100)])
@pytest.mark.parametrize("piece", [language.PIECE_BYTES, 4 * VOCAB * 4])
def test_agrees_with_the_slow_twin(count: int, length: int, batch: int, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(language, "PIECE_BYTES", piece)
    model, base = Bigram(random_table(1)), Bigram(random_table(2))
    windows = random_windows(count, length)
    result = evaluate_model(model, windows, base=base, batch_size=batch)
    assert figures(result) == pytest.approx(slow_twin(model, base, windows), rel=2e-6)
    alone = evaluate_model(model, windows, batch_size=batch)
    assert alone.perplexity == result.perplexity


def test_batch_size_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    """A model whose rows do not depend on the batch gives the same bits; one with matmuls the same to rounding."""
    windows = random_windows(10, 20)
    model, base = Bigram(random_table(1)), Bigram(random_table(2))
    llama, llama_base = tiny_llama(1), tiny_llama(2)
    first = figures(evaluate_model(model, windows, base=base, batch_size=4))
    first_llama = figures(evaluate_model(llama, windows, base=llama_base, batch_size=4))
    for batch, piece in ((1, 4 * VOCAB), (3, 4 * VOCAB * 7), (10, 1 << 20)):
        monkeypatch.setattr(language, "PIECE_BYTES", piece)
        assert figures(evaluate_model(model, windows, base=base, batch_size=batch)) == first
        assert figures(evaluate_model(llama, windows, base=llama_base, batch_size=batch)) == pytest.approx(
            first_llama, rel=1e-4
        )


def test_bfloat16_logits_are_normalised_in_float32():
    model, base = Bigram(random_table(1).bfloat16()), Bigram(random_table(2).bfloat16())
    windows = random_windows()
    assert figures(evaluate_model(model, windows, base=base)) == pytest.approx(
        slow_twin(model, base, windows), rel=2e-6
    )


def test_logits_are_bounded_by_a_smaller_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(language, "LOGIT_BYTES", 2 * 13 * VOCAB * 4)
    model = Bigram(random_table(1))
    evaluate_model(model, random_windows(5, 13), batch_size=4)
    assert model.calls == [2, 2, 1]
    unknown = Bigram(random_table(1))
    del unknown.config
    evaluate_model(unknown, random_windows(3, 13), batch_size=4)
    assert unknown.calls == [1, 1, 1]


def test_model_may_return_plain_logits_and_keeps_its_modes():
    class Plain(nn.Sequential):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    model = Plain(nn.Embedding(VOCAB, VOCAB), nn.Dropout(0.9))
    model[0].eval()
    windows = random_windows()
    first, second = evaluate_model(model, windows), evaluate_model(model, windows)
    assert first.perplexity == second.perplexity
    assert [module.training for module in model.modules()] == [True, False, True]


# --- a base that is run once ----------------------------------------------------------------------------------------


def test_recorded_base_gives_the_same_figures_without_running_again():
    model, base = tiny_llama(1), Bigram(random_table(2))
    windows = random_windows(7)
    direct = evaluate_model(model, windows, base=base, batch_size=3)
    reference = record_base(base, windows, batch_size=3)
    assert reference.logits is not None
    assert reference.perplexity == direct.base_perplexity
    ran = len(base.calls)
    assert figures(evaluate_model(model, windows, base=reference, batch_size=3)) == figures(direct)
    assert figures(evaluate_model(model, windows, base=reference, batch_size=2)) == pytest.approx(
        figures(direct), rel=1e-4
    )
    assert len(base.calls) == ran


def test_base_that_does_not_fit_is_run_again():
    model, base = tiny_llama(1), Bigram(random_table(2))
    windows = random_windows(7)
    size = windows.numel() * VOCAB * 4
    assert record_base(base, windows, keep_bytes=size).logits is not None
    reference = record_base(base, windows, keep_bytes=size - 1)
    assert reference.logits is None
    ran = len(base.calls)
    assert figures(evaluate_model(model, windows, base=reference)) == figures(evaluate_model(model, windows, base=base))
    assert len(base.calls) > ran


def test_recorded_base_is_kept_as_it_came_and_belongs_to_its_windows():
    base = Bigram(random_table(2).bfloat16())
    windows = random_windows(7)
    reference = record_base(base, windows)
    assert reference.logits is not None
    assert len(reference.logits) == 7
    assert reference.logits[0].dtype == torch.bfloat16
    with pytest.raises(TextError, match="recorded on other windows"):
        evaluate_model(base, windows[:6], base=reference)
    windows[0, 0] += 1  # the reference has its own copy
    with pytest.raises(TextError, match="recorded on other windows"):
        evaluate_model(base, windows, base=reference)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_name_model_and_window(value: float):
    windows = random_windows(6, 13, vocab=10)
    windows[4, 7] = 10
    good, bad = Bigram(random_table(1)), Bigram(random_table(1))
    with torch.no_grad():
        bad.table[10, 3] = value
    with pytest.raises(
        NumericsError, match="the quantized model gives NaN or infinite logits in window 4 at position 7"
    ):
        evaluate_model(bad, windows, base=good)
    with pytest.raises(NumericsError, match="the base model gives NaN or infinite logits in window 4 at position 7"):
        evaluate_model(good, windows, base=bad, batch_size=3)
    with pytest.raises(NumericsError, match=r"the base model .* window 4 at position 7"):
        record_base(bad, windows)
    with pytest.raises(NumericsError, match="the measured model"):
        evaluate_model(bad, windows)


def test_vocabularies_must_agree():
    small = Bigram(random_table(1)[:, :10])
    with pytest.raises(ModelError, match="base model has 11 token ids and the quantized model 10"):
        evaluate_model(small, random_windows(vocab=10), base=Bigram(random_table(1)))
    del small.config
    with pytest.raises(ModelError, match="base model has 11 token ids and the quantized model 10"):
        evaluate_model(small, random_windows(vocab=10), base=Bigram(random_table(1)))


def test_windows_must_fit_the_model():
    model = tiny_llama(0)
    with pytest.raises(TextError, match="hold token ids 3 to 11 and the measured model has 11 ids"):
        evaluate_model(model, torch.tensor([[3, 11]]))
    with pytest.raises(TextError, match="hold token ids -1 to 3"):
        evaluate_model(model, torch.tensor([[3, -1]]))
    with pytest.raises(TextError, match="windows of 65 tokens are longer than the 64 positions"):
        evaluate_model(model, random_windows(1, 65))
    for bad in (torch.zeros(0, 5, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, 5)):
        with pytest.raises(TextError, match=r"windows must be int64 \[n, L\]"):
            evaluate_model(model, bad)  # type: ignore[arg-type]


def test_encoders_are_sent_to_the_embeddings():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB, **sizes)
    for kind in (BertForMaskedLM, BertLMHeadModel, BertModel):
        with pytest.raises(ModelError, match=r"not a causal language model.*embeddings"):
            evaluate_model(kind(config), random_windows())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="not a causal language model"):
        evaluate_model(t5, random_windows())
    with pytest.raises(ModelError, match="not a causal language model"):
        evaluate_model(tiny_llama(0, is_causal=False), random_windows())
    with pytest.raises(ModelError, match=r"the base model \(LlamaModel\) gives no logits"):
        evaluate_model(tiny_llama(0), random_windows(), base=tiny_llama(0).model)
    decoder = BertLMHeadModel(BertConfig(vocab_size=VOCAB, is_decoder=True, **sizes))
    assert evaluate_model(decoder, random_windows()).perplexity > 1


# --- reports ----------------------------------------------------------------------------------------------------------


def test_json_has_every_figure():
    model = Bigram(random_table(1))
    record = evaluate_model(model, random_windows(), base=Bigram(random_table(2))).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == [
        "perplexity",
        "base_perplexity",
        "kl",
        "kl_p99",
        "top1",
        "tokens_per_s",
        "tokens",
        "windows",
        "seqlen",
    ]


def test_progress_is_told_and_ended_even_by_errors():
    class Listener:
        def __init__(self) -> None:
            self.events: list[object] = []

        def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
            self.events.append((total, unit))

        def advance(self, amount: float = 1.0, note: str = "") -> None:
            self.events.append(amount)

        def finish(self) -> None:
            self.events.append("finish")

    listener = Listener()
    model = Bigram(random_table(1))
    reference = record_base(model, random_windows(5, 13), progress=listener)
    evaluate_model(model, random_windows(5, 13), base=reference, batch_size=4, progress=listener)
    assert listener.events == [(65, "tokens"), 52, 13, "finish"] * 2
    listener.events.clear()
    with pytest.raises(TextError):
        evaluate_model(model, random_windows(5, 1), progress=listener)
    assert listener.events[-1] == "finish"


# --- a trained model --------------------------------------------------------------------------------------------------


def test_trained_model_against_the_slow_twin(shared: Path):
    folder = shared / "models" / "llama"
    text = read_text(shared / "text" / "heldout.txt")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                step = weight.abs().amax(dim=1, keepdim=True) / 7
                weight.copy_((weight / step).round() * step)
    windows = token_windows(load_tokenizer(folder), text, 96, 5, vocab_size=4096, special_tokens=True)
    reference: BaseReference = record_base(base, windows)
    result = figures(evaluate_model(model, windows, base=reference, batch_size=2))
    assert result == pytest.approx(slow_twin(model, base, windows), rel=1e-4)
    assert 0.005 < result["kl"] < 0.2


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def test_through_a_cache_of_keys_and_values():
    model, windows = llama(), random_windows(3, 100, 50)
    names = ("int8", "int2", "kivi-int2")
    found = {one: evaluate_model(model, windows, base=model, kv_cache=get_cache_scheme(one)) for one in names}
    assert 0 < found["int8"].kl < found["int2"].kl
    assert 0 < found["kivi-int2"].kl < found["int2"].kl
    plain = evaluate_model(model, windows, base=model)
    assert found["int8"].base_perplexity == plain.perplexity
    with pytest.raises(ModelError, match="is not of transformers: it has no KV cache"):
        evaluate_model(Bigram(random_table(0)), random_windows(), kv_cache=get_cache_scheme("int8"))


def test_a_model_that_does_not_use_the_cache():
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids, **_):
            return super().forward(input_ids=input_ids, use_cache=False)

    with pytest.raises(ModelError, match="does not use the cache that it is given"):
        evaluate_model(Forgetful(llama().config).eval(), random_windows(2, 40, 50), kv_cache=get_cache_scheme("int8"))
