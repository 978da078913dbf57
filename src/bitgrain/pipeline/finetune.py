"""The job that trains LoRA adapters on a checkpoint whose weights stay in low bits, from a text to an adapter folder.

ADAPTER holds what peft reads (adapter_config.json, adapter_model.safetensors) and training.json. It appears only when
it is whole; killed, the same call goes on from the last saved state, and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.checkpoints.job_folder import JobFolder, check_new, partial_folder
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import ShardLayout, TensorSpec, plan_shards
from bitgrain.errors import ModelError, NumericsError, TextError
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.work import Work
from bitgrain.pipeline.load import load
from bitgrain.progress import Progress, make_progress
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.low_bit_linear import held_nbytes, low_bit_layers
from bitgrain.training.lora import ALL_LINEAR, attach_lora, lora_config, require_peft
from bitgrain.training.next_token import Each, TrainSettings, TrainState, next_token_loss, train_next_token

ADAPTER_FILE, CONFIG_FILE, RECORD_FILE = "adapter_model.safetensors", "adapter_config.json", "training.json"
_STATE = "state"
MOST_VALIDATION = 16
"""Windows at the end of the text that are not trained on: a twentieth of all, at most so many."""
_VERSIONS = ("bitgrain", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Finetuned:
    """What training led to.

    out          the adapter's folder
    losses       of each step, on its batch
    before, after  mean loss of the validation windows, which were not trained on
    trained      number of trained parameters; packed: of weights that are held in low bits
    base_nbytes  of the base model as it is held; dense_nbytes: as it would be dequantized
    """

    out: Path
    losses: tuple[float, ...]
    before: float
    after: float
    trained: int
    packed: int
    base_nbytes: int
    dense_nbytes: int


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    seqlen: int = 512,
    settings: TrainSettings | None = None,
    device: str = "auto",
    workers: int | None = None,
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Finetuned:
    """Train adapters on `model`, a folder that bitgrain wrote (or a plain one), with the text file `text`.

    rank, alpha, targets  see `training.lora.lora_config`
    seqlen                tokens in a window
    settings, changes     see `training.next_token.TrainSettings`: as a whole, or its fields by name (steps, rate, ...)
    workers               windows of a batch that are worked on at once on a CPU (None: as many as torch has threads);
                          the result is the same for any number
    Raises BitgrainError (peft is missing), TextError (a text shorter than a batch), SchemeError (settings, targets),
    NumericsError (a loss that is not finite: the last good state is kept beside `out`), OutputError, ResumeError (a
    half-done run with other settings or sources), ModelError, CheckpointError.
    """
    require_peft()
    out, chosen = Path(out), replace(settings or TrainSettings(), **changes)
    check_new(out, resumed=partial_folder(out).exists())
    source, where = resolve_model(model), resolve_device(device)
    content = read_text(text)
    base = load(source.path, device=str(where), trust_remote_code=trust_remote_code, low_bit=True)
    vocab = _check(base, seqlen)
    ids = token_windows(load_tokenizer(source.path, trust_remote_code), content, seqlen, vocab_size=vocab)
    kept = min(MOST_VALIDATION, math.ceil(len(ids) / 20))
    train, validation = ids[:-kept], ids[-kept:]
    if len(train) < chosen.batch:
        raise TextError(
            f"the text has {len(ids)} windows of {seqlen} tokens, {kept} of which are for validation: one batch needs "
            f"{chosen.batch}. Give a longer text, a smaller batch or shorter windows."
        )
    sizes = _sizes(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        adapted = attach_lora(base, lora_config(rank, alpha, targets, task_type="CAUSAL_LM"))
    identity = {
        "job": "finetune",
        "training": asdict(chosen),
        "lora": {"rank": rank, "alpha": alpha, "targets": targets if isinstance(targets, str) else list(targets)},
        "seqlen": seqlen,
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "device": where.type,
        "base": {"name": source.name, "revision": source.revision, **open_checkpoint(source.path).fingerprint()},
        "versions": {name: version(name) for name in _VERSIONS},
    }
    progress = progress or make_progress("quiet")
    with JobFolder.open(out, identity, [_layout(_adapter(adapted))], restart=restart) as job:
        if "adapter" not in job.done:
            with Pool(workers or torch.get_num_threads()) as pool:
                each = partial(pool.map, grad=True) if where.type == "cpu" else None
                record = _train(adapted, train, validation, chosen, each, job, progress)
            job.commit_unit("adapter", _adapter(adapted), record)
        record = job.done["adapter"]
        job.write_text(CONFIG_FILE, _adapter_config(adapted, source.path))
        told = {key: identity[key] for key in ("training", "lora", "seqlen", "tokens_sha256", "versions")}
        job.write_text(RECORD_FILE, json.dumps({**told, **record}, indent=2) + "\n")
        job.finish()
    return Finetuned(out, tuple(record["losses"]), record["before"], record["after"], record["trained"], *sizes)


def _train(
    model: Any,
    train: Tensor,
    validation: Tensor,
    settings: TrainSettings,
    each: Each | None,
    job: JobFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Train from the last saved state, if there is one; returns what training.json tells."""
    work = Work(job.work)
    start, before = None, None
    if work.has(_STATE):
        told = work.record(_STATE)
        start, before = TrainState(told["step"], work.tensors(_STATE), tuple(told["losses"])), told["before"]
    if before is None:
        before = validation_loss(model, validation, each)
    if not math.isfinite(before):
        raise NumericsError(f"the loss before the first step is {before}: the model is damaged, verify it")

    def save(state: TrainState) -> None:
        work.save(_STATE, state.tensors, {"step": state.step, "losses": state.losses, "before": before})

    def report(step: int, loss: float) -> None:
        progress.advance(1, f"loss {loss:.4f}")

    progress.start(settings.steps, "steps", "fine-tune", done=0 if start is None else start.step)
    try:
        losses = train_next_token(model, train, settings, each=each, start=start, save=save, report=report)
        after = validation_loss(model, validation, each)
        if not math.isfinite(after):
            raise NumericsError(f"the loss after the last step is {after}; lower the rate ({settings.rate:g})")
    except NumericsError as error:
        good = f"step {work.record(_STATE)['step']}" if work.has(_STATE) else "the start"
        raise NumericsError(
            f"{error}. The last good state, that of {good}, is kept in {partial_folder(job.out)}; other settings start "
            "over with --restart."
        ) from error
    finally:
        progress.finish()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"before": before, "after": after, "trained": trained, "losses": losses}


