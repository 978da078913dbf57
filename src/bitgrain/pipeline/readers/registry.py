"""The readers by name."""

from __future__ import annotations

from bitgrain.errors import SchemeError
from bitgrain.pipeline.readers import gptqmodel_reader, llama_cpp_reader, onnxruntime_reader, transformers_reader
from bitgrain.pipeline.readers.base import Reader

READERS: dict[str, Reader] = {
    module.READER.name: module.READER
    for module in (transformers_reader, llama_cpp_reader, onnxruntime_reader, gptqmodel_reader)
}


def get_reader(name: str) -> Reader:
    """The reader called `name`. Raises SchemeError that lists all."""
    found = READERS.get(name.lower())
    if found is None:
        raise SchemeError(f"unknown reader {name!r}; known readers: {', '.join(READERS)}")
    return found


def readers_of(layout: str) -> list[Reader]:
    """Those that read `layout`, first the one that is asked if none is named."""
    return [reader for reader in READERS.values() if layout in reader.layouts]
