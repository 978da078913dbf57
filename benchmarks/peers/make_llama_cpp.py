"""llama.cpp: llama-quantize, out of a GGUF file in float32; loaded by llama-cpp-python."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from answer import Logits, serve


def make(request: dict[str, Any]) -> Path:
    out, settings = Path(request["out"]), request["settings"]
    out.mkdir()
    made = out / "model.gguf"
    command = [request["quantizer"], *settings.get("options", []), request["gguf"], str(made), settings["type"], "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-quantize: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return made


def load(path: Path) -> Logits:
    low = llama_cpp.llama_cpp
    defaults = low.llama_model_default_params

    def plain() -> Any:
        """Without weights repacked for AMX, whose kernels die on virtual machines that announce it and lack it."""
        found = defaults()
        found.use_extra_bufts = False
        return found

    low.llama_model_default_params = plain
    models: dict[int, Any] = {}

    def logits(ids: Any) -> Any:
        tokens = ids.shape[1]
        if tokens not in models:
            models[tokens] = llama_cpp.Llama(
                str(path), n_ctx=tokens + 8, n_batch=tokens, logits_all=True, n_gpu_layers=0, n_threads=1, verbose=False
            )
        model, found = models[tokens], []
        for window in ids.tolist():
            model.reset()
            model.eval(window)
            found.append(model.scores[:tokens].copy())
        return np.stack(found)

    return logits


serve(("llama-cpp-python",), make, load)
