"""What quantization cost a language model: perplexity, KL divergence from the base, top-1 agreement, speed.

The protocol, so that numbers can be compared with those of others:

- windows of L tokens that do not overlap, each from an empty context;
- perplexity = exp(mean negative log-likelihood) over the L - 1 tokens of each window that have a past;
- KL(base || quantized), its 99th percentile (linear interpolation), and top-1 agreement over all L positions of
  each window, in nats per token;
- log-softmax in float32 whatever the model's dtype, one float per token kept, and sums that are exact in float64
  (so no result depends on the batch size through the order of summation).

Memory is bounded: logits of one batch stay below `LOGIT_BYTES` for each model, and the comparison goes through
them in pieces of `PIECE_BYTES`.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import LongTensor, Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from bitgrain.errors import ModelError, NumericsError, TextError
from bitgrain.progress import Progress, QuietProgress
from bitgrain.runtime.kv_cache import CacheScheme, KVCache, past_argument

__all__ = ["BaseReference", "Evaluation", "evaluate_model", "evaluation_mode", "locate", "record_base"]

LOGIT_BYTES = 500_000_000
PIECE_BYTES = 64_000_000
KEEP_BYTES = 1_000_000_000
LOG_FLOAT_MAX = 709.78

Role = Literal["base", "quantized"]


@dataclass(frozen=True)
class Evaluation:
    """What one model measured; the four figures that need a base are None without one.

    `kl` and `kl_p99` in nats per token; `top1` in [0, 1]; `tokens_per_s` of the quantized model's forward pass
    only (the first batch, which warms up, is left out where there are several); `tokens` = windows x seqlen.
    """

    perplexity: float
    base_perplexity: float | None
    kl: float | None
    kl_p99: float | None
    top1: float | None
    tokens_per_s: float
    tokens: int
    windows: int
    seqlen: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields by name. A perplexity or KL beyond float64 is `inf`."""
        return asdict(self)


@dataclass(frozen=True)
class BaseReference:
    """A base model on fixed windows, to compare several quantized models with. Made by `record_base`.

    `logits`: one tensor [L, V] a window on the CPU in the model's own dtype, as exact as the model; or None if
    they are too many, and then the model is run again each time.
    """

    model: nn.Module = field(repr=False)
    windows: LongTensor = field(repr=False)  # int64 [n, L]
    logits: tuple[Tensor, ...] | None = field(repr=False)
    perplexity: float


def record_base(
    model: nn.Module,
    windows: LongTensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 4,
    keep_bytes: int = KEEP_BYTES,
    progress: Progress | None = None,
) -> BaseReference:
    """Run the base once over windows int64 [n, L], and keep its logits if they fit into `keep_bytes`.

    Nothing is rounded: KL divergences of good 8-bit models are near 1e-5 nats, which half-precision logits would
    drown. For the same reason it is all or nothing: what does not fit is computed again when it is needed.

    Raises ModelError, NumericsError, TextError as `evaluate_model` does.
    """
    kept: list[Tensor] = []
    fits = True
    nll: list[Tensor] = []
    with _reporting(progress, windows, "base model"), evaluation_mode(model):
        runner = _Runner(model, "base", windows, device)
        for first, ids in runner.batches(batch_size):
            logits = runner.forward(ids)
            fits = fits and logits[0].numel() * logits.element_size() * len(windows) <= keep_bytes
            if fits:
                kept += [window.to("cpu", copy=True) for window in logits]
            for window, part in _pieces(ids, logits):
                log_p = runner.log_softmax(part.logits, first + window, part.start)
                nll.append(_nll(log_p, part.targets))
            _advance(progress, ids)
    return BaseReference(model, windows.cpu().clone(), tuple(kept) if fits else None, _perplexity(nll))  # type: ignore[arg-type]


