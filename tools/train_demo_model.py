"""Trains the model that bitgrain ships: a small Llama that has read Python's standard library.

    python tools/train_demo_model.py                  # about a quarter of an hour on two CPU cores
    python tools/train_demo_model.py --minutes 60     # better, if you have the time
    python tools/train_demo_model.py --steps 3000     # a fixed length instead of a time: repeatable on one machine

It learns from `builtin_text("calibration")`, is measured on `builtin_text("evaluation")`, and is written to
src/bitgrain/demo/model with a card of the measured numbers. Every few minutes, and when interrupted, the model so
far is written, so that a run cut short still leaves a usable one.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitgrain.calibration.corpus import HELD_OUT_MODULES, builtin_modules, builtin_text

CONTEXT = 512
SPECIAL = ("<s>", "</s>", "<pad>")
# Every width is a multiple of 128, so that all group sizes and all 128 x 128 blocks divide; the hidden width is two
# groups of 128 wide, so that per-group and per-channel differ in every layer.
SHAPE: dict[str, Any] = {
    "vocab_size": 1920,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
OUT = Path(__file__).resolve().parents[1] / "src" / "bitgrain" / "demo" / "model"


@dataclass
class Measured:
    """What the card states; losses in nats per token."""

    steps: int
    tokens: int
    epochs: float
    minutes: float
    loss: float
    unigram_loss: float
    tokens_scored: int
    bytes_per_token: float
    sample: str


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with nothing that loses a byte: no normalizer, no prefix space, the full byte alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SHAPE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # what is added to the residual stream starts smaller (GPT-2's initialization)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def batches(documents: list[Tensor], size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [size, CONTEXT + 1] of token ids: per epoch the documents in a new order, windows shuffled."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, CONTEXT + 1, dtype=torch.long)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        stream = stream[int(torch.randint(CONTEXT, (), generator=generator)) :]
        windows = stream.unfold(0, CONTEXT + 1, CONTEXT)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        windows = torch.cat([left, windows])
        whole = len(windows) // size * size
        yield from windows[:whole].split(size)
        left = windows[whole:]


def optimizer_for(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor, limit: int | None = None) -> tuple[float, int]:
    """Mean nats per token over windows of CONTEXT tokens that do not overlap, and how many tokens were scored."""
    model.eval()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    if limit is not None:  # a spread over the whole text
        windows = windows[:: max(1, len(windows) // limit)][:limit]
    total, count = 0.0, 0
    for chunk in windows.split(16):
        chunk = chunk.to(model.device)
        logits = model(input_ids=chunk).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
        count += chunk[:, 1:].numel()
    model.train()
    return total / count, count


def unigram_loss(train_ids: Tensor, ids: Tensor) -> float:
    """What a model would reach that knows only how often each token occurs (add-one smoothed)."""
    counts = torch.bincount(train_ids, minlength=SHAPE["vocab_size"]).double() + 1
    return -(counts / counts.sum()).log()[ids].mean().item()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, card: str) -> None:
    """Writes everything beside `out`, then swaps the folders, so that `out` is never half a model."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(tensors)
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    copy.save_pretrained(partial)
    bos, eos, pad = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def card_text(parameters: int, measured: Measured, arguments: argparse.Namespace) -> str:
    modules = ", ".join(f"`{name}`" for name in HELD_OUT_MODULES)
    python = platform.python_version()
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [toy, python]
---

# bitgrain's demo model

A Llama of {parameters / 1e6:.2f} million parameters that has read the sources of Python's standard library, and
nothing else. It is a toy: it exists so that a quantizer can be tried on trained weights, anywhere, offline, in
seconds.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {SHAPE["num_hidden_layers"]} layers, hidden {SHAPE["hidden_size"]}, \
MLP {SHAPE["intermediate_size"]}, {SHAPE["num_attention_heads"]} query and {SHAPE["num_key_value_heads"]} key/value \
heads of {SHAPE["head_dim"]}, tied embeddings |
| context | {CONTEXT} tokens |
| weights | bfloat16 |
| tokenizer | byte-level BPE, {SHAPE["vocab_size"]} tokens with `<s>`, `</s>`, `<pad>`; round-trips any text; \
{measured.bytes_per_token:.2f} bytes per token on the held-out text |

## Training

Data: the standard library of CPython {python} without tests, IDLE, generated tables and the held-out modules.
{measured.steps} steps of {arguments.batch} windows of {CONTEXT} tokens: {measured.tokens / 1e6:.2f} million tokens,
{measured.epochs:.1f} passes over the data. AdamW, peak learning rate {arguments.rate:g}, warmup then cosine,
weight decay 0.1, no dropout, fp32 compute, seed {arguments.seed}, {measured.minutes:.1f} minutes on
{arguments.device}. To train it anew: `python tools/train_demo_model.py`.

## Measured

On the {len(HELD_OUT_MODULES)} held-out modules ({measured.tokens_scored} tokens, in windows of {CONTEXT} without
overlap, weights in bfloat16):

| | nats per token | perplexity | bits per byte |
|---|---|---|---|
| this model | {measured.loss:.3f} | {math.exp(measured.loss):.2f} | \
{measured.loss / math.log(2) / measured.bytes_per_token:.3f} |
| token frequencies alone | {measured.unigram_loss:.3f} | {math.exp(measured.unigram_loss):.1f} | \
{measured.unigram_loss / math.log(2) / measured.bytes_per_token:.3f} |

