"""The digits benchmark on one epoch: what it compares, and that it counts right."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not here")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("digits", BENCHMARKS / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["digits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_tested_that_was_learned(digits: ModuleType):
    x, y, test_x, test_y = digits.images(0)
    assert len(x) + len(test_x) == len(y) + len(test_y) == 1797
    again = digits.images(0)
    assert all(torch.equal(a, b) for a, b in zip((x, y, test_x, test_y), again, strict=True))
    joined = torch.cat([x, test_x]).flatten(1)
    every = torch.cat([digits.images(1)[0], digits.images(1)[2]]).flatten(1)
    assert torch.equal(joined.sort(0).values, every.sort(0).values)


def test_one_short_run(digits: ModuleType):
    found = digits.run_seed(0, 1)
    rows = digits.rows()
    assert len(found["rows"]) == len(rows) + 1
    assert found["fold_error"] < 1e-5
    lines = digits.summarize([found])
    kl = {(line["scheme"], line["weights"], line["solver"], line["first_last"]): line["kl"] for line in lines}
    channel = "per output channel"
    assert kl["W4A8", channel, "gptq", ""] < kl["W4A8", channel, "rtn", ""]
    assert kl["W8A16INT16", channel, "rtn", ""] < 0.1 * kl["W4A8", channel, "gptq", ""]
    assert kl["W4A8", channel, "gptq", "W8A8"] < kl["W4A4", channel, "gptq", "W8A8"]
    assert lines[1]["points"] == pytest.approx(lines[1]["accuracy"] - lines[0]["accuracy"])
    page = digits.report(lines, [found])
    assert page.count("\n| W") == len(rows)
    assert "899 images" in page
