"""What `bitgrain quantize` wrote, loaded by `bitgrain.load`: forward and `generate` of a plain transformers model."""

from __future__ import annotations

import bitgrain
from bitgrain.kernels.native import isa
from contestants import llm_transformers


class Service(llm_transformers.Service):
    packages = ("bitgrain", "torch", "transformers")

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "instructions": isa()}

    def load(self, file: str, room: int) -> None:
        self.serve(bitgrain.load(file, device="cpu"))
