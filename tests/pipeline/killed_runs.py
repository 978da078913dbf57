"""The driver of test_kill: runs `bitgrain.quantize` in forked children and kills them with SIGKILL at random moments.

Everything is imported once, here; a fork costs nothing. Prints what happened as JSON. Run as a program, because a
process whose torch has started its threads must not be forked.

    python killed_runs.py MODEL FOLDER SEED KILLS [RECIPE]

RECIPE: a YAML file; without it the weights are only rounded.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import bitgrain.api  # noqa: E402
from bitgrain.pipeline import planning  # noqa: E402

MOST_RUNS = 120


def start(model: Path, out: Path, workers: int, recipe: Path | None) -> int:
    """A child that quantizes `model` into `out` and exits with 0; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            bitgrain.api.quantize(model, out, "W4A16", recipe=recipe, workers=workers, max_shard_bytes=100_000)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_whole(out: Path, whole: dict[str, bytes]) -> bool:
    return contents(out) == whole


def count_steps(partial: Path) -> int:
    """Finished units in the journal and its first line, and the files of a calibrated job; 0 before there is one."""
    try:
        lines = (partial / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
    try:
        files = os.listdir(partial / "work")
    except FileNotFoundError:
        return lines
    return lines + sum(not name.startswith(("hidden", "scratch")) for name in files)


def watch(child: int, out: Path, whole: dict[str, bytes], moment: tuple[int, float] | None, faults: list[str]) -> str:
    """Wait for the child, or (moment) until it has done so many steps, and kill it so many seconds later.

    OUT must be whole from the first moment that it is there.
    """
    partial = out.with_name(out.name + ".partial")
    looked, end = False, None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if out.exists() and not looked:
            looked = True
            if not is_whole(out, whole):
                faults.append("OUT was there before it was whole")
        if done:
            return "finished" if status == 0 else f"failed with status {status}"
        if moment is not None and end is None and count_steps(partial) >= moment[0]:
            end = time.monotonic() + moment[1]
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if out.exists() and not is_whole(out, whole):
                faults.append("OUT is not whole after a kill")
            return "killed"
        time.sleep(0.0005)


def main(model: Path, folder: Path, seed: int, kills: int, recipe: Path | None = None) -> None:
    planning._UNIT_BYTES = 1  # pyright: ignore[reportPrivateUsage]  # every fused group is a unit: many moments to die in
    chance = random.Random(seed)
    whole: dict[str, bytes] = {}
    if os.waitpid(start(model, folder / "reference", 1, recipe), 0)[1]:
        raise SystemExit("the uninterrupted run failed")
    plan = bitgrain.api.plan(model, "W4A16", recipe=recipe)
    # the journal's first line, its units; of a calibrated job each block, what is outside, tuned, and the end
    steps = 1 + len(plan.units) + (0 if recipe is None else len(plan.anatomy.block_names) + 3)
    whole = contents(folder / "reference")
    out, partial = folder / "out", folder / "out.partial"
    killed, finished, resumed, late, faults, stages = 0, 0, 0, 0, [], set()
    for _ in range(MOST_RUNS):
        if killed >= kills:
            break
        already = count_steps(partial)
        resumed += already > 1
        if already < steps:  # a little further than the last run came
            moment = min(steps, already + chance.randint(0, steps // 4)), chance.uniform(0, 0.02)
        else:  # all units are done: while it plans, checks their bytes, writes the small files or renames
            moment = steps, chance.uniform(0, 0.6)
        outcome = watch(start(model, out, chance.choice([1, 2, 4]), recipe), out, whole, moment, faults)
        if outcome == "killed":
            killed += 1
            stages.add(count_steps(partial))
            late += out.exists()
        elif outcome != "finished":
            faults.append(outcome)
            break
        if outcome == "finished" or (out.exists() and not partial.exists()):
            finished += 1
            if not is_whole(out, whole):
                faults.append("a finished OUT differs from the uninterrupted one")
            if partial.exists():
                faults.append("OUT.partial is left")
            shutil.rmtree(out)
    if not out.exists():
        outcome = watch(start(model, out, 3, recipe), out, whole, None, faults)
        if outcome != "finished":
            faults.append(outcome)
    if not is_whole(out, whole) or partial.exists():
        faults.append("the last OUT differs from the uninterrupted one")
    result = {
        "killed": killed, "finished": finished, "resumed": resumed, "killed_after_commit": late,
        "stages": len(stages), "faults": faults, "files": sorted(whole),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *map(Path, sys.argv[5:6]))
