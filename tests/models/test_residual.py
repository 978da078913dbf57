"""Readers and writers of the residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitgrain.models.pairs import find_pairs
from bitgrain.models.residual import find_stream
from block_views import Blocks, build


@pytest.mark.parametrize(
    ("name", "writers", "biases"),
    [
        ("llama", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}, set()),
        ("mixtral", {"self_attn.o_proj.weight", "mlp.experts.down_proj"}, set()),
        ("gpt2", {"attn.c_proj.weight", "mlp.c_proj.weight"}, {"attn.c_proj.bias", "mlp.c_proj.bias"}),
        (
            "gpt-oss",
            {"self_attn.o_proj.weight", "mlp.experts.down_proj"},
            {"self_attn.o_proj.bias", "mlp.experts.down_proj_bias"},
        ),
    ],
)
def test_blocks(name: str, writers: set[str], biases: set[str]):
    stream = Blocks(build(name)).view().stream
    assert stream is not None
    assert (stream.hidden, set(stream.writers), set(stream.biases)) == (128, writers, biases)
    assert len(stream.norms) == 2
    assert stream.centred == (name == "gpt2")
    stored_turned = {"gpt2": writers, "gpt-oss": {"mlp.experts.down_proj"}}
    assert stream.transposed == stored_turned.get(name, set())
    assert stream.doubt == ""


def test_outside():
    stream = Blocks(build("gpt2", tie_word_embeddings=False)).outside().stream
    assert set(stream.writers) == {"transformer.wte.weight", "transformer.wpe.weight"} == stream.transposed
    (norm,) = stream.norms
    assert (norm.writer, norm.readers, norm.bias) == ("transformer.ln_f", ("lm_head.weight",), "transformer.ln_f.bias")


class _Latent(nn.Module):
    """Something between two norms that happens to be as wide as the stream, and a writer behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.RMSNorm(8), nn.RMSNorm(4)
        self.a, self.b, self.out = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 8)
        self.behind, self.last = nn.RMSNorm(6), nn.Linear(6, 8)
        self.c = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(torch.tanh(self.b(self.inner(self.a(y)))))
        return x + self.last(self.behind(self.c(y)))


def test_what_reads_an_inner_norm_writes_only_if_it_is_added():
    torch.manual_seed(0)
    block, x = _Latent(), torch.randn(30, 8)

    def run() -> Tensor:
        return block(x)

    stream = find_stream(block, run, find_pairs(block, run))
    assert set(stream.writers) == {"out.weight", "last.weight"}
    assert [pair.writer for pair in stream.norms] == ["norm"]
