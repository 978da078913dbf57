"""onnxruntime-genai's generator: it samples (here: takes the likeliest) by itself."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as og

from contestants.llm import LlmService


class Service(LlmService):
    packages = ("onnxruntime-genai", "onnxruntime")

    def load(self, file: str, room: int) -> None:
        config = og.Config(file)
        options = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        # a token ends sequences; one that the random model does not choose
        config.overlay(json.dumps({"model": {"eos_token_id": 31_999, "decoder": {"session_options": options}}}))
        self.model, self.room = og.Model(config), room
        self.generator: og.Generator | None = None

    def forget(self) -> None:
        given = og.GeneratorParams(self.model)
        given.set_search_options(max_length=self.room, do_sample=False)
        self.generator = None  # frees its cache first
        self.generator = og.Generator(self.model, given)

    def read(self, ids: list[int]) -> int:
        assert self.generator is not None
        self.generator.append_tokens(np.array(ids, dtype=np.int32))
        return self.step(ids[-1])

    def step(self, token: int) -> int:
        assert self.generator is not None
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])