Perplexity is per token of this tokenizer, and is not comparable with other tokenizers' models. Another Python version
has slightly other sources, hence slightly other numbers.

Held out: {modules}.

## What it can and cannot do

It writes text that looks like Python at a glance: indentation, keywords, `self.`, docstrings. It does not know what
the code does, invents names, loses the thread within a few lines, and knows no language but Python and the English
of its comments. Do not use it to write code.

It is not trained to convergence: the length of the run was set beforehand, and more passes over the data would lower
the loss. So small a model also loses little to quantization. Coarser schemes do lose more, but the differences can be
fractions of a percent, and their sizes say nothing about a large model.

A greedy continuation of `class Counter(dict):`:

```python
{measured.sample}
```
"""


def measure(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    train_ids: Tensor,
    held_out: str,
    steps: int,
    seen: int,
    minutes: float,
) -> Measured:
    """The numbers of the card, from the weights as they are stored (bfloat16)."""
    ids = torch.tensor(tokenizer.encode(held_out).ids)
    stored = LlamaForCausalLM(model.config).eval()
    stored.load_state_dict({k: v.detach().to("cpu", torch.bfloat16).float() for k, v in model.state_dict().items()})
    loss, scored = held_out_loss(stored, ids)
    prompt = "class Counter(dict):\n"
    start = torch.tensor([tokenizer.encode(prompt).ids])
    for _ in range(96):
        with torch.inference_mode():
            start = torch.cat([start, stored(input_ids=start).logits[:, -1:].argmax(-1)], dim=1)
    sample = tokenizer.decode(start[0].tolist()).rstrip()
    return Measured(
        steps=steps,
        tokens=seen,
        epochs=seen / len(train_ids),
        minutes=minutes,
        loss=loss,
        unigram_loss=unigram_loss(train_ids, ids),
        tokens_scored=scored,
        bytes_per_token=len(held_out.encode()) / len(ids),
        sample="\n".join(line.rstrip() for line in sample.replace("```", "'''").splitlines()),
    )


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    texts = [source for _, source in builtin_modules("calibration") if source.strip()]
    held_out = builtin_text("evaluation")
    tokenizer = train_tokenizer(texts)
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    documents = [torch.tensor([bos, *encoding.ids, eos]) for encoding in tokenizer.encode_batch(texts)]
    train_ids = torch.cat(documents)
    held_out_ids = torch.tensor(tokenizer.encode(held_out).ids)
    model = new_model(tokenizer).to(device)
    parameters = model.num_parameters()
    print(
        f"{parameters:,} parameters; {len(train_ids):,} tokens to learn from, {len(held_out_ids):,} held out; "
        f"unigram {unigram_loss(train_ids, held_out_ids):.3f} nats",
        flush=True,
    )

    def loss_of(batch: Tensor) -> Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    optimizer = optimizer_for(model, arguments.rate)
    source = batches(documents, arguments.batch, arguments.seed)
    step, seen, smooth = 0, 0, 0.0
    started = reported = saved = time.monotonic()
    model.train()

    def finished() -> Measured:
        return measure(model, tokenizer, train_ids, held_out, step, seen, (time.monotonic() - started) / 60)

    try:
        while True:
            now = time.monotonic()
            done = step / arguments.steps if arguments.steps else (now - started) / (arguments.minutes * 60)
            if done >= 1:
                break
            rate = arguments.rate * min(1.0, (step + 1) / arguments.warmup)
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(source).to(device)
            loss = step_loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0 and not arguments.steps:
                started = reported = saved = time.monotonic()  # compiling does not count
            step, seen = step + 1, seen + batch.shape[0] * CONTEXT
            value = loss.item()
            weight = max(0.02, 1 / step)  # a plain mean at first, then one that forgets
            smooth += weight * (value - smooth)
            now = time.monotonic()
            if now - reported > 20:
                reported = now
                left = (now - started) * (1 - done) / max(done, 1e-9)
                print(
                    f"step {step:6}  {seen / 1e6:6.2f} M tokens  {seen / (now - started):6.0f} tok/s  "
                    f"lr {rate:.2e}  loss {smooth:.3f}  ETA {left / 60:5.1f} min",
                    flush=True,
                )
            if now - saved > arguments.save_every * 60:
                saved = now
                quick, _ = held_out_loss(model, held_out_ids, limit=32)
                save(model, tokenizer, arguments.out, f"An unfinished run: step {step}, held-out loss {quick:.3f}.\n")
                print(f"saved; held-out loss {quick:.3f} (perplexity {math.exp(quick):.2f})", flush=True)
    except KeyboardInterrupt:
        print("interrupted: finishing with the weights so far", flush=True)
    measured = finished()
    save(model, tokenizer, arguments.out, card_text(parameters, measured, arguments))
    print(
        f"{step} steps, {seen:,} tokens; held-out loss {measured.loss:.4f}, perplexity {math.exp(measured.loss):.3f} "
        f"over {measured.tokens_scored:,} tokens; unigram perplexity {math.exp(measured.unigram_loss):.1f}; "
        f"written to {arguments.out}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains bitgrain's demo model on Python's standard library.")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long to train (default 15)")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write (replaced when it exists)")
    parser.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {CONTEXT} tokens in a step (default 4)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warmup (default 100)")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints (default 4)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler on CPU)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
