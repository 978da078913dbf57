"""ggml, as llama.cpp uses it: one graph with a product for each copy of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np

from contestants.ggml import TYPES, Ggml
from contestants.linear import LinearService, Ready, Shape


class Service(LinearService):
    packages = ("llama-cpp-python",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ggml = Ggml(threads)
        self.held: list[tuple[int, int]] = []  # contexts of tensors and where their data lie
        self.makers = {
            "ggml Q8_0": partial(self.make_ready, "Q8_0", False),
            "ggml Q4_0": partial(self.make_ready, "Q4_0", False),
            "ggml Q4_0 repacked": partial(self.make_ready, "Q4_0", True),
            "ggml Q4_K": partial(self.make_ready, "Q4_K", False),
            "ggml Q4_K repacked": partial(self.make_ready, "Q4_K", True),
        }

    def make_ready(self, kind: str, repacked: bool, s: Shape) -> Ready:
        """Raises ValueError where ggml has no such layout here."""
        g = self.ggml
        bits = 8.5 if kind == "Q8_0" else 4.5
        copies = s.copies(s.n * s.k * bits / 8)
        weights_context = g.context(copies)
        weights = [g.ggml_new_tensor_2d(weights_context, TYPES[kind], s.k, s.n) for _ in range(copies)]
        memory = g.repacked() if repacked else g.ggml_backend_cpu_buffer_type()
        buffer = memory and g.ggml_backend_alloc_ctx_tensors_from_buft(weights_context, memory)
        if not buffer:
            g.ggml_free(weights_context)
            raise ValueError(f"ggml does not lay out {kind} anew on this processor")
        packed = self.quantized(kind, s, g.ggml_nbytes(weights[0]))
        for weight in weights:
            g.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)

        self.held.append((weights_context, buffer))

        def bind(m: int) -> Callable[[], object]:
            size = copies + 8
            context = g.context(size, size)
            x = g.ggml_new_tensor_2d(context, 0, s.k, m)
            graph = g.ggml_new_graph_custom(context, size, False)
            for weight in weights:
                g.ggml_build_forward_expand(graph, g.ggml_mul_mat(context, weight, x))
            self.held.append((context, g.ggml_backend_alloc_ctx_tensors(context, g.backend)))
            inputs = np.random.default_rng(1).standard_normal((m, s.k), dtype=np.float32)
            g.ggml_backend_tensor_set(x, inputs.ctypes.data, 0, inputs.nbytes)
            return lambda: g.ggml_backend_graph_compute(g.backend, graph)

        return Ready(bind, copies, packed.nbytes)

    def quantized(self, kind: str, s: Shape, nbytes: int) -> np.ndarray:
        """Random weights; few different rows, because ggml quantizes slowly."""
        rows = min(s.n, 64)
        given = np.random.default_rng(0).standard_normal((rows, s.k), dtype=np.float32)
        packed = np.empty(nbytes // s.n * rows, dtype=np.uint8)
        floats = given.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self.ggml.ggml_quantize_chunk(TYPES[kind], floats, packed.ctypes.data, 0, rows, s.k, None)
        return np.tile(packed, s.n // rows)

    def free(self) -> None:
        super().free()
        for context, buffer in self.held:
            self.ggml.ggml_backend_buffer_free(buffer)
            self.ggml.ggml_free(context)
        self.held.clear()
