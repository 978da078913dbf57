"""A model run block by block: the same bits as the whole model, in the memory of one block."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zoo
from bitgrain.errors import ModelError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.materialize import load_dense_into
from bitgrain.models.naming import convert_tensors
from bitgrain.models.skeleton import build_skeleton
from bitgrain.models.stream import Call, Captured, StreamedModel, share_calls, twin

SMALL: dict[str, Any] = {"d_model": 32, "vocab_size": 64, "pad_token_id": 0}
T5: dict[str, Any] = {**SMALL, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
PART = {"layers": 2, "ffn_dim": 64, "attention_heads": 4}
BART: dict[str, Any] = {**SMALL, **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in PART.items()}}
ALBERT: dict[str, Any] = {
    "vocab_size": 64,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def with_eager_experts(config: Any) -> Any:
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # the job asks for it too: one product for each expert
    return config


def streamed(checkpoint: Any) -> StreamedModel:
    skeleton = build_skeleton(with_eager_experts(checkpoint.config))
    return StreamedModel(skeleton, checkpoint.anatomy, checkpoint.tensors.__getitem__)


def whole(checkpoint: Any) -> Any:
    config = with_eager_experts(checkpoint.config)
    return load_dense_into(checkpoint.skeleton, config, checkpoint.tensors.items(), dtype=torch.float32)


def in_memory(class_name: str, settings: dict[str, Any]) -> StreamedModel:
    """The same for an architecture that is not in the zoo."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    tensors = model.state_dict()
    model.config.architectures = [class_name]
    skeleton = build_skeleton(model.config)
    names = {name for name, _ in skeleton.named_parameters()}  # one of each tied group
    tensors = {name: tensor for name, tensor in tensors.items() if name in names}
    return StreamedModel(skeleton, read_anatomy(skeleton, tensors), tensors.__getitem__)


@torch.no_grad()
def through_the_blocks(stream: StreamedModel, captured: Captured) -> torch.Tensor:
    hidden = captured.hidden
    for index in range(len(stream.anatomy.block_names)):
        stream.load_block(index)
        hidden = stream.run(index, hidden, captured.calls[index])
        stream.free_block(index)
    return hidden


def test_block_by_block_equals_the_whole_model_bit_for_bit(tiny: Callable[[str], Any], zoo_name: str):
    checkpoint = tiny(zoo_name)
    stream, model = streamed(checkpoint), whole(checkpoint)
    ids = zoo.ids_for(model)
    captured = stream.capture(ids)
    assert sorted(captured.calls) == [0, 1]
    output = stream.tail(ids, through_the_blocks(stream, captured))
    logits = getattr(output, "logits", None)
    assert torch.equal(output.last_hidden_state if logits is None else logits, zoo.outputs(model, ids))
    # batches of other sizes go the same way
    shorter = stream.capture(ids[:1, :9])
    output = stream.tail(ids[:1, :9], through_the_blocks(stream, shorter))
    logits = getattr(output, "logits", None)
    assert torch.equal(output.last_hidden_state if logits is None else logits, zoo.outputs(model, ids[:1, :9]))


def test_only_what_is_loaded_takes_memory(tiny: Callable[[str], Any], zoo_name: str):
    stream = streamed(tiny(zoo_name))

    def on_meta(module: nn.Module) -> set[bool]:
        return {parameter.is_meta for parameter in module.parameters()}

    stream.capture(torch.zeros(1, 4, dtype=torch.int64))
    blocks = [stream.block(0), stream.block(1)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert [on_meta(block) for block in blocks] == [{True}, {True}]
    assert not any(one.is_meta for one in stream.model.parameters() if id(one) not in inside)
    assert not any(buffer.is_meta for buffer in stream.model.buffers())
    assert stream.load_block(1) is blocks[1]
    assert [on_meta(block) for block in blocks] == [{True}, {False}]
    assert all(one.dtype == torch.float32 and one.data_ptr() % 64 == 0 for one in blocks[1].parameters())
    storages = [one.untyped_storage().data_ptr() for one in blocks[1].parameters()]
    assert len(set(storages)) == len(storages)  # a Watch tells weights by their memory
    shapes = {name: one.shape for name, one in blocks[1].named_parameters()}
    stream.free_block(1)
    assert on_meta(blocks[1]) == {True}
    assert {name: one.shape for name, one in blocks[1].named_parameters()} == shapes
    assert "forward" not in vars(blocks[0])


def test_names_are_those_of_the_block(tiny: Callable[[str], Any]):
    checkpoint = tiny("mixtral")
    stream = streamed(checkpoint)
    names = [stream.names(index) for index in (None, 0, 1)]
    assert sorted(name for group in names for name in group) == sorted(checkpoint.tensors)
    assert all(name.startswith("model.layers.1.") for name in names[2])
    assert stream.names(7) == []


def test_put_changes_the_next_run(tiny: Callable[[str], Any]):
    stream = streamed(tiny("llama"))
    captured = stream.capture(torch.arange(6)[None])
    block = stream.load_block(0)
    before = stream.run(0, captured.hidden, captured.calls[0])
    name = "model.layers.0.mlp.down_proj.weight"
    stream.put({name: torch.zeros(64, 96, dtype=torch.float16)})
    assert block.get_parameter("mlp.down_proj.weight").dtype == torch.float32
    without = stream.run(0, captured.hidden, captured.calls[0])
    assert not torch.equal(before, without)
    twins = twin(block)
    nn.init.ones_(twins.get_parameter("mlp.down_proj.weight"))
    assert torch.equal(stream.run(0, captured.hidden, captured.calls[0]), without)
    assert not torch.equal(stream.run(0, captured.hidden, captured.calls[0], twins), without)


def test_tied_embeddings_are_one_tensor(tiny: Callable[[str], Any]):
    """What is put under the one name on disk is what the head computes with."""
    stream = streamed(tiny("llama-tied"))
    assert "lm_head.weight" not in tiny("llama-tied").tensors
    embedding = stream.model.get_parameter("model.embed_tokens.weight")
    assert stream.model.get_parameter("lm_head.weight") is embedding
    stream.put({"model.embed_tokens.weight": 2 * embedding.detach()})
    changed = stream.model.get_parameter("lm_head.weight")
    assert torch.equal(changed, 2 * embedding)
    assert stream.model.get_parameter("model.embed_tokens.weight") is changed


def test_the_tail_can_be_differentiated(tiny: Callable[[str], Any]):
    stream = streamed(tiny("llama"))
    ids = torch.arange(5)[None]
    hidden = stream.capture(ids).hidden.requires_grad_(True)
    assert not stream.tail(ids, hidden).logits.requires_grad
    stream.tail(ids, hidden, grad=True).logits.sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.abs().sum() > 0)