def evaluate_model(
    model: nn.Module,
    windows: LongTensor,
    *,
    base: nn.Module | BaseReference | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 4,
    kv_cache: CacheScheme | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal language model on windows int64 [n, L], on its own or against a base.

    Models are moved to `device` if it is given and stay there; None uses each where it is. `batch_size` is an
    upper bound: it is lowered until the logits of a batch stay below `LOGIT_BYTES`. kv_cache: through which the model
    (not the base) sees the past, as it would be token by token: in pieces of the tokens that are rounded together.

    Raises ModelError: not a causal language model, or the two have different vocabularies. NumericsError: logits
    with NaN or infinity (names the model and the window). TextError: windows that the model cannot read, or that
    are not those of the reference.
    """
    reference = base if isinstance(base, BaseReference) else None
    base_model = reference.model if reference is not None else base
    if reference is not None and not torch.equal(reference.windows, windows.cpu()):
        raise TextError("the base was recorded on other windows: record it again on the windows to be measured")
    assert not isinstance(base_model, BaseReference)

    nll: list[Tensor] = []
    base_nll: list[Tensor] = []
    kl: list[Tensor] = []
    agree = 0
    rerun = base_model is not None and (reference is None or reference.logits is None)
    with _reporting(progress, windows, "evaluate"), evaluation_mode(model), evaluation_mode(base_model):
        runner = _Runner(model, "quantized" if base is not None else "measured", windows, device, kv_cache=kv_cache)
        base_runner = None if base_model is None else _Runner(base_model, "base", windows, device, load=rerun)
        if base_runner is not None:
            _check_same_vocabulary(base_runner.vocab_size, runner.vocab_size)
        for first, ids in runner.batches(batch_size):
            logits = runner.forward(ids)
            others: Any = None
            if base_runner is not None:
                kept = None if reference is None else reference.logits
                others = base_runner.forward(ids) if kept is None else kept[first : first + len(ids)]
                _check_same_vocabulary(others[0].shape[-1], logits.shape[-1])
            for window, part in _pieces(ids, logits):
                log_q = runner.log_softmax(part.logits, first + window, part.start)
                nll.append(_nll(log_q, part.targets))
                if base_runner is not None:
                    other = others[window][part.start : part.start + len(log_q)].to(log_q.device)
                    log_p = base_runner.log_softmax(other, first + window, part.start)
                    base_nll.append(_nll(log_p, part.targets))
                    kl.append(_divergence(log_p, log_q))
                    agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            _advance(progress, ids)
    tokens = windows.numel()
    compared = base is not None
    return Evaluation(
        perplexity=_perplexity(nll),
        base_perplexity=_perplexity(base_nll) if compared else None,
        kl=math.fsum(_numbers(kl)) / tokens if compared else None,
        kl_p99=_percentile_99(_numbers(kl)) if compared else None,
        top1=agree / tokens if compared else None,
        tokens_per_s=runner.tokens_per_s,
        tokens=tokens,
        windows=len(windows),
        seqlen=windows.shape[1],
    )


class _Runner:
    """One model in use: where it is, what it may be given, how long its forward passes took."""

    def __init__(
        self,
        model: nn.Module,
        role: str,
        windows: Tensor,
        device: torch.device | str | None,
        load: bool = True,
        kv_cache: CacheScheme | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.name = f"the {role} model"
        self.windows = windows
        self.vocab_size = _count_ids(model)
        self.check()
        if device is not None and load:
            model.to(device)
        self.device = torch.device(device) if device is not None else locate(model)
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        self._timings: list[tuple[int, float]] = []

    def check(self) -> None:
        config: Any = getattr(self.model, "config", None)
        _check_causal(self.model, config, self.name)
        if self.kv_cache is not None and not hasattr(config, "get_text_config"):
            raise ModelError(f"{self.name} ({type(self.model).__name__}) is not of transformers: it has no KV cache")
        windows = self.windows
        if windows.ndim != 2 or windows.dtype != torch.int64 or len(windows) < 1 or windows.shape[1] < 2:
            raise TextError(
                f"windows must be int64 [n, L] with n >= 1 and L >= 2, not {windows.dtype} {list(windows.shape)}"
            )
        largest, smallest = int(windows.max()), int(windows.min())
        if smallest < 0 or (self.vocab_size is not None and largest >= self.vocab_size):
            raise TextError(
                f"the windows hold token ids {smallest} to {largest} and {self.name} has {self.vocab_size} ids: use "
                "the tokenizer that came with the model"
            )
        longest = getattr(_text_config(config), "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < windows.shape[1]:
            raise TextError(
                f"windows of {windows.shape[1]} tokens are longer than the {longest} positions of {self.name}: make "
                "them shorter"
            )

    def batches(self, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first window, ids [b, L] on the device)."""
        if self.vocab_size is None:
            size = 1
        else:
            size = max(1, min(batch_size, LOGIT_BYTES // (4 * self.windows.shape[1] * self.vocab_size)))
        for first in range(0, len(self.windows), size):
            yield first, self.windows[first : first + size].to(self.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [b, L, V] of ids [b, L], as the model gives them."""
        ids = ids.to(self.device)
        self._wait()
        began = time.perf_counter()
        if self.kv_cache is None:
            output = self.model(input_ids=ids, **self._options)
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        else:
            logits = self._through_cache(ids, self.kv_cache)
        self._wait()
        self._timings.append((ids.numel(), time.perf_counter() - began))
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) gives no logits for each token, so it has no perplexity: "
                "load a causal language model, or measure an encoder by its embeddings (evaluate.embeddings)"
            )
        return logits

    def _through_cache(self, ids: Tensor, scheme: CacheScheme) -> Tensor | None:
        at_once = scheme.step == 1 and scheme.recent == 0
        config: Any = getattr(self.model, "config", None)
        cache, found = KVCache(scheme, config), list[Tensor]()
        past: dict[str, Any] = {past_argument(self.model): cache}
        for part in ids.split(ids.shape[1] if at_once else scheme.step, dim=1):
            output = self.model(input_ids=part, use_cache=True, **past)
            found.append(output.logits)
        if cache.get_seq_length() != ids.shape[1]:
            raise ModelError(f"{self.name} ({type(self.model).__name__}) does not use the cache that it is given")
        return torch.cat(found, dim=1)

    def log_softmax(self, logits: Tensor, window: int, start: int) -> Tensor:
        """float32 [positions, V].

        Raises NumericsError: a row with NaN, with +inf, or with nothing but -inf; each makes its whole row NaN.
        """
        log_p = torch.log_softmax(logits.float(), dim=-1)
        bad = log_p[:, 0].isnan().nonzero()
        if len(bad):
            raise NumericsError(
                f"{self.name} gives NaN or infinite logits in window {window} at position {start + int(bad[0])}: if it "
                "runs in float16, load it in bfloat16 or float32; otherwise verify the checkpoint"
            )
        return log_p

    @property
    def tokens_per_s(self) -> float:
        timed = self._timings[1:] or self._timings
        return sum(count for count, _ in timed) / max(sum(seconds for _, seconds in timed), 1e-9)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class _Piece:
    """Positions `start`... of one window."""

    start: int
    logits: Tensor  # [positions, V]
    targets: Tensor  # [positions], or one fewer at the end of the window: the last position has no next token


def _pieces(ids: Tensor, logits: Tensor) -> Iterator[tuple[int, _Piece]]:
    """(window in the batch, piece): a few positions of one window at a time, in order."""
    length, vocab = logits.shape[1:]
    rows = max(1, PIECE_BYTES // (4 * vocab))
    for window in range(len(logits)):
        targets = ids[window, 1:].to(logits.device)
        for start in range(0, length, rows):
            end = min(start + rows, length)
            yield window, _Piece(start, logits[window, start:end], targets[start:end])


def _nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """float32 [targets] on the CPU."""
    return -log_p[: len(targets)].gather(-1, targets[:, None])[:, 0].cpu()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, float64 on the CPU; 0 log 0 = 0, and infinity where q excludes what p allows."""
    p = log_p.exp()
    terms = (log_p - log_q).masked_fill_(p == 0, 0.0).mul_(p)
    return terms.sum(dim=-1, dtype=torch.float64).cpu()


def _numbers(parts: list[Tensor]) -> list[float]:
    return torch.cat(parts).tolist()


def _percentile_99(values: list[float]) -> float:
    with np.errstate(invalid="ignore"):  # interpolation between infinities
        value = float(np.quantile(values, 0.99))
    return math.inf if math.isnan(value) else value


def _perplexity(nll: list[Tensor]) -> float:
    numbers = _numbers(nll)
    mean = math.fsum(numbers) / len(numbers)
    return math.exp(mean) if mean < LOG_FLOAT_MAX else math.inf


def _text_config(config: Any) -> Any:
    """The language part of the configuration, if it has several parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _count_ids(model: nn.Module) -> int | None:
    return cast("int | None", getattr(_text_config(getattr(model, "config", None)), "vocab_size", None))


def _check_causal(model: nn.Module, config: Any, name: str) -> None:
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    # A family that has masked language models is made of encoders, unless the configuration says otherwise. The
    # class is no guide: BertLMHeadModel looks at both sides too, without is_decoder.
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder_decoder or masked or getattr(config, "is_causal", True) is False:
        raise ModelError(
            f"{name} ({type(model).__name__}) is not a causal language model, so it has no perplexity: measure it by "
            "its embeddings instead (evaluate.embeddings)"
        )


def _check_same_vocabulary(base: int | None, quantized: int | None) -> None:
    if base is not None and quantized is not None and base != quantized:
        raise ModelError(
            f"the base model has {base} token ids and the quantized model {quantized}: compare models that share "
            "a vocabulary"
        )


def locate(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first weight that is in memory."""
    weights = chain(model.parameters(), model.buffers())
    return next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module | None) -> Generator[None]:
    """No dropout and no gradients; each module's mode is put back afterwards."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _reporting(progress: Progress | None, windows: Tensor, title: str) -> Generator[None]:
    progress = progress or QuietProgress()
    progress.start(windows.numel(), "tokens", title)
    try:
        yield
    finally:
        progress.finish()


def _advance(progress: Progress | None, ids: Tensor) -> None:
    if progress is not None:
        progress.advance(ids.numel())
