"""transformers as it is: `generate` and forward of a model in bfloat16 or float32 (KIND of the file: FOLDER:DTYPE)."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import transformers

from contestants.llm import LlmService, prompt_of

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
Model = Any


class Ticks(transformers.generation.streamers.BaseStreamer):
    """When each token of `generate` came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Service(LlmService):
    packages = ("torch", "transformers")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)

    def load(self, file: str, room: int) -> None:
        folder, _, dtype = file.rpartition(":")
        self.serve(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)))

    def serve(self, model: Model) -> None:
        """Use this model from now on."""
        self.model = model.eval()
        self.model.generation_config.eos_token_id = None  # all contestants take as many steps

    def prefill(self, tokens: int) -> float:
        ids = torch.tensor([prompt_of(tokens)])
        with torch.inference_mode():
            began = time.perf_counter()
            int(self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            return time.perf_counter() - began

    def decode(self, prompt: int, tokens: int) -> dict[str, Any]:
        """`generate`: from its first new token to its last."""
        ids, ticks = torch.tensor([prompt_of(prompt)]), Ticks()
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, do_sample=False, streamer=ticks
        )
        # the streamer is given the prompt first
        return {"seconds": ticks.times[-1] - ticks.times[1], "tokens": found[0, prompt:].tolist()}
