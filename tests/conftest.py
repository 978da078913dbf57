"""What every test shares: one thread for each worker, and the optional reference models."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference models and texts beside the checkout."""
    if not (SHARED / "models" / "llama" / "model.safetensors").is_file():
        pytest.skip("reference models (../shared) are not here")
    return SHARED
