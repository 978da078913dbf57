"""The doctor: what is wrong with calibration text and with what the model's layers saw of it.

Texts are compared by their n-grams of 13 tokens (GPT-3's measure of contamination, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

NGRAM = 13
REPEATED = 0.05
"""Share of n-grams that occurred before, from which text counts as duplicated."""
OVERLAP = 0.01
"""Share of the evaluation's n-grams that are in the calibration text, from which its figures are in doubt."""
DEGENERATE = 0.5
"""Share of a window that one token takes, from which the window says little."""
STARVED = 0.1
"""Share of an even load of tokens below which an expert counts as hardly seen."""

LAYERS = 6
"""Of a model with experts, of which one finding tells; the manifest has them all."""

Severity = Literal["note", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something to tell the user; a `warning` is likely to cost accuracy or to spoil a measurement."""

    severity: Severity
    message: str


def examine(
    ids: Tensor,
    *,
    widest: int,
    experts: Mapping[str, Mapping[str, Any]] | None = None,
    evaluation_ids: Tensor | None = None,
) -> list[Finding]:
    """Findings on calibration windows `ids` int64 [windows, seqlen].

    widest          inputs of the widest layer that is quantized by its Hessian
    experts         by the name of an experts module: how many `tokens` reached each of its experts (None:
                    unknown), the `threshold` of few, and the `policy` for those
    evaluation_ids  int64 [windows, seqlen] that the result will be measured on
    """
    found = [
        *_repetition(ids),
        *_degenerate(ids),
        *_few_tokens(ids.numel(), widest),
        *examine_experts(experts or {}),
    ]
    return found if evaluation_ids is None else found + _overlap(ids, evaluation_ids)


def ngrams(ids: Tensor, n: int = NGRAM) -> Tensor:
    """Hashes int64 [windows * (seqlen - n + 1)] of the n-grams of ids [windows, seqlen], window by window.

    Sum of token times an odd 64-bit number for each place, modulo 2**64, in two rounds: equal n-grams are equal,
    different ones are so with a chance of about 2**-64.
    """
    if ids.shape[-1] < n:
        return ids.new_empty(0)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (n,), generator=generator).mul_(2).add_(1).to(ids.device)
    length = ids.shape[-1] - n + 1
    total = torch.zeros_like(ids[..., :length])
    for place in range(n):
        mixed = (ids[..., place : place + length] + 1) * factors[place]
        total += (mixed ^ (mixed >> 31)) * factors[-1 - place]
    return total.reshape(-1)


def _runs(ids: Tensor) -> Tensor:
    """Which n-grams are one token all along, bool, in the order of `ngrams`."""
    return (ids.unfold(-1, NGRAM, 1) == ids[..., : ids.shape[-1] - NGRAM + 1, None]).all(dim=-1).reshape(-1)


def _repetition(ids: Tensor) -> list[Finding]:
    found: list[Finding] = []
    copies = ids.shape[0] - int(torch.unique(ids, dim=0).shape[0])
    if copies:
        message = f"{copies} of {ids.shape[0]} calibration windows are copies of others: they say nothing new"
        found.append(Finding("warning", message))
    grams = ngrams(ids)
    if grams.numel():
        grams = grams[~_runs(ids)]  # blanks in front of code and rulers are no text
    if grams.numel():
        share = 1 - torch.unique(grams).numel() / grams.numel()
        if share >= REPEATED and not copies:
            message = f"{share:.0%} of the calibration text repeats itself ({NGRAM} tokens in a row that came before)"
            found.append(Finding("warning", f"{message}: use text without duplicates"))
    return found


def _degenerate(ids: Tensor) -> list[Finding]:
    ordered = ids.sort(dim=-1).values
    reach = int(DEGENERATE * ids.shape[-1])
    if reach < 1:
        return []
    # a token that takes more than `reach` places of a sorted row is found `reach` places further on
    bad = (ordered[:, reach:] == ordered[:, : ordered.shape[-1] - reach]).any(dim=-1).nonzero().view(-1)
    if not bad.numel():
        return []
    which = ", ".join(str(int(i)) for i in bad[:3]) + (" ..." if bad.numel() > 3 else "")
    return [
        Finding(
            "warning",
            f"{bad.numel()} calibration windows ({which}) consist of one token for the most part: "
            "blanks, padding or damaged text; use prose or code",
        )
    ]


def _few_tokens(tokens: int, widest: int) -> list[Finding]:
    if tokens < widest:
        return [
            Finding(
                "warning",
                f"{tokens} calibration tokens for a layer of {widest} inputs: its Hessian is singular and only damping "
                "makes it usable; use more windows",
            )
        ]
    if tokens < 4 * widest:
        message = f"{tokens} calibration tokens are few for a layer of {widest} inputs: 4 tokens an input are better"
        return [Finding("note", message)]
    return []


def examine_experts(experts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Findings on experts: those that no token reached, or few; see `examine`."""
    none: list[str] = []
    few: list[str] = []
    uneven: list[str] = []
    for module, told in experts.items():
        seen = {i: count for i, count in enumerate(told["tokens"]) if count is not None}
        threshold, remedy = told["threshold"], _REMEDIES[told["policy"]]
        even = sum(seen.values()) / max(1, len(seen))
        idle = [str(i) for i, count in seen.items() if count == 0]
        rare = [f"{i}: {seen[i]}" for i in sorted(seen, key=seen.__getitem__) if 0 < seen[i] < threshold]
        odd = [str(i) for i, count in seen.items() if threshold <= count < STARVED * even]
        none += [f"{module}: no calibration token reached {_listed(idle, len(seen))}: {remedy}"] * bool(idle)
        few += [f"{module}: fewer than {threshold} tokens reached {_listed(rare, len(seen))}: {remedy}"] * bool(rare)
        share = f"saw less than {STARVED:.0%} of an even share of the tokens"
        uneven += [f"{module}: {_listed(odd, len(seen))} {share}"] * bool(odd)
    return [
        *(Finding("warning", f"{text}; use more or more varied text") for text in _few_layers(none)),
        *(Finding("note", text) for text in (*_few_layers(few), *_few_layers(uneven))),
    ]


_REMEDIES = {
    "borrow": "they borrow what all tokens of their layer would show them",
    "all": "they were shown all tokens of their layer",
    "nearest": "they are rounded to nearest",
}


def _few_layers(texts: Sequence[str]) -> list[str]:
    """The first of many layers, of which the last says how many more there are."""
    if len(texts) <= LAYERS:
        return list(texts)
    return [*texts[: LAYERS - 1], f"{texts[LAYERS - 1]} (and so in {len(texts) - LAYERS} more layers)"]


def _listed(experts: Sequence[str], of: int) -> str:
    names = ", ".join(experts[:8]) + (" ..." if len(experts) > 8 else "")
    return f"{len(experts)} of {of} experts ({names})"


def _overlap(ids: Tensor, evaluation_ids: Tensor) -> list[Finding]:
    grams = ngrams(evaluation_ids)
    if not grams.numel():
        return []
    share = float(torch.isin(grams, ngrams(ids)).double().mean())
    if share == 0:
        return []
    message = f"{share:.2%} of the evaluation text ({NGRAM} tokens in a row) is in the calibration text"
    if share < OVERLAP:
        return [Finding("note", message)]
    return [Finding("warning", f"{message}: figures measured on it flatter the result; evaluate on other text")]
