"""The model card (README.md) of a quantized checkpoint: what was done, how to load it, what it cost each layer."""

from __future__ import annotations

from typing import Any

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.models.skeleton import build_skeleton
from bitgrain.pipeline.execution import why_no_kernels
from bitgrain.pipeline.plan import Plan

_BITSANDBYTES = """```python
from transformers import AutoModelForCausalLM   # needs the packages bitsandbytes and accelerate
model = AutoModelForCausalLM.from_pretrained("{folder}")
```"""
_ELSEWHERE = {
    "bnb-nf4": _BITSANDBYTES,
    "bnb-fp4": _BITSANDBYTES,
    "bnb-int8": _BITSANDBYTES,
    "mlx": """```sh
mlx_lm.generate --model {folder} --prompt "Once"
```""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM   # needs the package compressed-tensors
model = AutoModelForCausalLM.from_pretrained("{folder}")
```

vLLM: `vllm serve {folder}`""",
    **dict.fromkeys(
        ("gptq", "gptq-v2", "awq"),
        """```python
from gptqmodel import GPTQModel
model = GPTQModel.load("{folder}")
```

vLLM: `vllm serve {folder}`""",
    ),
    "bitgrain": "This checkpoint uses `quant_method: bitgrain`, which other engines refuse.",
}


def model_card(plan: Plan, manifest: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    done = [layer for layer in manifest["layers"] if layer["scheme"]]
    worst = sorted((layer for layer in done if layer["sqnr_db"] is not None), key=lambda layer: layer["sqnr_db"])
    schemes = {layer["scheme"]: layer for layer in done}
    engines = [
        f"| {v['engine']} {v['version']} | {'yes' if v['loads'] else 'no'} | {'; '.join(v['reasons'])} |"
        for v in manifest["engines"]
    ]
    lines = [
        "---",
        "base_model: " + plan.source.name,
        "library_name: transformers",
        "tags: [quantized, bitgrain, compressed-tensors]",
        "---",
        "",
        f"# {plan.source.name}, {' + '.join(schemes)}",
        "",
        f"Quantized with bitgrain {manifest['versions']['bitgrain']}, solver `{manifest['solver']}`, from "
        f"`{plan.source.name}`" + (f" at revision `{plan.source.revision}`" if plan.source.revision else "") + ".",
        "",
        "| | |",
        "|---|---|",
        f"| size | {format_bytes(manifest['bytes_after'])}, before {format_bytes(manifest['bytes_before'])} |",
        f"| bits per weight | {manifest['bits_per_weight']:.3f} in quantized layers, scales included; "
        f"{manifest['bits_per_parameter']:.3f} over all parameters |",
        *(
            f"| {name} | weight {layer['weight']}; input {layer['input'] or 'as it is'} |"
            for name, layer in schemes.items()
        ),
        f"| parameters | {', '.join(f'{count:,} {name}' for name, count in manifest['coverage'].items())} |",
        "",
        *(f"- {note}" for note in manifest["notes"]),
        "",
        "## How to load it",
        "",
        *_loading(plan),
        "",
        _ELSEWHERE[manifest["layout"]].format(folder=_folder(plan)),
        "",
        "| engine | loads it | remark |",
        "|---|---|---|",
        *engines,
        "",
        "By the rules that these versions were read for; `bitgrain verify` checks this folder with transformers.",
        "",
        "## What it cost",
        "",
        "Signal-to-quantization-noise ratio of the weights, the ten worst layers (all are in `manifest.json`):",
        "",
        "| layer | scheme | SQNR dB | largest error |",
        "|---|---|---|---|",
        *(f"| {x['tensor']} | {x['scheme']} | {x['sqnr_db']:.2f} | {x['max_error']:.3g} |" for x in worst[:10]),
        "",
        "Weight error is not model error: measure that with `bitgrain eval OUT --against MODEL --text FILE`.",
        "",
    ]
    return "\n".join(lines)


def _folder(plan: Plan) -> str:
    """A name for the folder that the user is going to give."""
    return plan.source.name.rsplit("/", 1)[-1] + "-quantized"


def _loading(plan: Plan) -> list[str]:
    """How bitgrain loads it: packed, or dense where some layer has no kernel."""
    skeleton = build_skeleton(plan.config, plan.trust_remote_code)
    refused = why_no_kernels(skeleton, plan.anatomy, plan.quantized)
    how = "" if refused is None else ', execution="dequantize"'
    note = (
        "Packed weights run through kernels, on a CPU."
        if refused is None
        else f"Weights are dequantized as they are loaded: there is no kernel for {refused}."
    )
    return ["```python", "import bitgrain", f'model = bitgrain.load("{_folder(plan)}"{how})', "```", "", note]
