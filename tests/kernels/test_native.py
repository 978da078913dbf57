"""The kernels in guarded memory under the sanitizers, without Python (tests/native)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("cmake", "ninja", "c++")


def test_native_checks_pass_under_sanitizers(tmp_path):
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the native tests are built with {', '.join(NEEDED)}; missing: {', '.join(missing)}")
    build = tmp_path / "build"
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DBITGRAIN_NATIVE_TESTS=ON"]
    for command in (
        [*configure, "-DBITGRAIN_SANITIZE=address"],
        ["ninja", "-C", build],
        [build / "bitgrain_native_tests"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "all checks passed" in done.stdout
