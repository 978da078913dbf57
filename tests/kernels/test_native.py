"""The kernels in guarded memory under the sanitizers, without Python (tests/native)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("cmake", "ninja", "c++")


@pytest.mark.slow
def test_native_checks_pass_under_sanitizers(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    missing = [tool for tool in NEEDED if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"the native tests are built with {', '.join(NEEDED)}; missing: {', '.join(missing)}")
    build = tmp_path / "build"
    options = ["-DBITGRAIN_NATIVE_TESTS=ON", "-DBITGRAIN_SANITIZE=address"]
    options += ["-DBITGRAIN_LEVELS="]  # the plain level alone: `make test-native` has the others
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options],
        ["ninja", "-C", build],
        [build / "bitgrain_native_tests"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "all checks passed" in done.stdout
