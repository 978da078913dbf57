"""The kernels in guarded memory under the sanitizers, without Python (tests/native); and on older processors."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitgrain.kernels.native import native

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


@pytest.mark.slow
@pytest.mark.parametrize(("processor", "level"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_an_older_processor_meets_no_instruction_that_it_lacks(processor: str, level: str):
    qemu = shutil.which("qemu-x86_64")
    if qemu is None or platform.machine() != "x86_64":
        pytest.skip("older processors are emulated by qemu-x86_64 (Debian's qemu-user)")
    script = (
        "import importlib.machinery as m, importlib.util as u; "
        f"loader = m.ExtensionFileLoader('_native', {native().__file__!r}); "
        "made = u.module_from_spec(u.spec_from_loader('_native', loader)); loader.exec_module(made); print(made.isa())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "BITGRAIN_ISA"}
    command = [qemu, "-cpu", processor, sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [level]