def test_masks_and_positions_are_shared_between_blocks_and_batches(tiny: Callable[[str], Any]):
    stream = streamed(tiny("gemma3"))
    ids = torch.randint(0, 128, (6, 12), generator=torch.Generator().manual_seed(0))
    batches = [stream.capture(part) for part in ids.split(2)] + [stream.capture(ids[:2, :7])]
    before = [copy.deepcopy(batch.calls) for batch in batches]
    share_calls(batches)

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, dict):
            value = tuple(value.values())
        if isinstance(value, tuple | list):
            return [tensor for one in value for tensor in tensors(one)]
        return [value] if isinstance(value, torch.Tensor) else []

    def all_of(calls: dict[int, Call]) -> list[torch.Tensor]:
        return [tensor for call in calls.values() for tensor in tensors([call.args, call.kwargs])]

    for batch, old in zip(batches, before, strict=True):
        new = all_of(batch.calls)
        assert len(new) == len(all_of(old)) > 2
        assert all(torch.equal(a, b) for a, b in zip(new, all_of(old), strict=True))
    assert [id(tensor) for tensor in all_of(batches[0].calls)] == [id(tensor) for tensor in all_of(batches[2].calls)]
    distinct = {id(tensor): tensor for batch in batches for tensor in all_of(batch.calls)}
    pairs = [(a, b) for a in distinct.values() for b in distinct.values() if a is not b]
    assert not any(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    stream.load_block(1)
    with torch.no_grad():
        one = stream.run(1, batches[1].hidden, batches[1].calls[1])
        assert torch.equal(one, stream.run(1, batches[1].hidden, before[1][1]))


@pytest.mark.parametrize(("name", "settings"), [("T5ForConditionalGeneration", T5), ("BartModel", BART)])
def test_encoder_decoders_are_refused(name: str, settings: dict[str, Any]):
    with pytest.raises(ModelError, match=f"{name} is an encoder and a decoder.*needs no calibration"):
        in_memory(name, settings)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    """T5's first block computes position biases for all others: without them the blocks would run, and be wrong."""
    stream = in_memory("T5EncoderModel", T5)
    with pytest.raises(ModelError, match=r"encoder\.block\.1 is given more than hidden states"):
        stream.capture(torch.arange(6)[None])


def test_blocks_that_are_run_twice_are_refused():
    stream = in_memory("AlbertModel", ALBERT)
    with pytest.raises(ModelError, match=r"encoder\.albert_layer_groups\.0 is run more than once"):
        stream.capture(torch.arange(6)[None])
    assert "forward" not in vars(stream.block(0))  # it can be used as before


def test_a_model_without_blocks_is_refused(tiny: Callable[[str], Any]):
    checkpoint = tiny("llama")
    bare = copy.copy(checkpoint.anatomy)
    object.__setattr__(bare, "block_names", ())
    with pytest.raises(ModelError, match="LlamaForCausalLM has no repeated blocks"):
        StreamedModel(build_skeleton(checkpoint.config), bare, checkpoint.tensors.__getitem__)


def test_buffers_of_a_nested_model_are_filled_by_it(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Any]):
    """Rotary frequencies belong to the inner model; the outer one may not know how to fill them (Gemma 3n)."""
    asked: list[str] = []
    real = transformers.LlamaPreTrainedModel._init_weights

    def noted(self: Any, module: nn.Module) -> None:
        asked.append(type(self).__name__)
        real(self, module)

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", noted)
    streamed(tiny("llama"))
    assert set(asked) == {"LlamaModel"}


def test_convert_is_what_put_uses(tiny: Callable[[str], Any]):
    """Tensors that are joined in memory come together, or the model says which are missing."""
    checkpoint = tiny("mixtral")
    stream = streamed(checkpoint)
    names = [name for name in stream.names(0) if ".experts." in name]
    found = convert_tensors(stream.model, {name: checkpoint.tensors[name] for name in names})
    stream.put({name: checkpoint.tensors[name] for name in names})
    for name, tensor in found.items():
        assert torch.equal(stream.model.get_parameter(name), tensor)
