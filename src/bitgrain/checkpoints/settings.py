"""config.json of a checkpoint that nobody vouches for: a JSON object of sane size, and what it says of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bitgrain.checkpoints.safetensors_header import strict_json
from bitgrain.errors import CheckpointError

CONFIG = "config.json"
_MOST_BYTES = 64 << 20
M = TypeVar("M", bound=BaseModel)


class Lenient(BaseModel):
    """Settings as another program wrote them: what is not asked for is passed over, nothing is coerced."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises CheckpointError if it is missing, too large, or no JSON object."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no config.json. Download it again.")
        found = strict_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Download it again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object. Download it again.")
    return found


def section(config: Mapping[str, Any], key: str = "quantization_config") -> Mapping[str, Any]:
    """What stands under `key`, if it is an object; else nothing."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def parse(model: type[M], given: Any, what: str) -> M:
    """`given` as a `model`. Raises CheckpointError that names the first key that is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"config.json, {what}: {where or 'it'}: {first['msg']}") from error
