"""A small job whose content is known, to be killed: each function is the body of a process."""

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.shards import TensorSpec, plan_shards

# Every call by which the job changes the disk.
DISK_CALLS = [
    "fsync", "ftruncate", "mkdir", "open", "posix_fallocate", "pwrite", "rename", "replace", "rmdir", "unlink",
]  # fmt: skip


def tensors_of(unit: int) -> dict[str, torch.Tensor]:
    """Deterministic: an odd number of int8 codes beside bf16 scales."""
    generator = torch.Generator().manual_seed(unit)
    codes = torch.randint(-128, 128, (unit * 37 + 5,), dtype=torch.int8, generator=generator)
    return {f"unit.{unit}.codes": codes, f"unit.{unit}.scale": torch.randn(3, generator=generator).to(torch.bfloat16)}


def run_job(out: Path, units: int, sleep: random.Random | None = None) -> None:
    """What a caller does: skip the units that are done, write the small files in every run, finish."""
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for unit in range(units)
        for name, tensor in tensors_of(unit).items()
    ]
    layouts = plan_shards(specs, 25 * units)  # several shards
    with JobFolder.open(out, {"units": units}, layouts) as job:
        for unit in range(units):
            if f"unit {unit}" in job.done:
                assert job.done[f"unit {unit}"] == {"sqnr": unit / 7}
                continue
            if sleep is not None:
                time.sleep(sleep.random() * 0.01)
            job.commit_unit(f"unit {unit}", tensors_of(unit), {"sqnr": unit / 7})
        assert job.redone == ()
        job.write_text("config.json", f'{{"units": {units}}}\n')
        job.finish()


def slow_job(out: Path, units: int, seed: int, pipe: Connection) -> None:
    pipe.send(None)
    run_job(out, units, random.Random(seed))


def job_killed_before_call(out: Path, units: int, call: int) -> None:
    """Die by SIGKILL right before the `call`-th call (from 1) that changes the disk."""
    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, dying(getattr(os, name)))
    run_job(out, units)


def job_that_waits(out: Path, pipe: Connection) -> None:
    with JobFolder.open(out, {}, plan_shards([TensorSpec("a", torch.int8, (3,))], 10)):
        pipe.send(os.getpid())
        pipe.recv()
