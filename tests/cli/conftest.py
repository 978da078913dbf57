"""A command line run in this process, and one quantized model that several tests read."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitgrain.cli.main import main
from bitgrain.demo import demo_model_path


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("plan", MODEL, "--json")`: status, stdout, stderr, 100 columns wide."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("COLUMNS", "100")

    def go(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return Ran(status, found.out, found.err)

    return go


@pytest.fixture
def model() -> Path:
    return demo_model_path()


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as W4A16. Read it, never write to it."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    assert main(["quantize", str(demo_model_path()), "-s", "W4A16", "-o", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitgrain.calibration.corpus import builtin_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(builtin_text("evaluation", max_bytes=3000), encoding="utf-8")
    return path
