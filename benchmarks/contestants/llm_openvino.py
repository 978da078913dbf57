"""OpenVINO's stateful model, driven without a pipeline around it."""

from __future__ import annotations

import numpy as np
import openvino

from contestants.llm import LlmService


class Service(LlmService):
    packages = ("openvino", "optimum-intel", "nncf")

    def load(self, file: str, room: int) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
        }
        compiled = openvino.Core().compile_model(f"{file}/openvino_model.xml", "CPU", settings)
        self.inputs = {name for given in compiled.inputs for name in given.names}
        self.request = compiled.create_infer_request()
        self.past = 0

    def forget(self) -> None:
        self.request.reset_state()
        self.past = 0

    def read(self, ids: list[int]) -> int:
        past, total = self.past, self.past + len(ids)
        given = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in given.items() if name in self.inputs})
        self.past = total
        return int(self.request.get_output_tensor(0).data[0, -1].argmax())

    def step(self, token: int) -> int:
        return self.read([token])
