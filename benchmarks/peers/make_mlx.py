"""mlx-lm: `convert` with quantization; loaded by mlx-lm, which runs on a CPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from answer import Logits, serve
from mlx_lm import convert
from mlx_lm.utils import load_model


def make(request: dict[str, Any]) -> Path:
    mx.set_default_device(mx.cpu)
    convert(request["model"], request["out"], quantize=True, dtype="float32", **request["settings"])
    return Path(request["out"])


def load(path: Path) -> Logits:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(path)

    def logits(ids: Any) -> Any:
        return np.array(model(mx.array(ids.astype(np.int32))).astype(mx.float32))

    return logits


serve(("mlx-lm", "mlx"), make, load)
