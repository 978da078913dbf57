"""What the doctor finds, and that it is silent about sound text."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.calibration.doctor import LAYERS, NGRAM, Finding, examine, ngrams


def text(windows: int = 16, seqlen: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1000, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def reached(*tokens: int | None, policy: str = "borrow") -> dict[str, Any]:
    """What is told of a layer whose experts need 64 tokens."""
    return {"policy": policy, "threshold": 64, "tokens": list(tokens)}


def messages(found: list[Finding]) -> str:
    return "\n".join(f"{finding.severity}: {finding.message}" for finding in found)


def test_sound_text_gives_no_findings():
    load = {"layers.0.experts": reached(250, 300, 200, 270)}
    assert examine(text(), widest=256, experts=load, evaluation_ids=text(seed=1)) == []


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 20), st.integers(2, 3), st.integers(1, 5))
def test_ngrams_are_equal_where_the_tokens_are(seed: int, rows: int, length: int, tokens: int, n: int):
    ids = torch.randint(0, tokens, (rows, length), generator=torch.Generator().manual_seed(seed))
    hashes = ngrams(ids, n).tolist()
    grams = [tuple(row[i : i + n]) for row in ids.tolist() for i in range(length - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(grams))
    assert len(set(zip(hashes, grams, strict=True))) == len(set(grams))


def test_order_and_place_matter_to_ngrams():
    a, b = ngrams(torch.tensor([[1, 2, 3, 4]]), 4), ngrams(torch.tensor([[4, 3, 2, 1]]), 4)
    assert not torch.equal(a, b)


def test_copies_of_windows():
    ids = text()
    ids[5] = ids[9] = ids[2]
    assert messages(examine(ids, widest=8)) == (
        "warning: 2 of 16 calibration windows are copies of others: they say nothing new"
    )


def test_repeated_passages_count_but_runs_of_one_token_do_not():
    ids = text()
    ids[3:5, :40] = ids[6:8, 10:50]
    (found,) = examine(ids, widest=8)
    share = 2 * (40 - NGRAM + 1) / (16 * (64 - NGRAM + 1))
    assert found.severity == "warning"
    assert f"{share:.0%} of the calibration text repeats itself" in found.message
    blanks = text()
    blanks[:, 20:50] = 7  # as in front of code
    assert examine(blanks, widest=8) == []


@pytest.mark.parametrize(("run", "bad"), [(32, False), (33, True), (64, True)])
def test_windows_of_one_token(run: int, bad: bool):
    ids = text()
    ids[4, :run] = 5
    found = messages(examine(ids, widest=8))
    assert ("1 calibration windows (4) consist of one token for the most part" in found) is bad


def test_too_few_tokens_for_the_widest_layer():
    ids = text()  # 1024 tokens
    assert "warning: 1024 calibration tokens for a layer of 1025 inputs: its Hessian is singular" in messages(
        examine(ids, widest=1025)
    )
    assert messages(examine(ids, widest=1024)).startswith("note: 1024 calibration tokens are few for a layer of 1024")
    assert messages(examine(ids, widest=257)).startswith("note")
    assert examine(ids, widest=256) == []


def test_experts_that_saw_little():
    remedies = {
        "nearest": "they are rounded to nearest",
        "borrow": "they borrow what all tokens of their layer would show them",
        "all": "they were shown all tokens of their layer",
    }
    for policy, remedy in remedies.items():
        told = {"m.experts": reached(0, 9900, 63, 3, 0, 98, None, policy=policy), "n.experts": reached(64, 64)}
        assert messages(examine(text(), widest=8, experts=told)) == (
            f"warning: m.experts: no calibration token reached 2 of 6 experts (0, 4): {remedy}; "
            "use more or more varied text\n"
            f"note: m.experts: fewer than 64 tokens reached 2 of 6 experts (3: 3, 2: 63): {remedy}\n"
            "note: m.experts: 1 of 6 experts (5) saw less than 10% of an even share of the tokens"
        )
    many = examine(text(), widest=8, experts={"m": reached(*[0] * 20)})
    assert "20 of 20 experts (0, 1, 2, 3, 4, 5, 6, 7 ...)" in messages(many)


def test_of_many_layers_some_are_named():
    found = examine(text(), widest=8, experts={f"layers.{i}.experts": reached(0, 500) for i in range(40)})
    assert len(found) == LAYERS
    assert found[0].message.startswith("layers.0.experts")
    assert f"(and so in {40 - LAYERS} more layers)" in found[-1].message


@pytest.mark.parametrize(("tokens", "severity"), [(0, None), (NGRAM, "note"), (50, "warning")])
def test_overlap_with_the_evaluation(tokens: int, severity: Any):
    ids, evaluation = text(), text(seed=1)
    evaluation[0, 5 : 5 + tokens] = ids[7, 9 : 9 + tokens]
    found = examine(ids, widest=8, evaluation_ids=evaluation)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    if tokens:
        share = (tokens - NGRAM + 1) / (16 * (64 - NGRAM + 1))
        assert found[0].message.startswith(f"{share:.2%} of the evaluation text")


def test_short_windows_have_no_ngrams():
    assert examine(text(4, 5), widest=1, evaluation_ids=text(4, 5)) == [
        *examine(text(4, 5), widest=1),
    ]
    assert ngrams(torch.tensor([[1, 2]])).numel() == 0
    assert examine(torch.tensor([[1], [2]]), widest=0) == []
