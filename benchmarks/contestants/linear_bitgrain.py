"""bitgrain's kernels, at the seam where the runtime calls them: outputs are written where the caller says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bitgrain.kernels.code_linear import CodeLinear
from bitgrain.kernels.float_inputs import FloatInputs
from bitgrain.kernels.int_linear import IntInputs, IntLinear
from bitgrain.kernels.memory import large_memory
from bitgrain.kernels.native import DTYPES, isa
from bitgrain.kernels.probes import measure_bandwidth, measure_bf16_peak, measure_int8_peak
from contestants.linear import LinearService, Ready, Shape

GROUP = 128
PROBE_BYTES = 256 << 20
Layer = IntLinear | CodeLinear


class Service(LinearService):
    packages = ("bitgrain", "torch")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        self.memory = large_memory(PROBE_BYTES).fill_(1)
        self.makers = {
            "W8A8": partial(self.make_ready, torch.float32, partial(int_weight, 8)),
            "W4A8 g128": partial(self.make_ready, torch.float32, partial(int_weight, 4)),
            "W3A8 g128": partial(self.make_ready, torch.float32, partial(int_weight, 3)),
            "W2A8 g128": partial(self.make_ready, torch.float32, partial(int_weight, 2)),
            "W4A16 g128": partial(self.make_ready, torch.bfloat16, partial(code_weight, 4)),
            "W3A16 g128": partial(self.make_ready, torch.bfloat16, partial(code_weight, 3)),
            "W2A16 g128": partial(self.make_ready, torch.bfloat16, partial(code_weight, 2)),
            "W8A16 fp8": partial(self.make_ready, torch.bfloat16, partial(fp8_weight, None)),
            "W8A8 fp8": partial(self.make_ready, torch.bfloat16, partial(fp8_weight, FloatInputs("fp8_e4m3"))),
        }

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "instructions": isa()}

    def probe(self) -> dict[str, float]:
        """Bytes read per second; products per second of bytes and of bfloat16."""
        return {
            "bandwidth": measure_bandwidth(self.memory, self.threads),
            "int8": measure_int8_peak(self.threads),
            "bf16": measure_bf16_peak(self.threads),
        }

    def make_ready(self, dtype: torch.dtype, pack: Callable[[int, int], Layer], s: Shape) -> Ready:
        first = pack(s.n, s.k)
        copies, kind = s.copies(first.panels.nbytes), DTYPES[dtype]
        layers = [first, *(pack(s.n, s.k) for _ in range(1, copies))]

        def bind(m: int) -> Callable[[], object]:
            x, y = torch.randn(m, s.k).to(dtype), torch.empty(m, s.n, dtype=dtype)
            arguments = (x.data_ptr(), kind, m, s.k, y.data_ptr(), kind, s.n, self.threads)
            calls = [layer.handle.run for layer in layers]

            def run() -> object:
                for call in calls:
                    call(*arguments)
                return layers, x, y  # all kept

            return run

        return Ready(bind, copies, first.panels.nbytes)


def int_weight(bits: int, n: int, k: int) -> IntLinear:
    """Random codes; 8 bits: a scale for each row, float32; fewer: for each 128 of a row, bfloat16."""
    if bits == 8:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return IntLinear.pack(codes, torch.full((n, 1), 0.01), bits, IntInputs())
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.full((n, k // GROUP), 0.01, dtype=torch.bfloat16)
    return IntLinear.pack(codes, scale, bits, IntInputs(), zero=2 ** (bits - 1))


def code_weight(bits: int, n: int, k: int) -> CodeLinear:
    """Random codes of integers around 0."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.full((n, k // GROUP), 0.01, dtype=torch.bfloat16)
    table = [float(i - 2 ** (bits - 1)) for i in range(2**bits)]
    return CodeLinear.pack(codes, scale, bits, table, group=GROUP)


def fp8_weight(inputs: FloatInputs | None, n: int, k: int) -> CodeLinear:
    """Random numbers in E4M3 with a scale for each row, float32."""
    codes = torch.randn(n, k).mul_(60).to(torch.float8_e4m3fn)
    return CodeLinear.pack(codes.view(torch.uint8), torch.full((n, 1), 1e-4), 8, codes.dtype, inputs=inputs)
