"""OpenVINO: one model with a product for each copy of the weights, compiled for the shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import openvino
from openvino import opset13 as op

from contestants.linear import LinearService, Ready, Shape

GROUP = 128


class Service(LinearService):
    packages = ("openvino",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.core = openvino.Core()
        self.makers = {
            "OpenVINO bfloat16": self.make_bfloat16,
            "OpenVINO int8": self.make_int8,
            "OpenVINO i4 g128": partial(self.make_int4, openvino.Type.i4),
            "OpenVINO u4 g128": partial(self.make_int4, openvino.Type.u4),
        }

    def make_bfloat16(self, s: Shape) -> Ready:
        copies, given = s.copies(2 * s.n * s.k), np.random.default_rng(0)
        weights = [op.constant(given.standard_normal((s.n, s.k), dtype=np.float32)) for _ in range(copies)]
        return self.ready(s, weights, 2 * s.n * s.k, {"INFERENCE_PRECISION_HINT": "bf16"})

    def make_int8(self, s: Shape) -> Ready:
        """Compressed weights with a scale for each output, as NNCF writes them."""
        copies, given = s.copies(s.n * s.k), np.random.default_rng(0)
        weights: list[openvino.Node] = []
        for i in range(copies):
            codes = op.constant(given.integers(-127, 128, (s.n, s.k), dtype=np.int8))
            scale = op.constant(np.full((s.n, 1), 0.01 + i * 1e-5, np.float16))
            weights.append(op.convert(op.multiply(op.convert(codes, np.float16), scale), np.float32))
        return self.ready(s, weights, s.n * s.k, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP)})

    def make_int4(self, kind: openvino.Type, s: Shape) -> Ready:
        """Groups of 128 with a float16 scale; u4: and a zero point. Inputs in int8, a scale for 128."""
        zeros = kind == openvino.Type.u4
        groups = s.k // GROUP
        nbytes = s.n * s.k / 2 + s.n * groups * (2.5 if zeros else 2)
        copies, given = s.copies(nbytes), np.random.default_rng(0)
        weights: list[openvino.Node] = []
        arrays: list[np.ndarray] = []  # a Tensor does not hold what it is made of
        for i in range(copies):
            packed = given.integers(0, 256, (s.n, s.k // 2), dtype=np.uint8)
            arrays.append(packed)
            weight = op.convert(op.constant(openvino.Tensor(packed, [s.n, groups, GROUP], kind)), np.float16)
            if zeros:
                middle = np.full((s.n, (groups + 1) // 2), 0x88, np.uint8)
                arrays.append(middle)
                zero = op.constant(openvino.Tensor(middle, [s.n, groups, 1], kind))
                weight = op.subtract(weight, op.convert(zero, np.float16))
            weight = op.multiply(weight, op.constant(np.full((s.n, groups, 1), 0.01 + i * 1e-5, np.float16)))
            weights.append(op.convert(op.reshape(weight, op.constant([s.n, s.k]), False), np.float32))
        return self.ready(s, weights, nbytes, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP)}, arrays)

    def ready(
        self, s: Shape, weights: list[openvino.Node], nbytes: float, more: dict[str, str], arrays: Sequence[object] = ()
    ) -> Ready:
        settings = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **more}

        def bind(m: int) -> Callable[[], object]:
            x = op.parameter([m, s.k], np.float32, name="x")
            model = openvino.Model([op.matmul(x, weight, False, True) for weight in weights], [x], "products")
            request = self.core.compile_model(model, "CPU", settings).create_infer_request()
            inputs = np.random.default_rng(1).standard_normal((m, s.k), dtype=np.float32)
            request.set_input_tensor(0, openvino.Tensor(inputs, shared_memory=True))

            def run() -> object:
                request.infer()
                return inputs, arrays  # kept

            return run

        return Ready(bind, len(weights), nbytes)
