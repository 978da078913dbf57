"""OUT appears whole or not at all: refusals, resuming, and processes killed at every step."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_job
import pytest
import torch

from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec, plan_shards
from bitgrain.errors import OutputError, ResumeError

LAYOUTS = plan_shards([TensorSpec("a", torch.int8, (3,)), TensorSpec("b", torch.float32, (2,))], 3)
A, B = torch.tensor([1, 2, 3], dtype=torch.int8), torch.tensor([0.5, -2.0])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_done(out: Path) -> Path:
    with JobFolder.open(out, {"scheme": "W4A16"}, LAYOUTS) as job:
        job.commit_unit("first", {"a": A}, {"sqnr": 20.5})
        job.write_text("config.json", "{}")
    return out.with_name(out.name + ".partial")


def complete(out: Path, **options) -> JobFolder:
    job = JobFolder.open(out, {"scheme": "W4A16"}, LAYOUTS, **options)
    with job:
        for unit, tensors in {"first": {"a": A}, "second": {"b": B}}.items():
            if unit not in job.done:
                job.commit_unit(unit, tensors, {"sqnr": 20.5})
        job.write_text("config.json", "{}")
        job.finish()
    return job


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    complete(tmp_path / "reference")
    return contents(tmp_path / "reference")


def test_out_appears_at_the_end_and_nothing_else_stays(tmp_path: Path):
    out = tmp_path / "out"
    with JobFolder.open(out, {}, LAYOUTS) as job:
        job.commit_unit("first", {"a": A})
        job.commit_unit("second", {"b": B})
        job.write_text("config.json", "é")
        assert not out.exists()
        assert job.files == tmp_path / "out.partial" / "files"
        job.finish()
        assert job.files == out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(contents(out)) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert torch.equal(open_checkpoint(out).read("a"), A)
    assert torch.equal(open_checkpoint(out).read("b"), B)
    assert (out / "config.json").read_text(encoding="utf-8") == "é"


def test_resume_knows_what_is_done(tmp_path: Path, whole):
    half_done(tmp_path / "out")
    with JobFolder.open(tmp_path / "out", {"scheme": "W4A16"}, LAYOUTS) as job:
        assert dict(job.done) == {"first": {"sqnr": 20.5}}
        assert job.redone == ()
        with pytest.raises(ValueError, match="done already"):
            job.commit_unit("first", {"a": A})
    complete(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_existing_out_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    for make in (out.mkdir, out.touch, lambda: out.symlink_to("nothing")):
        make()
        for restart in (False, True):
            with pytest.raises(OutputError, match="exists already, and is never overwritten"):
                JobFolder.open(out, {}, LAYOUTS, restart=restart)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        out.rmdir() if out.is_dir() else out.unlink()


def test_out_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, whole):
    out = tmp_path / "out"
    with JobFolder.open(out, {"scheme": "W4A16"}, LAYOUTS) as job:
        job.commit_unit("first", {"a": A}, {"sqnr": 20.5})
        job.commit_unit("second", {"b": B}, {"sqnr": 20.5})
        out.mkdir()
        with pytest.raises(OutputError, match="never overwritten"):
            job.finish()
    with pytest.raises(OutputError, match="never overwritten"):
        complete(out)
    out.rmdir()
    complete(out)
    assert contents(out) == whole


def test_bad_places_are_refused(tmp_path: Path):
    with pytest.raises(OutputError, match="parent folder does not exist"):
        JobFolder.open(tmp_path / "no" / "out", {}, LAYOUTS)
    with pytest.raises(OutputError, match="not a name"):
        JobFolder.open(Path("/"), {}, LAYOUTS)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"not a half-done run \(it holds thesis\.txt\)"):
            JobFolder.open(tmp_path / "out", {}, LAYOUTS, restart=restart)
    assert contents(tmp_path / "out.partial") == {"thesis.txt": b""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        JobFolder.open(tmp_path / "out", {}, LAYOUTS)
    tmp_path.chmod(0o700)


def test_other_settings_are_refused_and_listed(tmp_path: Path):
    out = tmp_path / "out"
    with JobFolder.open(out, {"scheme": "W4A16", "calib": {"samples": 128, "seed": 1}, "gone": None}, LAYOUTS) as job:
        job.commit_unit("first", {"a": A})
    with pytest.raises(ResumeError) as caught:
        JobFolder.open(out, {"scheme": "W8A16", "calib": {"samples": 256, "seed": 1}}, LAYOUTS[:1])
    lines = str(caught.value).splitlines()
    assert lines[1:4] == ["  calib / samples: 128 -> 256", "  gone: null -> (absent)", lines[3]]
    assert lines[3].startswith("  layout_sha256: ")
    assert lines[4] == '  scheme: "W4A16" -> "W8A16"'
    assert "out.partial" in lines[0]
    assert "--restart" in lines[-1]
    with JobFolder.open(out, {"scheme": "W8A16"}, LAYOUTS, restart=True) as job:
        assert dict(job.done) == {}


def test_restart_leaves_no_trace(tmp_path: Path, whole):
    partial = half_done(tmp_path / "out")
    (partial / "files" / "stale.txt").touch()
    complete(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("tail", [b'{"unit": "second", "ten', b"\0\0\0\0", b"\0\0\n", b"\n"])
def test_torn_last_line_is_dropped(tmp_path: Path, whole, tail: bytes):
    journal = half_done(tmp_path / "out") / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(tail)
    with JobFolder.open(tmp_path / "out", {"scheme": "W4A16"}, LAYOUTS) as job:
        assert list(job.done) == ["first"]
        job.commit_unit("second", {"b": B}, {"sqnr": 20.5})
    assert [json.loads(line).get("unit") for line in journal.read_bytes().splitlines()] == [None, "first", "second"]
    complete(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_torn_first_line_begins_anew(tmp_path: Path):
    journal = half_done(tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:20])
    with JobFolder.open(tmp_path / "out", {"other": 1}, LAYOUTS) as job:
        assert dict(job.done) == {}


def test_damaged_or_missing_journal_is_refused(tmp_path: Path):
    journal = half_done(tmp_path / "out") / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"xx\n" + lines[1])
    with pytest.raises(ResumeError, match=r"line 2 is damaged.*--restart"):
        JobFolder.open(tmp_path / "out", {"scheme": "W4A16"}, LAYOUTS)
    journal.unlink()
    with pytest.raises(ResumeError, match=r"journal is gone.*--restart"):
        JobFolder.open(tmp_path / "out", {"scheme": "W4A16"}, LAYOUTS)
    with JobFolder.open(tmp_path / "out", {}, LAYOUTS, restart=True) as job:
        assert dict(job.done) == {}


@pytest.mark.parametrize("damage", ["byte", "header", "cut", "gone"])
@pytest.mark.parametrize("verify", [True, False])
def test_unit_whose_bytes_are_damaged_is_done_again(tmp_path: Path, whole, damage: str, verify: bool):
    partial = half_done(tmp_path / "out")
    path = partial / "files" / "model-00001-of-00002.safetensors.part"
    data = bytearray(path.read_bytes())
    data[{"header": 9}.get(damage, -2)] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "gone":
        path.unlink()
    noticed = verify or damage != "byte"
    with JobFolder.open(tmp_path / "out", {"scheme": "W4A16"}, LAYOUTS, verify_hashes=verify) as job:
        assert (dict(job.done), job.redone) == (({}, ("first",)) if noticed else ({"first": {"sqnr": 20.5}}, ()))
    complete(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_finish_before_all_is_written_is_an_error(tmp_path: Path):
    with JobFolder.open(tmp_path / "out", {}, LAYOUTS) as job:
        job.commit_unit("first", {"a": A})
        with pytest.raises(ValueError, match="never written"):
            job.finish()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "..", "sub/x.json", "/x", "model.safetensors", "x.part"])
def test_only_small_files_of_plain_names_go_beside_the_weights(tmp_path: Path, name: str):
    with JobFolder.open(tmp_path / "out", {}, LAYOUTS) as job, pytest.raises(ValueError, match="not a name"):
        job.write_text(name, "x")


def test_failed_append_does_not_spoil_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    with JobFolder.open(out, {"scheme": "W4A16"}, LAYOUTS) as job:
        real = os.pwrite

        def half(fd, data, offset):
            if bytes(data[:8]) == b'{"unit":':
                real(fd, data[: len(data) // 2], offset)
                raise OSError(28, "No space left on device")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", half)
        with pytest.raises(OutputError, match=r"journal\.jsonl: .*No space left"):
            job.commit_unit("first" * 100, {"a": A})
        monkeypatch.undo()
        job.commit_unit("second", {"b": B}, {"sqnr": 20.5})
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_bytes().splitlines()
    assert [json.loads(line).get("unit") for line in lines] == [None, "second"]
    with JobFolder.open(out, {"scheme": "W4A16"}, LAYOUTS) as job:
        assert list(job.done) == ["second"]


def test_units_may_be_committed_from_threads(tmp_path: Path):
    specs = [TensorSpec(f"t{i}", torch.int16, (i + 1,)) for i in range(24)]
    tensors = {spec.name: torch.arange(spec.shape[0], dtype=torch.int16) for spec in specs}
    layouts = plan_shards(specs, 100)
    for out, threads in ((tmp_path / "one", 1), (tmp_path / "many", 6)):
        with JobFolder.open(out, {}, layouts) as job, ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda name, job=job: job.commit_unit(name, {name: tensors[name]}), tensors))
            job.finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_nothing_is_declared_done_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A crash of the machine loses what was not fsynced, so the order of the calls is what counts."""
    unsafe: set[str] = set()
    lines = 0

    def name_of(fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    def pwrite(fd, data, offset, real=os.pwrite):
        nonlocal lines
        if name_of(fd) == "journal.jsonl":
            lines += 1
            assert unsafe <= {"lock"}
        unsafe.add(name_of(fd))
        return real(fd, data, offset)

    def fsync(fd, real=os.fsync):
        unsafe.discard(name_of(fd))
        real(fd)

    def rename(old, new, real=os.rename):
        assert Path(old).name not in unsafe
        assert new != tmp_path / "out" or unsafe <= {"lock"}
        real(old, new)

    for function in (pwrite, fsync, rename):
        monkeypatch.setattr(os, function.__name__, function)
    monkeypatch.setattr(os, "replace", rename)
    with JobFolder.open(tmp_path / "out", {}, LAYOUTS[:1]) as job:
        job.commit_unit("first", {"a": A})
        job.write_text("config.json", "{}")
        (job.files / "tokenizer.json").write_text("{}")  # by a library that fsyncs nothing
        unsafe.add("tokenizer.json")
        job.finish()
    assert lines == 2


# Processes from here on. A fork server imports torch once; each child is then there in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "bitgrain.checkpoints.job_folder"])


def process(target, *args):
    child = PROCESSES.Process(target=target, args=args)
    child.start()
    return child


def exit_code(target, *args) -> int | None:
    child = process(target, *args)
    child.join(30)
    code = child.exitcode
    child.close()
    return code


def test_second_process_is_refused(tmp_path: Path):
    mine, theirs = PROCESSES.Pipe()
    child = process(fake_job.job_that_waits, tmp_path / "out", theirs)
    try:
        assert mine.poll(30)
        pid = mine.recv()
        for restart in (False, True):
            with pytest.raises(OutputError, match=rf"another process is making it \(pid {pid} on "):
                JobFolder.open(
                    tmp_path / "out", {}, plan_shards([TensorSpec("a", torch.int8, (3,))], 10), restart=restart
                )
    finally:
        mine.send(None)
        child.join(30)
    assert child.exitcode == 0
    with JobFolder.open(tmp_path / "out", {}, plan_shards([TensorSpec("a", torch.int8, (3,))], 10)):
        pass


def test_killed_at_random_moments(tmp_path: Path):
    units = 30
    fake_job.run_job(tmp_path / "reference", units)
    expected = contents(tmp_path / "reference")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    moments = random.Random(20)
    kills = finished = 0
    lines_at_kill: set[int] = set()
    while kills < 20:
        mine, theirs = PROCESSES.Pipe()
        child = process(fake_job.slow_job, out, units, kills, theirs)
        assert mine.poll(30)
        child.join(moments.random() * 0.1)
        child.kill()  # may come too late
        child.join(30)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode != 0:
            kills += 1
            journal = partial / "journal.jsonl"
            lines_at_kill.add(journal.read_bytes().count(b"\n") if journal.exists() else 0)
        if out.exists():  # also where the kill came after the commit, before the process was gone
            assert contents(out) == expected
            finished += 1
            out.rename(tmp_path / f"out-{finished}")
            shutil.rmtree(partial, ignore_errors=True)
        else:
            assert child.exitcode != 0
    assert len(lines_at_kill) >= 5, "the kills did not fall into the work"
    fake_job.run_job(out, units)
    assert contents(out) == expected
    assert not partial.exists()


def test_killed_before_every_single_disk_call(tmp_path: Path):
    """Exhaustive: one kill before each call, each followed by the same command until it is done."""
    units = 3
    fake_job.run_job(tmp_path / "reference", units)
    expected = contents(tmp_path / "reference")
    calls = refusals = 0
    while True:
        calls += 1
        out = tmp_path / f"out-{calls}"
        code = exit_code(fake_job.job_killed_before_call, out, units, calls)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        committed = out.exists()
        if committed:
            assert contents(out) == expected, f"half-written OUT after a kill before call {calls}"
        refused = ""
        try:
            fake_job.run_job(out, units)
        except OutputError as error:
            refused = str(error)
        if refused:  # only in the very last steps: OUT is there, whole, and the journal that would tell is gone
            assert committed
            assert "exists already" in refused
            refusals += 1
        assert contents(out) == expected, f"after a kill before call {calls}"
        assert not out.with_name(out.name + ".partial").exists(), f"litter after a kill before call {calls}"
    assert calls > 60
    assert refusals <= 4


def test_killed_again_and_again_at_the_next_call(tmp_path: Path):
    """Each run gets a few calls further than the last: resuming is itself resumable."""
    fake_job.run_job(tmp_path / "reference", 3)
    out = tmp_path / "out"
    for call in range(1, 200, 2):
        if exit_code(fake_job.job_killed_before_call, out, 3, call) == 0 or out.exists():
            break
    assert contents(out) == contents(tmp_path / "reference")
