"""LoRA on an NF4 base, AdamW with 8-bit states beside AdamW, FP8 training beside full precision.

    make bench-fine-tuning
    make bench-fine-tuning ARGS="--lora-steps 100 --steps 300"

LoRA: the reference Llama (trained on books) in NF4, adapters trained on children's stories; the merged model is loaded
by transformers, and quantized again. The rest: the small TinyStories model, all parameters trained on books, from the
same start on the same batches. Losses are on windows that were not trained on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import SHARED, machine_line, table, write_results

import bitgrain
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.pipeline.finetune import validation_loss
from bitgrain.progress import make_progress
from bitgrain.training import AdamW8bit, fp8_training_
from bitgrain.training.adamw8bit import state_nbytes
from bitgrain.training.lora import load_adapter
from bitgrain.training.next_token import TrainSettings, train_next_token

VALIDATION = 16
TAIL = 20
"""Steps at the end whose mean loss stands for a curve's."""


def lora(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantize, train adapters, merge, load, quantize again."""
    model, text = SHARED / "models" / "llama", SHARED / "text" / "tinystories.txt"
    base, adapter, merged, again = (folder / name for name in ("nf4", "adapter", "merged", "again"))
    bitgrain.quantize(model, base, "NF4")
    found = bitgrain.finetune(
        base, adapter, text=text, progress=make_progress("rich"), steps=arguments.lora_steps, batch=arguments.batch,
        seqlen=arguments.seqlen, rate=1e-3,
    )  # fmt: skip
    bitgrain.merge(base, adapter, merged)
    bitgrain.quantize(merged, again, "NF4")
    windows = token_windows(load_tokenizer(model), read_text(text), arguments.seqlen)[-VALIDATION:]
    adapted: Any = load_adapter(bitgrain.load(base, low_bit=True), adapter, trainable=True).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        error = (adapted(windows[:2]).logits - plain(windows[:2]).logits).abs().max().item()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    train_next_token(adapted, windows, TrainSettings(2, 2, 1e-2))
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    return {
        "loss_before": found.before,
        "loss_after": found.after,
        "full_precision_before": validation_loss(bitgrain.load(model), windows),
        "requantized": validation_loss(bitgrain.load(again), windows),
        "merged_logit_error": error,
        "only_adapters_change": bool(changed) and all("lora_" in name for name in changed),
        "trained": found.trained,
        "packed_weights": found.packed,
        "base_bytes": found.base_nbytes,
        "dense_bytes": found.dense_nbytes,
        "losses": found.losses,
    }


def train(arguments: argparse.Namespace, optimizer: str, history: int | None, windows: torch.Tensor) -> dict[str, Any]:
    """All parameters of the small model; `history`: in FP8."""
    model = bitgrain.load(SHARED / "models" / "tinystories-656k")
    if history is not None:
        fp8_training_(model, history=history)
    settings = TrainSettings(arguments.steps, arguments.batch, 1e-3, optimizer=optimizer)  # type: ignore[arg-type]
    losses = train_next_token(model.requires_grad_(True), windows[:-VALIDATION], settings)
    kinds = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}
    one = kinds[optimizer](model.parameters(), lr=0.0)  # a step that changes nothing, to count the states
    torch.autograd.backward([p.sum() for p in model.parameters()])
    one.step()
    tail = statistics.fmean(losses[-TAIL:])
    return {"loss": validation_loss(model, windows[-VALIDATION:]), "tail": tail, "bytes": state_nbytes(one)}


def report(data: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The Markdown page."""
    found, runs = data["lora"], data["runs"]
    rows = [
        ["validation loss, the full-precision model", f"{found['full_precision_before']:.4f}"],
        ["validation loss, NF4, before", f"{found['loss_before']:.4f}"],
        [f"validation loss, NF4 + adapters, after {arguments.lora_steps} steps", f"{found['loss_after']:.4f}"],
        ["the same, merged and quantized to NF4 again", f"{found['requantized']:.4f}"],
        ["largest difference of a logit, merged and adapted", f"{found['merged_logit_error']:.1e}"],
        ["only adapters change, bit for bit", "yes" if found["only_adapters_change"] else "NO"],
        ["trained parameters", f"{found['trained']}"],
        ["base in memory, MB (dense)", f"{found['base_bytes'] / 1e6:.1f} ({found['dense_bytes'] / 1e6:.1f})"],
    ]
    start = runs["adamw"]
    lines = [
        [
            name,
            f"{run['loss']:.4f}",
            f"{100 * (run['loss'] / start['loss'] - 1):+.2f} %",
            f"{run['tail']:.4f}",
            f"{run['bytes'] / 1e6:.2f}",
            f"{run['bytes'] / start['bytes']:.3f}",
        ]
        for name, run in runs.items()
    ]
    header = ["training", "validation loss", "of AdamW's", f"training loss, last {TAIL}", "states, MB", "of AdamW's"]
    return (
        f"# Fine-tuning\n\n{machine_line()}. Windows of {arguments.seqlen} tokens, {arguments.batch} in a step.\n\n"
        "## LoRA on NF4\n\n"
        "The 6.8 M Llama trained on books; adapters of rank 16 on all linear layers, trained on children's stories.\n\n"
        + table(["", "figure"], rows)
        + "\n## Optimizer and number formats\n\n"
        f"The 656 k TinyStories model, all parameters, {arguments.steps} steps on books; validation loss before the "
        f"first step {data['start']:.4f}.\n\n" + table(header, lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--name", default="fine-tuning", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    small = SHARED / "models" / "tinystories-656k"
    windows = token_windows(load_tokenizer(small), read_text(SHARED / "text" / "calibration.txt"), arguments.seqlen)
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = {"lora": lora(arguments, Path(folder))}
    data["start"] = validation_loss(bitgrain.load(small), windows[-VALIDATION:])
    data["runs"] = {
        "adamw": train(arguments, "adamw", None, windows),
        "adamw8bit": train(arguments, "adamw8bit", None, windows),
        "adamw, fp8 (current scaling)": train(arguments, "adamw", 0, windows),
        "adamw, fp8 (delayed over 16)": train(arguments, "adamw", 16, windows),
        "adamw8bit, fp8 (current scaling)": train(arguments, "adamw8bit", 0, windows),
    }
    write_results(arguments.name, data, report(data, arguments))


if __name__ == "__main__":
    main()
