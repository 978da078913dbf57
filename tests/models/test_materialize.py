"""A model made of dense tensors with names on disk computes what the original computes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitgrain.errors import ModelError
from bitgrain.models import build_skeleton, load_config, load_dense_into, read_anatomy, resolve_model
from bitgrain.models.materialize import Weightless

TOKENS = torch.tensor([[1, 5, 9, 101, 7, 7, 64, 3]])


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def test_same_outputs_to_the_last_bit(any_tiny):
    model = load_dense_into(any_tiny.skeleton, any_tiny.config, any_tiny.tensors.items())
    assert not model.training
    assert torch.equal(outputs(model), outputs(any_tiny.model))
    assert {parameter.device.type for parameter in any_tiny.skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_sharded_checkpoints(save_zoo, tmp_path, name):
    checkpoint = save_zoo(name, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert checkpoint.anatomy.missing == checkpoint.anatomy.unexpected == ()
    model = load_dense_into(checkpoint.skeleton, checkpoint.config, checkpoint.tensors.items())
    assert torch.equal(outputs(model), outputs(checkpoint.model))


def test_the_outputs_do_not_depend_on_where_weights_lie_in_memory(tiny):
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return moved.copy_(tensor.flatten()).view(tensor.shape)

    granite = tiny("granite-moe")
    moved = {name: shifted(tensor) for name, tensor in granite.tensors.items()}
    model = load_dense_into(granite.skeleton, granite.config, moved.items())
    assert torch.equal(outputs(model), outputs(granite.model))


def test_the_config_is_left_alone(tiny):
    llama = tiny("llama")
    before = llama.config.to_dict()
    model = load_dense_into(llama.skeleton, llama.config, llama.tensors.items())
    assert llama.config.to_dict() == before
    assert model.config.name_or_path == llama.config.name_or_path != "None"


def test_dtype(tiny):
    llama = tiny("llama")
    model = load_dense_into(llama.skeleton, llama.config, llama.tensors.items(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tied_weights_are_one(tiny):
    llama = tiny("llama-tied")
    model = load_dense_into(llama.skeleton, llama.config, llama.tensors.items())
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_changed_weights_change_the_outputs(tiny):
    """Each matrix on disk is really used, also one expert's."""
    mixtral = tiny("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    changed = {**mixtral.tensors, name: 2 * mixtral.tensors[name]}
    model = load_dense_into(mixtral.skeleton, mixtral.config, changed.items())
    expected = mixtral.tensors[name]
    assert torch.equal(model.get_parameter("model.layers.0.mlp.experts.down_proj")[2], 2 * expected)


@pytest.mark.parametrize("name", ["llama", "stories260k"])
def test_trained_models(shared, name):
    source = resolve_model(shared / "models" / name)
    config = load_config(source)
    skeleton = build_skeleton(config)
    tensors = load_file(source.path / "model.safetensors")
    anatomy = read_anatomy(skeleton, tensors)
    assert anatomy.missing == anatomy.unexpected == ()
    model = load_dense_into(skeleton, config, tensors.items())
    twin = AutoModelForCausalLM.from_pretrained(source.path)
    torch.testing.assert_close(outputs(model), outputs(twin))


def test_faults_are_errors(tiny):
    llama = tiny("llama")
    key = "model.layers.1.self_attn.k_proj.weight"
    without = {name: tensor for name, tensor in llama.tensors.items() if name != key}
    with pytest.raises(ModelError, match=r"1 parameters without a tensor \(model\.layers\.1\.self_attn\.k_proj"):
        load_dense_into(llama.skeleton, llama.config, without.items())
    with pytest.raises(ModelError, match=r"1 tensors that it does not know \(model\.strange\)"):
        load_dense_into(llama.skeleton, llama.config, {**llama.tensors, "model.strange": TOKENS}.items())
    with pytest.raises(ModelError, match="1 tensors of another shape"):
        load_dense_into(llama.skeleton, llama.config, {**llama.tensors, key: torch.zeros(3, 64)}.items())
    mixtral = tiny("mixtral")
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    with pytest.raises(ModelError, match="do not fit MixtralForCausalLM"):
        load_dense_into(mixtral.skeleton, mixtral.config, {**mixtral.tensors, expert: torch.zeros(3, 64)}.items())


def test_what_takes_the_place_of_weights_takes_no_memory():
    zeros = [Weightless.of((300, 200), torch.float32) for _ in range(4)]
    assert zeros[0].device.type == "cpu"
    joined = torch.stack([torch.cat([a, b], 1) for a, b in zip(zeros[:2], zeros[2:], strict=True)])
    for made in (joined, joined.to(torch.bfloat16), joined.transpose(1, 2).contiguous(), joined[1].clone()):
        assert isinstance(made, Weightless)
        assert made.untyped_storage().nbytes() == made.dtype.itemsize
    assert joined.shape == (2, 300, 400)
    assert joined.to("cpu", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mixtral", "llama-tied", "gpt-oss"])
def test_a_model_without_weights(tiny, name):
    checkpoint = tiny(name)
    zeros = ((name, Weightless.of(one.shape, one.dtype)) for name, one in checkpoint.tensors.items())
    model = load_dense_into(checkpoint.skeleton, checkpoint.config, zeros, dtype=torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.untyped_storage().nbytes() == 2