def validation_loss(model: nn.Module, windows: Tensor, each: Each | None = None) -> float:
    """Mean next-token loss of windows [n, tokens], in nats, one at a time; `each`: see `train_next_token`."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def one(window: Tensor) -> float:
        return float(next_token_loss(model, window.to(device)))

    return math.fsum((each or map)(one, windows.split(1))) / len(windows)


def _check(base: Any, seqlen: int) -> int | None:
    """The vocabulary's size. Raises ModelError for a model that predicts no next token, TextError for `seqlen`."""
    if not base.can_generate():
        raise ModelError(f"{type(base).__name__} predicts no next token: only causal language models are fine-tuned")
    config = base.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or seqlen
    if not 2 <= seqlen <= longest:
        raise TextError(f"windows of {seqlen} tokens: this model takes 2 to {longest}; change --seqlen")
    return getattr(config, "vocab_size", None)


def _sizes(base: nn.Module) -> tuple[int, int, int]:
    """Packed weights; bytes of the model as it is held, and as it would be dense."""
    packed, held = 0, held_nbytes(base)
    dense = held
    for _, layer in low_bit_layers(base):
        elements = layer.in_features * layer.out_features
        packed += elements
        dense += elements * layer.like.element_size() - layer.packed_nbytes
    return packed, held, dense


def _adapter(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(found.items())}


def _layout(tensors: dict[str, Tensor]) -> ShardLayout:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    (layout,) = plan_shards(specs, sum(spec.nbytes for spec in specs))
    return replace(layout, file=ADAPTER_FILE)


def _adapter_config(model: Any, base: Path) -> str:
    """peft's own would list sets in an order that changes from run to run."""
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": str(base)}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"
