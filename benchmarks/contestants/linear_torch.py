"""torch's own linear layers: float32, bfloat16 in oneDNN's layout, quantized ones, packed 4 and 8 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from contestants.linear import LinearService, Ready, Shape

warnings.filterwarnings("ignore")
torch.set_grad_enabled(False)
OPS = torch.ops
SCALE = 0.01
Product = Callable[[Any], Tensor]
Call = Callable[[int], Product]
"""For m rows: a product with one weight."""


class Service(LinearService):
    packages = ("torch",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        self.makers = {
            "torch float32": make_float32,
            "torch bfloat16 oneDNN": make_bfloat16,
            "torch linear_dynamic fbgemm": partial(make_dynamic, "fbgemm"),
            "torch linear_dynamic oneDNN": partial(make_dynamic, "onednn"),
            "torch qlinear u8 static": make_static,
            "torch int8pack": make_int8pack,
            "torch int4pack g128": partial(make_int4pack, 128),
            "torch int4pack g32": partial(make_int4pack, 32),
        }


def rotate(s: Shape, nbytes: float, weight: Callable[[], Any], call: Call) -> Ready:
    copies = s.copies(nbytes)
    weights = [weight() for _ in range(copies)]

    def bind(m: int) -> Callable[[], object]:
        product = call(m)

        def run() -> None:
            for one in weights:
                product(one)

        return run

    return Ready(bind, copies, nbytes)


def int8_weight(s: Shape) -> Tensor:
    return torch.randint(-127, 128, (s.n, s.k), dtype=torch.int8)


def make_float32(s: Shape) -> Ready:
    def call(m: int) -> Product:
        x = torch.randn(m, s.k)
        return lambda w: linear(x, w)

    return rotate(s, 4 * s.n * s.k, lambda: torch.randn(s.n, s.k), call)


def make_bfloat16(s: Shape) -> Ready:
    floats = torch.randn(s.n, s.k).bfloat16()

    def call(m: int) -> Product:
        x = torch.randn(m, s.k).bfloat16()
        return lambda w: OPS.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    # the layout is chosen for a number of rows; this is oneDNN's for many
    return rotate(s, 2 * s.n * s.k, lambda: OPS.mkldnn._reorder_linear_weight(floats, 64), call)


def make_dynamic(engine: str, s: Shape) -> Ready:
    scale, zero = torch.full((s.n,), SCALE), torch.zeros(s.n, dtype=torch.int64)
    torch.backends.quantized.engine = engine
    floats = int8_weight(s).float() * SCALE
    quantized = torch.quantize_per_channel(floats, scale.double(), zero, 0, torch.qint8)

    def call(m: int) -> Product:
        x = torch.randn(m, s.k)
        return lambda w: OPS.quantized.linear_dynamic(x, w, engine == "fbgemm")

    return rotate(s, s.n * s.k, lambda: OPS.quantized.linear_prepack(quantized, None), call)


def make_static(s: Shape) -> Ready:
    scale, zero = torch.full((s.n,), SCALE), torch.zeros(s.n, dtype=torch.int32)
    rest = (scale, zero, None, 1.0, 0, torch.float32, "none", [], "")

    def call(m: int) -> Product:
        x = torch.randint(0, 256, (m, s.k), dtype=torch.uint8)
        return lambda w: OPS.onednn.qlinear_pointwise(x, SCALE, 128, w, *rest)

    return rotate(s, s.n * s.k, lambda: OPS.onednn.qlinear_prepack(int8_weight(s), None), call)


def make_int8pack(s: Shape) -> Ready:
    scale = torch.full((s.n,), SCALE).bfloat16()

    def call(m: int) -> Product:
        x = torch.randn(m, s.k).bfloat16()
        return lambda w: torch._weight_int8pack_mm(x, w, scale)

    return rotate(s, s.n * s.k, lambda: int8_weight(s), call)


def make_int4pack(group: int, s: Shape) -> Ready:
    scales = torch.rand(s.k // group, s.n, 2).bfloat16()
    codes = torch.randint(0, 16, (s.n, s.k), dtype=torch.int32)
    packed = OPS.aten._convert_weight_to_int4pack_for_cpu(codes, 8)
    nbytes = s.n * s.k / 2 + s.n * s.k / group * 4

    def call(m: int) -> Product:
        x = torch.randn(m, s.k).bfloat16()
        return lambda w: OPS.aten._weight_int4pack_mm_for_cpu(x, w, group, scales)

    return rotate(s, nbytes, packed.clone, call)
