"""Checkpoints that the jobs' tests share; never written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

import zoo
from calibrated_jobs import TEXT


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint of `zoo.ZOO`, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = zoo.save(name, tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A zoo model with a tokenizer, made once, beside a short text."""
    folder = tmp_path_factory.mktemp("readable")
    (folder / "text.txt").write_text(TEXT)

    def make(name: str, **changes: object) -> Path:
        path = folder / "-".join([name, *(f"{key}-{value}" for key, value in changes.items())])
        if not path.exists():
            zoo.save_tokenizer(zoo.save(name, path, **changes))
        return path

    return make


@pytest.fixture
def text(readable: Callable[..., Path]) -> Path:
    """The text beside the models of `readable`."""
    return readable("llama").parent / "text.txt"


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports between the dots."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(level)
