"""onnxruntime: one graph with a node for each copy of the weights, so that Python is called once a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import NodeProto
from onnx.onnx_ml_pb2 import TensorProto as Tensor

from contestants.linear import LinearService, Ready, Shape

MICROSOFT = "com.microsoft"


class Service(LinearService):
    packages = ("onnxruntime",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.makers = {
            "onnxruntime DynamicQuantizeMatMul": self.make_dynamic,
            "onnxruntime MatMulNBits 8 b128": partial(self.make_blocks, 8, 128),
            "onnxruntime MatMulNBits 8 b32": partial(self.make_blocks, 8, 32),
            "onnxruntime MatMulNBits 4 b128": partial(self.make_blocks, 4, 128),
            "onnxruntime MatMulNBits 4 b32": partial(self.make_blocks, 4, 32),
        }

    def make_dynamic(self, s: Shape) -> Ready:
        """int8 weights with a scale for each output; inputs u8, quantized as they come, one scale for all."""
        copies, given = s.copies(s.n * s.k), np.random.default_rng(0)
        nodes: list[NodeProto] = []
        weights: list[Tensor] = []
        for i in range(copies):
            weights.append(numpy_helper.from_array(given.integers(-127, 128, (s.k, s.n), dtype=np.int8), f"w{i}"))
            weights.append(numpy_helper.from_array(np.full(s.n, 0.01 + i * 1e-5, np.float32), f"s{i}"))
            inputs = ["x", f"w{i}", f"s{i}"]
            nodes.append(helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{i}"], domain=MICROSOFT))
        return self.ready(s, nodes, weights, copies, s.n * s.k)

    def make_blocks(self, bits: int, block: int, s: Shape) -> Ready:
        """Weights in blocks that share a float32 scale, symmetric; accuracy_level 4: inputs in int8."""
        nbytes = s.n * s.k * bits / 8 + s.n * s.k / block * 4
        copies, given = s.copies(nbytes), np.random.default_rng(0)
        nodes: list[NodeProto] = []
        weights: list[Tensor] = []
        shape = (s.n, s.k // block, block * bits // 8)
        for i in range(copies):
            weights.append(numpy_helper.from_array(given.integers(0, 256, shape, dtype=np.uint8), f"w{i}"))
            weights.append(numpy_helper.from_array(np.full(shape[:2], 0.01 + i * 1e-5, np.float32), f"s{i}"))
            options = {"K": s.k, "N": s.n, "bits": bits, "block_size": block, "accuracy_level": 4}
            inputs = ["x", f"w{i}", f"s{i}"]
            nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain=MICROSOFT, **options))
        return self.ready(s, nodes, weights, copies, nbytes)

    def ready(self, s: Shape, nodes: list[NodeProto], weights: list[Tensor], copies: int, nbytes: float) -> Ready:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", s.k])
        ys = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", s.n]) for i in range(copies)]
        graph = helper.make_graph(nodes, "products", [x], ys, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def bind(m: int) -> Callable[[], object]:
            feed = {"x": np.random.default_rng(1).standard_normal((m, s.k), dtype=np.float32)}
            return lambda: session.run(None, feed)

        return Ready(bind, copies, nbytes)
