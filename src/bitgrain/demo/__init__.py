"""The built-in model: a toy Llama that has read Python's standard library, for demos and tests without a network.

`tools/train_demo_model.py` in the source repository trained it; `model/README.md` says what it is and was measured
at. Its text comes from `bitgrain.calibration.corpus`.
"""

from importlib.resources import files
from pathlib import Path

from bitgrain.errors import ModelError

__all__ = ["demo_model_path"]

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def demo_model_path() -> Path:
    """The folder of the built-in checkpoint; read it, never write to it.

    Raises ModelError where the installation lacks it, or keeps it inside an archive.
    """
    folder = files(__name__).joinpath("model")
    if not isinstance(folder, Path):
        raise ModelError(
            f"the built-in model is inside an archive ({folder}), where a checkpoint cannot be read: "
            "install bitgrain unpacked, with pip"
        )
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"the built-in model at {folder} lacks {', '.join(missing)}: reinstall bitgrain, or in a source checkout "
            "run `python tools/train_demo_model.py`"
        )
    return folder
