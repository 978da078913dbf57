"""What each engine loads, as data: one `Rules` for each engine and the layouts that it reads.

Read from the engines' own sources at the versions given (transformers' compressed-tensors also found by loading every
scheme). Where a kernel's limits were not plain, a row says less than may work. `pipeline.engines` judges by them.
A row speaks of one family of kernels on the hardware that the engine is mostly run on; a remark names narrower ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitgrain.models.anatomy import Role
from bitgrain.numerics.spec import ZeroPoint


@dataclass(frozen=True)
class Engine:
    """version: the release, or the commit and its day, that the rules were read from; empty for bitgrain itself."""

    name: str
    version: str = ""


@dataclass(frozen=True)
class Inputs:
    """Quantized inputs that a kernel takes; formats and tiles as for `Kernel`, a channel is a token."""

    format: str
    tiles: tuple[str, ...]
    dynamic: bool
    zeros: tuple[ZeroPoint, ...] = ("none",)
    threshold: bool = False


@dataclass(frozen=True)
class Kernel:
    """Quantized layers that an engine runs.

    formats    names of `numerics.formats`; int4 stands for uint4 as well
    tiles      of the weight: tensor, channel, group, block; groups: the sizes of groups, empty for any
    zeros      kinds of zero point; ordered: whether groups may be of columns in an order of their own (act-order)
    inputs     quantized inputs, None for inputs as they are
    scales     storages: names of formats, "nested" for scales of scales; empty for any
    roles      of the layer in the model
    outputs, features: what the numbers of outputs and inputs must be divisible by
    remark     what is to be known where this one is used; {bits} is the weight's
    """

    formats: tuple[str, ...]
    tiles: tuple[str, ...]
    groups: tuple[int, ...] = ()
    zeros: tuple[ZeroPoint, ...] = ("none",)
    ordered: bool = False
    inputs: tuple[Inputs | None, ...] = (None,)
    scales: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ("linear",)
    outputs: int = 1
    features: int = 1
    remark: str = ""


@dataclass(frozen=True)
class Case:
    """`text` about the layers that are all of what is given; empty and None stand for any.

    asymmetric: with zero points; inputs: the format of quantized inputs, "any" of them; beside: in a checkpoint with
    several schemes.
    """

    text: str
    roles: tuple[Role, ...] = ()
    formats: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    asymmetric: bool | None = None
    inputs: str = ""
    dynamic: bool | None = None
    beside: bool = False


@dataclass(frozen=True)
class Rules:
    """How `engine` reads `layouts`: a layer loads where no case of `refused` speaks of it and one of `kernels` runs it.

    joins    whether q, k and v, gate and up become one matrix, so that they must share a scheme
    remarks  what it does differently; needs: a package that it needs for this; why: of layouts that it does not read
    """

    engine: Engine
    layouts: tuple[str, ...]
    kernels: tuple[Kernel, ...] = ()
    joins: bool = False
    refused: tuple[Case, ...] = ()
    remarks: tuple[Case, ...] = ()
    needs: str = ""
    why: str = ""


VLLM = Engine("vLLM", "0.33.0")
SGLANG = Engine("SGLang", "0.5.23")
TRANSFORMERS = Engine("transformers", "5.24.0")
LLAMA_CPP = Engine("llama.cpp", "0c1e570 (2026-10-01)")
ONNXRUNTIME = Engine("onnxruntime", "1.32.0")
GPTQMODEL = Engine("GPTQModel", "7.7.0")
MLX = Engine("mlx-lm", "0.32.2")
BITGRAIN = Engine("bitgrain")

_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_TILES = ("tensor", "channel", "group", "block")
_ROWS = ("channel", "group")
_ALL_ZEROS: tuple[ZeroPoint, ...] = ("none", "integer", "real", "minimum")
_AFFINE: tuple[ZeroPoint, ...] = ("none", "integer")
_LINEARS: tuple[Role, ...] = ("linear", "lm_head")
_MATRICES: tuple[Role, ...] = ("linear", "lm_head", "expert")
_ALL_ROLES: tuple[Role, ...] = ("linear", "lm_head", "expert", "embedding", "router")
_MARLIN = (32, 64, 128)

_INT8_TOKEN = Inputs("int8", ("channel",), True)
_INT8_TENSOR = Inputs("int8", ("tensor",), False, _AFFINE)
_FP8 = (Inputs("fp8_e4m3", _TILES, True), Inputs("fp8_e4m3", ("tensor",), False))
_FP4 = Inputs("fp4_e2m1", ("group",), True)
_ONNX_INPUTS = (_INT8_TOKEN, _INT8_TENSOR, *_FP8, *(Inputs(f"int{bits}", ("channel",), True) for bits in (4, 16)))

# Static scales of a fused layer are the members' largest, so W8A8 takes them in both; experts are run with one scheme.
_W8A8 = Kernel(("int8",), ("tensor", "channel"), inputs=(_INT8_TOKEN, _INT8_TENSOR), roles=_LINEARS)
_W8A8_EXPERTS = Kernel(("int8",), ("channel",), inputs=(_INT8_TOKEN,), roles=("expert",))
_FP8_WEIGHTS = Kernel(("fp8_e4m3",), ("tensor", "channel", "block"), inputs=(None, *_FP8), roles=_LINEARS)
_FP8_EXPERTS = replace(_FP8_WEIGHTS, inputs=_FP8, roles=("expert",))
_FP4_WEIGHTS = Kernel(("fp4_e2m1",), ("group",), (16,), inputs=(None, _FP4), roles=("linear", "expert"), features=32)
_MXFP4_WEIGHTS = replace(_FP4_WEIGHTS, groups=(32,))

# Humming, which vLLM installs beside its own kernels on NVIDIA GPUs, takes the widths that Marlin does not.
_HUMMING = Kernel(
    _INTEGERS,
    _ROWS,
    _MARLIN,
    _AFFINE,
    remark="{bits}-bit weights like these run in its Humming kernels, on NVIDIA GPUs",
)
_VLLM_INTEGERS = (
    # Marlin pads sizes that do not fit its tiles, of experts only one of the two
    Kernel(("int4",), _ROWS, _MARLIN, _AFFINE, roles=_LINEARS),
    Kernel(("int8",), _ROWS, _MARLIN, roles=_LINEARS),
    Kernel(("int4",), _ROWS, _MARLIN, _AFFINE, roles=("expert",), outputs=64, features=128),
    Kernel(("int8",), _ROWS, _MARLIN, roles=("expert",), outputs=64, features=128),
    Kernel(("int4", "int8"), _ROWS, _MARLIN, _AFFINE, roles=("embedding",)),
)
_VLLM_MORE = (
    _HUMMING,
    replace(_HUMMING, formats=_INTEGERS[:-1], inputs=(_INT8_TOKEN,)),
    Kernel(
        *(("int4",), ("group",), (128,)),
        inputs=(Inputs("fp8_e4m3", ("channel",), True),),
        outputs=128,
        features=128,
        remark="int4 weights with FP8 activations run on Hopper GPUs only",
    ),
    *(_W8A8, _W8A8_EXPERTS, _FP8_WEIGHTS, _FP8_EXPERTS, _FP4_WEIGHTS, _MXFP4_WEIGHTS),
)
# SGLang's Marlin does not pad; its asymmetric kernel knows 4 bits only
_SGLANG_MARLIN = (
    Kernel(("int4",), _ROWS, _MARLIN, _AFFINE, roles=_MATRICES, outputs=64, features=128),
    Kernel(("int8",), _ROWS, _MARLIN, roles=_MATRICES, outputs=64, features=128),
)
_SYMMETRIC_MARLIN = tuple(replace(kernel, zeros=("none",)) for kernel in _SGLANG_MARLIN)

_BLOCKS = Kernel(("int4", "int5", "int8"), ("group",), (32,), scales=("float16",), roles=_ALL_ROLES[:-1], features=32)
_SUPER = replace(_BLOCKS, scales=("nested",), features=256)
_GGUF = (
    _BLOCKS,  # Q4_0, Q5_0, Q8_0
    replace(_BLOCKS, formats=("int4", "int5"), zeros=("minimum",)),  # Q4_1, Q5_1
    replace(_BLOCKS, formats=("iq4_nl",)),
    replace(_SUPER, formats=("iq4_nl",)),  # IQ4_XS
    replace(_SUPER, formats=("int4", "int5"), zeros=("minimum",)),  # Q4_K, Q5_K
    replace(_SUPER, formats=("int2",), groups=(16,), zeros=("minimum",)),  # Q2_K
    replace(_SUPER, formats=("int3", "int6"), groups=(16,)),  # Q3_K, Q6_K
)
_GGUF_MORE = (
    replace(_BLOCKS, formats=("fp4_e2m1",), scales=("e8m0",)),  # MXFP4
    replace(_BLOCKS, formats=("ternary",), groups=(256,), features=256),  # TQ2_0
)
_GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_GPTQ = Kernel(("int2", "int3", "int4", "int8"), _ROWS, _GPTQ_GROUPS, _AFFINE, ordered=True)
_AWQ = Kernel(("int4",), _ROWS, (16, 32, 64, 128), _AFFINE, outputs=8)
_BNB_4BIT = Kernel(("nf4", "bnb_fp4"), ("group",), (32, 64, 128, 256, 512, 1024, 2048, 4096))
_BNB_INT8 = Kernel(("int8",), ("channel",), inputs=(None, replace(_INT8_TOKEN, threshold=True), _INT8_TOKEN))
_BNB = ("bnb-nf4", "bnb-fp4", "bnb-int8")
_BNB_INPUTS = Case("bitsandbytes rounds the inputs of int8 layers to int8 as well", formats=("int8",), inputs="none")
_TORCHAO = (
    Kernel(("int4",), ("group",), (32, 64, 128, 256), _ALL_ZEROS),
    Kernel(("int8",), _ROWS, inputs=(None, _INT8_TOKEN)),
    Kernel(("fp8_e4m3",), ("tensor", "channel"), inputs=(None, *_FP8)),
)
_ANY = Kernel(
    (*_INTEGERS, "fp8_e4m3", "fp4_e2m1"),
    _TILES,
    zeros=_AFFINE,
    inputs=(None, _INT8_TOKEN, _INT8_TENSOR, replace(_INT8_TOKEN, tiles=_TILES), *_FP8, _FP4),
    roles=(*_MATRICES, "router"),
)
_BESIDE = "it cannot load packed zero points beside another scheme or quantized activations"
_NVFP4_EXPERTS = "it reads NVFP4 experts without their global scale, silently wrong"
_FOREIGN_V1 = "it takes v1 with zero points from no other program: write gptq-v2"
_OWN = "quant_method bitgrain is read by bitgrain.load only"

RULES: tuple[Rules, ...] = (
    Rules(
        VLLM,
        ("compressed-tensors",),
        (*_VLLM_INTEGERS, *_VLLM_MORE),
        joins=True,
        refused=(Case("W4A8 experts run on Arm CPUs only", roles=("expert",), formats=("int4",), inputs="int8"),),
    ),
    # The zero points of symmetric weights are not looked at, so that v1 and v2 are the same
    Rules(
        VLLM,
        ("gptq", "gptq-v2"),
        (*(replace(k, zeros=("none",)) for k in _VLLM_INTEGERS[:-1]),),
        joins=True,
    ),
    Rules(VLLM, ("awq",), (_VLLM_INTEGERS[0], _VLLM_INTEGERS[2]), joins=True),
    Rules(VLLM, ("gguf",), _GGUF, needs="needs vllm-gguf-plugin (0.0.5)"),
    Rules(VLLM, ("torchao",), _TORCHAO, joins=True, needs="needs torchao"),
    Rules(
        SGLANG,
        ("compressed-tensors",),
        (*_SGLANG_MARLIN, _W8A8, _FP8_WEIGHTS, _FP8_EXPERTS, _FP4_WEIGHTS, replace(_MXFP4_WEIGHTS, roles=("expert",))),
        joins=True,
        refused=(
            Case("int8 experts with int8 activations run on Ascend NPUs only", ("expert",), ("int8",), inputs="int8"),
            Case("MXFP4 is run for experts only", ("linear", "lm_head"), ("fp4_e2m1",), groups=(32,)),
        ),
    ),
    Rules(SGLANG, ("gptq", "gptq-v2"), tuple(replace(k, ordered=True) for k in _SYMMETRIC_MARLIN), joins=True),
    Rules(SGLANG, ("awq",), (_SGLANG_MARLIN[0],), joins=True),
    Rules(SGLANG, ("gguf",), _GGUF),
    Rules(SGLANG, _BNB, (_BNB_4BIT, _BNB_INT8), joins=True, remarks=(_BNB_INPUTS,), needs="needs bitsandbytes"),
    Rules(
        TRANSFORMERS,
        ("compressed-tensors",),
        (_ANY,),
        refused=(
            Case(_BESIDE, asymmetric=True, beside=True),
            Case(_BESIDE, asymmetric=True, inputs="any"),
            Case("it cannot load experts with zero points", ("expert",), asymmetric=True),
            Case("it cannot load int8 experts with quantized activations", ("expert",), ("int8",), inputs="any"),
            Case("it cannot load block-wise FP8 experts", ("expert",), ("fp8_e4m3",), ("block", "group")),
            Case(_NVFP4_EXPERTS, ("expert",), ("fp4_e2m1",), groups=(16,)),
        ),
        remarks=(
            Case("does not quantize the inputs of experts", ("expert",), inputs="any"),
            Case("divides int8 activations by 127.5, vLLM by 127", inputs="int8", dynamic=True),
        ),
    ),
    Rules(TRANSFORMERS, ("gptq", "gptq-v2"), (_GPTQ,), needs="needs gptqmodel and optimum"),
    Rules(TRANSFORMERS, ("awq",), (_AWQ,), needs="needs gptqmodel"),
    Rules(TRANSFORMERS, ("gguf",), tuple(replace(k, roles=_ALL_ROLES) for k in _GGUF), needs="needs gguf"),
    Rules(TRANSFORMERS, _BNB, (_BNB_4BIT, _BNB_INT8), remarks=(_BNB_INPUTS,), needs="needs bitsandbytes"),
    Rules(TRANSFORMERS, ("torchao",), _TORCHAO, needs="needs torchao"),
    Rules(LLAMA_CPP, ("gguf",), (*_GGUF, *_GGUF_MORE)),
    Rules(
        ONNXRUNTIME,
        ("onnx-qdq",),
        (
            Kernel(
                *(("int2", "int4", "int8", "fp8_e4m3", "fp8_e5m2"), _TILES),
                zeros=_AFFINE,
                ordered=True,
                inputs=(None, *_ONNX_INPUTS),
                roles=_LINEARS,
                remark="blocks need session.qdq_matmulnbits_accuracy_level=1, or inputs are rounded to int8",
            ),
        ),
    ),
    Rules(
        ONNXRUNTIME,
        ("onnx-nbits",),
        (Kernel(("int2", "int4", "int8"), _TILES[:-1], (16, 32, 64, 128, 256), _AFFINE, roles=_LINEARS),),
    ),
    Rules(GPTQMODEL, ("gptq-v2",), (replace(_GPTQ, roles=_MATRICES),)),
    Rules(GPTQMODEL, ("gptq",), (replace(_GPTQ, roles=_MATRICES),), refused=(Case(_FOREIGN_V1, asymmetric=True),)),
    Rules(GPTQMODEL, ("awq",), (replace(_AWQ, roles=_MATRICES),)),
    Rules(
        MLX,
        ("mlx",),
        (
            Kernel(
                *(("int2", "int3", "int4", "int5", "int6", "int8"), ("group",), _MARLIN, _ALL_ZEROS),
                roles=_ALL_ROLES,
                features=32,
            ),
        ),
    ),
    Rules(
        MLX,
        ("awq",),
        (Kernel(("int4",), ("group",), _MARLIN, _AFFINE, roles=_LINEARS),),
        remarks=(Case("rounds zero point x scale to half precision", asymmetric=True),),
    ),
    *(Rules(engine, ("bitgrain",), why=_OWN) for engine in (VLLM, SGLANG, TRANSFORMERS)),
)
