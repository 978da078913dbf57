"""The plan's memory: an upper bound of what a fresh process takes, and not a wild one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRITE_MODEL = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("make_random_llama", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
# wide enough that a matrix outweighs the fixed part, and that blocks of 128 rows are large
module.SIZES["wide"] = {**module.SIZES["tiny"], "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 1}
module.write_random_llama(Path(sys.argv[2]), "wide")
"""


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    tool = ROOT / "tools" / "make_random_llama.py"
    subprocess.run([sys.executable, "-c", WRITE_MODEL, tool, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "workers"), [("W4A16", 1), ("INT8_TENSOR", 2), ("FP8_BLOCK", 2), ("NVFP4", 2)])
def test_peak_ram_bounds_what_a_fresh_process_takes(
    wide_llama: Path, tmp_path: Path, scheme: str, workers: int
) -> None:
    script = ROOT / "benchmarks" / "memory.py"
    command = [sys.executable, script, "--child", scheme, "--model", wide_llama, "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_mb"] <= found["predicted_peak_mb"] < 2 * found["peak_mb"]
    assert found["written_bytes"] == found["predicted_bytes"]
