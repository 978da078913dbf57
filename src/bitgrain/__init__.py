"""bitgrain: smaller, faster models in formats that engines already read, with the evidence of what it cost.

bitgrain.quantize("MODEL", "OUT", "W4A16")      disk to disk, block by block
bitgrain.plan("MODEL", "W4A16")                 what it will cost, before it starts
bitgrain.load("OUT")                            a transformers model
bitgrain.evaluate("OUT", against="MODEL", text="FILE")
bitgrain.inspect("MODEL")                       ranges, outliers, what each granularity would lose
bitgrain.convert("OUT", "gptq", "OUT-gptq")     the same numbers in another engine's layout
bitgrain.show("FILE")                           what is in a checkpoint: layout, bits, every layer
bitgrain.verify("OUT")                          does the written folder hold what we meant?
bitgrain.quantize_(module, "W8A8")              in memory, any torch module
bitgrain.calibrate(module, batches)             for quantize_(..., calibration=): static scales, solvers
bitgrain.quantize_tensor(w, "NVFP4")            one tensor
bitgrain.low_bit_(module, "NF4")                in memory, weights stay packed
bitgrain.finetune("OUT", "ADAPTER", text="FILE")    LoRA on packed weights; bitgrain.merge adds it to them
bitgrain.train("MODEL", "OUT", "W4A8", text="FILE")   quantization-aware training; in memory: bitgrain.qat
bitgrain.KVCache("kivi-int4", config)           keys and values in few bits, for generate
import bitgrain.hf                              transformers' from_pretrained reads folders of bitgrain's own layout
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bitgrain.errors import BitgrainError

if TYPE_CHECKING:
    from bitgrain.api import (
        KVCache,
        calibrate,
        convert,
        evaluate,
        finetune,
        fold_batch_norms_,
        inspect,
        load,
        low_bit_,
        merge,
        plan,
        quantize,
        quantize_,
        quantize_tensor,
        show,
        train,
        verify,
    )

__version__ = version("bitgrain")
__all__ = [
    "BitgrainError",
    "KVCache",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "finetune",
    "fold_batch_norms_",
    "inspect",
    "load",
    "low_bit_",
    "merge",
    "plan",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "show",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The jobs import torch and transformers, so they are imported when first used."""
    if name in __all__:
        return getattr(import_module("bitgrain.api"), name)
    raise AttributeError(f"module 'bitgrain' has no attribute {name!r}")


if "transformers" in sys.modules:  # who has it loaded can pay for the quantizer; see docs/decisions/0025
    import_module("bitgrain.hf")
