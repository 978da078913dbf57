"""The few functions of ggml that a matrix product needs, in the libraries that llama-cpp-python carries.

Names and signatures as in ggml.h, ggml-alloc.h and ggml-backend.h.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp

TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}


class InitParams(ctypes.Structure):
    """Of ggml_init."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[Any, ...]] = {  # what comes back, then the arguments
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
}


class Ggml:
    """The functions of SIGNATURES as methods, and one CPU backend. Raises OSError where the libraries are not there."""

    def __init__(self, threads: int) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
        for name, (answer, *arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = answer, arguments
            setattr(self, name, function)
        self.backend = self.ggml_backend_cpu_init()
        self.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def repacked(self) -> int | None:
        """The type of buffers whose weights are laid out anew for this processor, or None."""
        registry = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(self.backend))
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.ggml_backend_get_device(self.backend))
        for kind in iter(found):
            if kind is None:
                return None
            if b"REPACK" in self.ggml_backend_buft_name(kind):
                return kind
        return None

    def context(self, tensors: int, graph: int = 0) -> int:
        """Room for descriptions of tensors and of a graph; their data lie elsewhere."""
        size = self.ggml_tensor_overhead() * tensors
        size += self.ggml_graph_overhead_custom(graph, False) if graph else 0
        return self.ggml_init(InitParams(size, None, True))
