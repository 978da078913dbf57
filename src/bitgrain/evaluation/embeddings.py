"""What quantization cost an encoder: how far its sentence embeddings turned.

Embeddings are the mean over the tokens of the last hidden states, scaled to length 1 (Reimers and Gurevych 2019,
Sentence-BERT, section 3), so cosines are plain dot products.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import FloatTensor, Tensor, nn
from transformers import PreTrainedTokenizerBase

from bitgrain.errors import ModelError, NumericsError, TextError
from bitgrain.evaluation.language import evaluation_mode, locate
from bitgrain.progress import Progress, QuietProgress

__all__ = ["embedding_agreement", "sentence_embeddings"]

LONGEST = 512
BLOCK_ROWS = 1024


def sentence_embeddings(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    device: torch.device | str | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> FloatTensor:
    """float32 [n, d] on the CPU, one row of length 1 a sentence, in the order given.

    The model is moved to `device` if it is given. Sentences are cut after `max_length` tokens; None takes the
    longest that tokenizer and model allow, at most 512. A model with a head is used without it.

    Raises TextError: no sentences, or one without any token. ModelError: no hidden states come out.
    NumericsError: NaN or infinity, names the sentence.
    """
    if not sentences:
        raise TextError("there are no sentences to embed: give at least one")
    if device is not None:
        model.to(device)
    encoder = cast(nn.Module, getattr(model, "base_model", model))
    place = torch.device(device) if device is not None else locate(model)
    limit = max_length or _longest(model, tokenizer)
    # Padding by hand: tokenizers without a padding token work too, and no setting of the tokenizer is changed.
    encoded = tokenizer(list(sentences), padding=False, truncation=True, max_length=limit, return_token_type_ids=False)[
        "input_ids"
    ]
    ids = cast(list[list[int]], encoded)
    for index, row in enumerate(ids):
        if not row:
            raise TextError(f"sentence {index} ({sentences[index]!r}) has no tokens: leave it out")
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # little padding
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    progress = progress or QuietProgress()
    progress.start(len(ids), "sentences", "embed")
    rows: list[Tensor | None] = [None] * len(ids)
    try:
        with evaluation_mode(encoder):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                pooled = _embed(encoder, [ids[index] for index in batch], padding, place)
                for index, row in zip(batch, pooled):
                    if not row.isfinite().all():
                        raise NumericsError(
                            f"the embedding of sentence {index} holds NaN or infinity: if the model runs in float16, "
                            "load it in bfloat16 or float32; otherwise verify the checkpoint"
                        )
                    rows[index] = row
                progress.advance(len(batch))
    finally:
        progress.finish()
    return cast(FloatTensor, torch.stack([row for row in rows if row is not None]))


def _embed(encoder: nn.Module, ids: list[list[int]], padding: int, device: torch.device) -> Tensor:
    """float32 [batch, d] on the CPU."""
    width = max(map(len, ids))
    tokens = torch.tensor([row + [padding] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    output: Any = encoder(input_ids=tokens, attention_mask=mask)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise ModelError(
            f"{type(encoder).__name__} gives no last_hidden_state, so there are no embeddings: load the encoder "
            "itself (AutoModel)"
        )
    hidden = hidden.float().masked_fill(mask[:, :, None] == 0, 0.0)  # what stands at padding may even be NaN
    mean = hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return nn.functional.normalize(mean, dim=-1).cpu()


def _longest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    limit = min(LONGEST, tokenizer.model_max_length)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limit = min(limit, positions)
    for name, module in model.named_modules():
        # RoBERTa's table begins with rows that no token uses: those up to the padding id
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            table = cast(nn.Embedding, module)
            limit = min(limit, table.num_embeddings - cast(int, table.padding_idx) - 1)
    return int(limit)


def embedding_agreement(a: Tensor, b: Tensor) -> dict[str, float | int | None]:
    """Compare embeddings [n, d] of the same sentences: `a` of the base, `b` of the quantized model.

    Keys: `sentences`; `cosine_mean`, `cosine_min`, `cosine_p01` (1st percentile) of row i of `a` with row i of `b`;
    `neighbour_top1`: for how many sentences (0 to 1) the nearest other sentence is the same one;
    `similarity_error`: mean absolute change of the cosine of two different sentences. The last two are what search
    and clustering feel (a rotation common to all rows lowers the cosines, but not these); None below 3 sentences.

    Raises ModelError: shapes differ. NumericsError: NaN, infinity, or a row of zeros.
    """
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ModelError(
            f"embeddings of shapes {list(a.shape)} and {list(b.shape)} cannot be compared: embed the same sentences "
            "with models of the same width"
        )
    a, b = _unit_rows(a, "base"), _unit_rows(b, "quantized")
    cosines = (a * b).sum(-1).clamp(-1.0, 1.0)
    agreement: dict[str, float | int | None] = {
        "sentences": len(a),
        "cosine_mean": math.fsum(cosines.tolist()) / len(a),
        "cosine_min": float(cosines.min()),
        "cosine_p01": float(torch.quantile(cosines, 0.01)),
        "neighbour_top1": None,
        "similarity_error": None,
    }
    if len(a) >= 3:
        same, error = 0, 0.0
        for start in range(0, len(a), BLOCK_ROWS):
            rows = torch.arange(start, min(start + BLOCK_ROWS, len(a)))
            similar = [x[rows] @ x.T for x in (a, b)]
            error += float((similar[0] - similar[1]).abs().sum())
            for table in similar:
                table[rows - start, rows] = -math.inf
            same += int((similar[0].argmax(-1) == similar[1].argmax(-1)).sum())
        agreement["neighbour_top1"] = same / len(a)
        agreement["similarity_error"] = error / (len(a) * (len(a) - 1))
    return agreement


def _unit_rows(x: Tensor, name: str) -> Tensor:
    """float64 on the CPU."""
    x = x.detach().to("cpu", torch.float64)
    length = x.norm(dim=-1, keepdim=True)
    if not bool(length.isfinite().all()) or not bool((length > 0).all()):
        raise NumericsError(f"the {name} embeddings hold NaN, infinity or a row of zeros: verify the model")
    return x / length
