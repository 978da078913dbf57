"""The rows of `make bench-accuracy`: methods.yaml read and checked. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).with_name("methods.yaml")
KEYS = ("recipes", "schemes", "sets", "models", "peers")


@dataclass(frozen=True)
class Method:
    """One row.

    tool      "bitgrain", or the venv of a peer
    settings  bitgrain: `scheme` (a name, or keys of a scheme) or `bits`, and `recipe` (keys of a recipe, or `base`, a
              name in the package); peers: `setting`
    """

    name: str
    tool: str
    settings: Mapping[str, Any]

    @property
    def ours(self) -> bool:
        """Whether bitgrain does it."""
        return self.tool == "bitgrain"


def read_methods(path: Path = METHODS) -> dict[str, Any]:
    """The file as it is written. Raises ValueError for a key that is none of `KEYS`, or that is missing."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or set(data) != set(KEYS):
        raise ValueError(f"{path.name}: the keys must be {', '.join(KEYS)}")
    return data


def methods_of(data: Mapping[str, Any], model: str, named: Mapping[str, str]) -> list[Method]:
    """The rows for the model called `model`; `named`: the recipes of the package, name -> their text.

    A row that several sets name is there once. Raises ValueError for a set or recipe that does not exist.
    """
    chosen = data["models"].get(model, data["models"]["default"])
    rows: dict[str, Method] = {}
    for set_name in chosen["sets"]:
        if set_name not in data["sets"]:
            raise ValueError(f"models: {model} names the set {set_name!r}; there are {', '.join(data['sets'])}")
        for scheme, recipes in data["sets"][set_name].items():
            for recipe in recipes:
                row = _own(data, scheme, recipe, named)
                rows[row.name] = row
    for peer, kinds in data["peers"].items():
        for kind in chosen["peers"]:
            for setting in kinds.get(kind, []):
                row = Method(f"{peer}/{setting}", peer, {"setting": str(setting)})
                rows[row.name] = row
    return list(rows.values())


def _own(data: Mapping[str, Any], scheme: str | float, recipe: str, named: Mapping[str, str]) -> Method:
    keys: dict[str, Any] = dict(data["recipes"].get(recipe, {"base": recipe}))
    base = keys.get("base")
    if base is not None:
        if base not in named:
            raise ValueError(f"there is no recipe {recipe!r}, here or in the package ({', '.join(named)})")
        keys["text"] = yaml.safe_load(named[base])  # a row is measured anew when the recipe changes
    if isinstance(scheme, str):
        # a preset by its name, a scheme of the file's own by its keys
        own = data["schemes"].get(scheme)
        what: dict[str, Any] = {"scheme": scheme if own is None else {"name": scheme, **own}}
        label = scheme
    else:
        what, label = {"bits": float(scheme)}, f"{scheme} bits"
    return Method(f"{label}/{recipe}", "bitgrain", {**what, "recipe": keys})


def select(methods: Sequence[Method], patterns: Sequence[str]) -> list[Method]:
    """Those whose names match one of the patterns (`W4*/best`, `*/gptq*`, `hqq/*`); all without patterns.

    A pattern without `/` stands for a scheme, a recipe or a tool. Raises ValueError for one that matches nothing.
    """

    def hits(method: Method, pattern: str) -> bool:
        parts = [method.name] if "/" in pattern else [*method.name.split("/", 1), method.tool]
        return any(fnmatchcase(part, pattern) for part in parts)

    idle = [pattern for pattern in patterns if not any(hits(method, pattern) for method in methods)]
    if idle:
        raise ValueError(f"no row matches {', '.join(idle)}; --list shows them all")
    return [m for m in methods if not patterns or any(hits(m, pattern) for pattern in patterns)]


def digest(value: Any) -> str:
    """16 hexadecimal digits for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """The same for the names and contents of files."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]
