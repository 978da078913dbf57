"""llama.cpp through the C functions of llama-cpp-python: no sampler, no tokenizer."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np

from contestants.llm import LlmService


class Service(LlmService):
    packages = ("llama-cpp-python",)

    def load(self, file: str, room: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp did not load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = room, room, 512
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, ids: list[int]) -> int:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise ValueError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.words,)).argmax())

    def step(self, token: int) -> int:
        return self.read([token])
