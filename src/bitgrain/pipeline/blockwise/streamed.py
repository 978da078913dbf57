"""The model of a plan, run block by block from disk, and the threads that share the work."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from bitgrain.models.skeleton import build_skeleton
from bitgrain.models.stream import StreamedModel
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.load import experts_run_one_by_one
from bitgrain.pipeline.plan import Plan


@contextmanager
def streamed(plan: Plan, device: torch.device) -> Generator[tuple[StreamedModel, Pool]]:
    """The full-precision model, with experts that can be told apart; one thread feeds a GPU."""
    experts_run_one_by_one(plan.config)
    skeleton = build_skeleton(plan.config, plan.trust_remote_code)
    stream = StreamedModel(skeleton, plan.anatomy, plan.checkpoint.read, device=device)
    with Pool(1 if device.type == "cuda" else plan.workers) as pool:
        yield stream, pool
