"""Blocks of tiny models with their weights and calibration batches, as the calibrated job has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.models.stream import Call, StreamedModel, share_calls
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.pipeline.load import experts_run_one_by_one


@dataclass
class Block:
    """A block in front of calibration batches."""

    module: nn.Module
    inputs: list[Tensor]
    calls: list[Call]
    names: list[str]

    def stages(self) -> list[Stage]:
        return find_stages(self.module, self.names, self.inputs[0], self.calls[0])


def streamed(folder: Path) -> StreamedModel:
    config = load_config(resolve_model(folder))
    experts_run_one_by_one(config)
    skeleton, checkpoint = build_skeleton(config), open_checkpoint(folder)
    return StreamedModel(skeleton, read_anatomy(skeleton, checkpoint.entries), checkpoint.read)


def open_block(folder: Path, index: int = 0, batches: int = 3, tokens: int = 12) -> Block:
    """Block `index` of a checkpoint with `batches` batches of 2 windows."""
    stream = streamed(folder)
    vocabulary = stream.model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (2 * batches, tokens), generator=generator)
    captured = [stream.capture(part) for part in ids.split(2)]
    share_calls(captured)
    hidden = [batch.hidden for batch in captured]
    for before in range(index):
        stream.load_block(before)
        with torch.no_grad():
            hidden = [stream.run(before, h, c.calls[before]) for h, c in zip(hidden, captured, strict=True)]
        stream.free_block(before)
    weights = [weight for weight in stream.anatomy.weights if weight.block == index]
    prefix = stream.anatomy.block_names[index] + "."
    names = dict.fromkeys(
        weight.targets[0].removeprefix(prefix) for weight in weights if weight.role in ("linear", "expert")
    )
    return Block(stream.load_block(index), hidden, [batch.calls[index] for batch in captured], list(names))
