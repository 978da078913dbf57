"""What every test shares: one thread for each worker, the device of the jobs, and the optional reference models."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where jobs run; cuda: only the tests that use the fixture `device`, with device='auto' meaning the GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `auto` is the CPU, in child processes too
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, tests of CPU kernels, files and texts would only be run again."""
    if config.getoption("--device") == "cpu":
        return
    left = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where jobs run: `--device`, which is what device="auto" then means."""
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference models and texts beside the checkout."""
    if not (SHARED / "models" / "llama" / "model.safetensors").is_file():
        pytest.skip("reference models (../shared) are not here")
    return SHARED
