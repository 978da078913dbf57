"""What becomes of experts that calibration hardly reached: KL divergence under each policy.

    make bench-experts
    make bench-experts ARGS="--schemes W4A16 --tokens 512,8192"

There is no small trained mixture of experts to be had, so one is made: the MLPs of the reference model
tinystories-656k become 8 experts of 128 channels each (two for a token), whose routers begin by telling stories from
other prose, and everything is trained on both. Calibrated on prose alone, the experts of stories see next to nothing;
the figures are of both kinds of text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, SHARED, machine_line, table, write_results

import bitgrain
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.evaluation.language import evaluate_model, record_base
from bitgrain.recipes import load_recipe

SOURCE = SHARED / "models" / "tinystories-656k"
PROSE, STORIES, HELDOUT = (SHARED / "text" / name for name in ("calibration.txt", "tinystories.txt", "heldout.txt"))
EXPERTS, CHANNELS, LENGTH, BATCH = 8, 128, 256, 4
POLICIES: dict[str, dict[str, Any]] = {
    "what they saw; of none, nearest": {"policy": "nearest", "tokens": 1},
    "`nearest` below 4 tokens an input": {"policy": "nearest", "tokens": 4 * CHANNELS},
    "`nearest`, all of them": {"policy": "nearest", "tokens": 10**9},
    "`borrow` below 1/2": {"policy": "borrow", "tokens": CHANNELS // 2},
    "`borrow` below 2": {"policy": "borrow", "tokens": 2 * CHANNELS},
    "`borrow` below 4": {"policy": "borrow", "tokens": 4 * CHANNELS},
    "`borrow` below 8": {"policy": "borrow", "tokens": 8 * CHANNELS},
    "`all`": {"policy": "all"},
}


def upcycled() -> MixtralForCausalLM:
    """Experts of random channels of the MLPs, twice as strong; routers are zero."""
    dense: Any = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in names},
        intermediate_size=CHANNELS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        experts_implementation="eager",
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = MixtralForCausalLM(config)
    own, theirs = model.state_dict(), dense.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name in own.keys() & theirs.keys():
        own[name].copy_(theirs[name])
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        own[f"{mlp}gate.weight"].zero_()
        for expert in range(EXPERTS):
            some = torch.randperm(dense.config.intermediate_size, generator=generator)[:CHANNELS]
            both = [theirs[f"{mlp}{part}_proj.weight"][some] for part in ("gate", "up")]
            own[f"{mlp}experts.gate_up_proj"][expert].copy_(torch.cat(both))
            own[f"{mlp}experts.down_proj"][expert].copy_(2 * theirs[f"{mlp}down_proj.weight"][:, some])
    return model


def train(model: Any, texts: list[Tensor], steps: int) -> None:
    """On both kinds of text, half of the routers' rows along the difference of their hidden states."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        starts = [(ids, int(torch.randint(0, len(ids) - LENGTH, (), generator=generator))) for ids in texts * BATCH]
        return torch.stack([ids[start : start + LENGTH] for ids, start in starts])

    with torch.no_grad():
        entering: dict[int, Tensor] = {}
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda _, args, i=i: entering.update({i: args[0]}))
        model(input_ids=batch())
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(EXPERTS // 2)[:, None]
        for i, layer in enumerate(model.model.layers):
            mean = [entering[i][kind :: len(texts)].flatten(0, 1).mean(0) for kind in range(len(texts))]
            along = torch.nn.functional.normalize(mean[1] - mean[0], dim=0)
            noise = torch.randn(EXPERTS, len(along), generator=generator)
            layer.mlp.gate.weight.copy_(2.0 * sign * along / (entering[i] @ along).std() + 0.05 * noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / steps)
        ids = batch()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def build(folder: Path, steps: int) -> None:
    """The trained model in `folder`; the last tenth of the stories is kept apart."""
    tokenizer = load_tokenizer(SOURCE)
    stories, prose = STORIES.read_text(encoding="utf-8"), PROSE.read_text(encoding="utf-8")
    texts = [torch.tensor(tokenizer(text).input_ids) for text in (stories[: len(stories) * 9 // 10], prose)]
    model = upcycled()
    train(model, texts, steps)
    model.eval().save_pretrained(folder)
    for path in SOURCE.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())


def measure(folder: Path, scheme: str, tokens: int, windows: int) -> list[dict[str, Any]]:
    """One row for each policy. Attention is kept, so that the experts decide."""
    seqlen = min(512, tokens)
    stories = STORIES.read_text(encoding="utf-8")
    held = {"prose": read_text(HELDOUT), "stories": stories[len(stories) * 9 // 10 :]}
    base, where = bitgrain.load(folder, device="cpu"), torch.device("cpu")
    ids = {kind: token_windows(load_tokenizer(folder), text, LENGTH, windows) for kind, text in held.items()}
    against = {kind: record_base(base, one, device=where, batch_size=4) for kind, one in ids.items()}
    rows: list[dict[str, Any]] = []
    for name, experts in POLICIES.items():
        recipe = load_recipe(
            *("fast",),
            scheme=scheme,
            experts=experts,
            calibration={"text": str(PROSE), "windows": tokens // seqlen, "seqlen": seqlen},
            rules=[{"match": "re:.*self_attn.*", "keep": True}],
        )
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = bitgrain.quantize(folder, Path(scratch) / "out", recipe=recipe, device="cpu")
            model = bitgrain.load(made.out, device="cpu", execution="dequantize")
            kl = {
                kind: evaluate_model(model, ids[kind], base=against[kind], device=where, batch_size=4).kl
                for kind in ids
            }
        reached = sorted(n for told in made.manifest["experts"].values() for n in told["tokens"])
        rows.append({"scheme": scheme, "tokens": tokens, "experts": name, "kl": kl, "reached": reached})
        print(scheme, tokens, name, kl, flush=True)
    return rows


def report(rows: list[dict[str, Any]], windows: int) -> str:
    """The Markdown page."""
    columns = list(dict.fromkeys((row["scheme"], row["tokens"]) for row in rows))
    kl = {(row["experts"], row["scheme"], row["tokens"]): row["kl"] for row in rows}
    header = ["experts", *(f"{scheme}, {tokens} tokens" for scheme, tokens in columns)]
    lines = [
        [name, *(f"{kl[name, *one]['prose']:.4f} / {kl[name, *one]['stories']:.4f}" for one in columns)]
        for name in POLICIES
    ]
    reached = {row["tokens"]: row["reached"] for row in rows}
    few = "; ".join(f"of {tokens}: {', '.join(map(str, counts[:6]))} ..." for tokens, counts in reached.items())
    return (
        "# Experts that calibration hardly reached\n\n"
        f"{machine_line()}. A mixture of {EXPERTS} experts made of tinystories-656k and trained on stories and prose. "
        "GPTQ (recipe `fast`) on so many tokens of prose, attention kept. KL divergence in nats a token on "
        f"{windows} windows of {LENGTH} held-out tokens of prose / of stories. Tokens that reached the rarest experts, "
        f"{few}\n\n" + table(header, lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="W4A16,W3A16", help="with commas between them")
    parser.add_argument("--tokens", default="512,8192", help="of calibration, with commas between them")
    parser.add_argument("--windows", type=int, default=24, help="of held-out text, of each kind")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "experts", help="made where it is absent")
    parser.add_argument("--name", default="experts", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if not arguments.model.exists():
        build(arguments.model, arguments.steps)
    rows: list[dict[str, Any]] = []
    for scheme in arguments.schemes.split(","):
        for tokens in map(int, arguments.tokens.split(",")):
            rows += measure(arguments.model, scheme, tokens, arguments.windows)
    write_results(arguments.name, {"rows": rows}, report(rows, arguments.windows))


if __name__ == "__main__":
    main()
