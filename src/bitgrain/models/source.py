"""Where a model comes from: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bitgrain.checkpoints.gguf.model import SUFFIX
from bitgrain.errors import ModelError

# What a job needs of a repository. Python files are fetched, but run only with trust_remote_code.
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
# Second copies of the weights in other layouts live in subfolders ("original/", "metal/", "onnx/").
_UNWANTED = ["*/*.safetensors"]


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this machine, or its GGUF file. `revision` is the commit of a hub model, else None."""

    path: Path
    name: str
    revision: str | None


def resolve_model(model: str | Path, *, revision: str | None = None, gguf: bool = False) -> ModelSource:
    """The folder that holds `model`: the folder itself, or a snapshot of a hub repository; `gguf`: or a GGUF file.

    A folder wins over a hub repository of the same name. Raises ModelError when there is neither, and when what
    is found has no config.json or no safetensors weights.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{model} is a folder, so --revision {revision} does not apply: leave it out")
        name, commit = folder.resolve().name, None
    elif folder.suffix == SUFFIX and folder.is_file():
        if not gguf:
            raise ModelError(
                f"{model} is a GGUF file, which can be loaded, measured and converted: do this with the model that it "
                "was made from"
            )
        return ModelSource(folder, folder.stem, None)
    elif folder.exists():
        raise ModelError(f"{model} is a file: pass the folder that holds config.json and the weights")
    elif _looks_like_path(model):
        raise ModelError(f"the folder {model} does not exist")
    else:
        folder, name = _download(str(model), revision), str(model)
        commit = folder.name  # a snapshot's folder is named after its commit
    _check_folder(folder, str(model))
    return ModelSource(folder, name, commit)


def _looks_like_path(model: str | Path) -> bool:
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or "\\" in model:
        return True
    return model.endswith("/") or model.count("/") > 1


def _download(name: str, revision: str | None) -> Path:
    at = "" if revision is None else f" at revision {revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither an existing folder nor a valid hub name: {error}") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated on the hub: accept its terms there, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither an existing folder nor a repository on the hub "
            "(for a private one, log in with `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} is on the hub, but has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is not an existing folder, and the hub cannot be reached to download it{at}: "
            "check the spelling, the network and HF_HUB_OFFLINE, or pass a folder"
        ) from error
    except OSError as error:  # HTTP errors and broken connections are all OSErrors
        raise ModelError(f"{name} could not be downloaded from the hub{at}: {error}") from error


def _check_folder(folder: Path, model: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model} has no config.json, so it is not a transformers checkpoint")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ModelError(
            f"{model} has its weights only in {pickles[0]}, a pickle, which bitgrain never loads because it can "
            "run code: convert it to safetensors first, with save_pretrained, where you trust it"
        )
    raise ModelError(f"{model} has no *.safetensors weights next to its config.json")
