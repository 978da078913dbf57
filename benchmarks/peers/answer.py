"""What the scripts share: a request comes as JSON, losses go back as an array."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[Any], Any]
"""int64 [windows, tokens] -> floats [windows, tokens, vocabulary]."""
AT_ONCE = 4
"""Windows."""


def serve(
    packages: Sequence[str],
    make: Callable[[dict[str, Any]], Path],
    load: Callable[[Path], Logits],
) -> None:
    """Make the file that the request (the JSON file named by the first argument) describes, unless it gives its `path`,
    then load and measure it.

    Request: out, a folder that is not there yet; model, settings, calibration for `make`; ids, the file of windows;
    losses, answer: files to write. The answer is there once the file is made: path, versions. The losses, float64
    [windows, tokens - 1], follow once it is measured.
    """
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path = Path(request["path"]) if "path" in request else make(request)
    answer = {"path": str(path), "versions": {name: version(name) for name in packages}}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    ids = np.load(request["ids"], allow_pickle=False)
    logits = load(path)
    found = [losses(logits(part), part) for part in np.array_split(ids, -(-len(ids) // AT_ONCE))]
    np.save(request["losses"], np.concatenate(found))


def losses(logits: Any, ids: Any) -> Any:
    """Nats, float64 [windows, tokens - 1]: of each token after those before it."""
    values = np.asarray(logits, dtype=np.float64)[:, :-1]
    values = values - values.max(-1, keepdims=True)
    told = np.take_along_axis(values, ids[:, 1:, None], -1)[..., 0]
    return np.log(np.exp(values).sum(-1)) - told


def calibration(request: dict[str, Any]) -> Any:
    """int64 [windows, tokens]."""
    return np.load(request["calibration"], allow_pickle=False)
