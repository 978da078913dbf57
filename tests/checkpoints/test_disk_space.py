"""Room on the disk is asked for before the job, in words that people read."""

from pathlib import Path

import pytest
import torch

from bitgrain.checkpoints.disk_space import check_disk_space, format_bytes
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.shards import TensorSpec, plan_shards, weights_nbytes
from bitgrain.errors import OutputError, PlanError


class Disk:
    f_bavail, f_frsize = 10, 4096


def test_full_disk_is_a_plan_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_disk_space(tmp_path / "out", 1)
    monkeypatch.setattr("os.statvfs", lambda _: Disk)
    check_disk_space(tmp_path / "out", 40960)
    with pytest.raises(PlanError, match=r"41\.0 kB are needed, but its disk has only 41\.0 kB free\. Free some"):
        check_disk_space(tmp_path / "out", 40961)
    with pytest.raises(OutputError, match="parent folder"):
        check_disk_space(tmp_path / "no" / "out", 1)


def test_what_a_half_done_run_holds_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layouts = plan_shards([TensorSpec("a", torch.int8, (1_000_000,))], 1 << 30)
    JobFolder.open(tmp_path / "out", {}, layouts).close()
    monkeypatch.setattr("os.statvfs", lambda _: Disk)
    check_disk_space(tmp_path / "out", weights_nbytes(layouts))
    with pytest.raises(PlanError, match=r"2\.0 MB are needed, .* free besides the 1\.0 MB of the half-done run"):
        check_disk_space(tmp_path / "out", 2_000_000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (16_060_522_496, "16.1 GB"),
        (10**18, "1000 PB"),
    ],
)
def test_bytes_for_people(nbytes: int, text: str):
    assert format_bytes(nbytes) == text
