"""The files that the peers read, from one Hugging Face folder: `python -m contestants.llm_files KIND SOURCE OUT`.

Runs in the peers' own Python. KIND names a file of `KINDS`; all weights of SOURCE are quantized by the peer's own tool
with its own defaults for a language model, except where `KINDS` says more. OUT appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CONTEXT = 2048
# GGUF's names of a block's tensors
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensors(source: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(GGUF name, torch tensor); rotary pairs of q and k lie side by side there, half a head apart in SOURCE."""
    from safetensors import safe_open

    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor, stem = tensors.get_tensor(name), name.removesuffix(".weight")
                if stem in outer:
                    yield f"{outer[stem]}.weight", tensor
                    continue
                _, _, layer, part = stem.split(".", 3)
                if part in ("self_attn.q_proj", "self_attn.k_proj"):
                    kind = "num_attention_heads" if part == "self_attn.q_proj" else "num_key_value_heads"
                    heads, width = config[kind], tensor.shape[1]
                    tensor = tensor.view(heads, 2, -1, width).transpose(1, 2).reshape(-1, width)
                yield f"blk.{layer}.{GGUF_NAMES[part]}.weight", tensor


def write_bf16_gguf(source: Path, out: Path) -> None:
    """A GGUF file of SOURCE's own bfloat16 weights, without a vocabulary."""
    import gguf
    import torch

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in gguf_tensors(source, config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            shape, kind = list(tensor.shape), gguf.GGMLQuantizationType.BF16
            data = tensor.contiguous().view(torch.uint8).numpy()
            assert data.shape == (shape[0], 2 * shape[1])
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(file_type: str, source: Path, out: Path) -> None:
    """llama.cpp's own quantizer on the bfloat16 file."""
    import llama_cpp

    whole = out.with_name(out.name + ".bf16")
    try:
        write_bf16_gguf(source, whole)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        parameters.nthread = 2
        status = llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), parameters)
        if status != 0:
            raise ValueError(f"llama.cpp did not quantize to {file_type} (status {status})")
    finally:
        whole.unlink(missing_ok=True)


def write_openvino(mode: str, options: dict[str, Any], source: Path, out: Path) -> None:
    """optimum-intel's export with a stateful KV cache, weights compressed by NNCF."""
    import nncf
    import openvino
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    whole = out.with_name(out.name + ".whole")
    try:
        # a configuration keeps the export from compressing by itself
        main_export(str(source), whole, task="text-generation-with-past", ov_config=OVConfig(dtype="fp16"))
        model = openvino.Core().read_model(whole / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)
        out.mkdir()
        openvino.save_model(model, out / "openvino_model.xml")
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def write_onnxruntime(options: dict[str, Any], source: Path, out: Path) -> None:
    """onnxruntime-genai's model builder; it wants a tokenizer beside the weights, so it is given one of two words."""
    given = out.with_name(out.name + ".source")
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir()
    try:
        for file in source.iterdir():
            (given / file.name).symlink_to(file.resolve())
        write_tokenizer(given)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", given, "-o", out, "-p", "int4"]
        command += ["-e", "cpu", "-c", given / "cache", "--extra_options"]
        subprocess.run([*command, *(f"{key}={value}" for key, value in options.items())], check=True)
    finally:
        shutil.rmtree(given)


def write_tokenizer(folder: Path) -> None:
    """The smallest tokenizer that transformers loads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "q4_0.gguf": partial(write_gguf, "Q4_0"),
    "q4_k_m.gguf": partial(write_gguf, "Q4_K_M"),
    "q8_0.gguf": partial(write_gguf, "Q8_0"),
    # every matrix in 4 bits but embedding and head, which NNCF keeps in 8
    "openvino-int4-sym": partial(write_openvino, "INT4_SYM", {"group_size": 128, "ratio": 1.0}),
    "openvino-int4-asym": partial(write_openvino, "INT4_ASYM", {"group_size": 128, "ratio": 1.0}),
    "openvino-int8": partial(write_openvino, "INT8_ASYM", {}),
    "onnxruntime-genai-int4": partial(write_onnxruntime, {"accuracy_level": 4, "block_size": 32}),
}


def main() -> None:
    kind, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    KINDS[kind](source, part)
    part.rename(out)


if __name__ == "__main__":
    main()
