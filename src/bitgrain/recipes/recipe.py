"""Recipe: which layer gets which scheme, and how. YAML on disk, strict: an unknown key or an idle rule is an error.

    scheme: W4A16
    solver: rtn
    range: {name: mse}           # of weights
    input_range: search          # of inputs with static scales
    kv_cache: fp8                # static scales of keys and values; {name: fp8, range: mse}
    on_indivisible: error
    rules:                       # a later rule overrides an earlier one
      - {match: down_proj, scheme: W8A16}
      - {match: "re:.*layers\\\\.0\\\\..*", keep: true}
      - {match: lm_head, scheme: W8A16}

`match` is a module's name (whole, or its last parts), the name of its class, or `re:` and a regular expression that
matches the whole name. Names on disk and names in memory are both tried. `@first` and `@last` are the first and the
last layer, embeddings and routers apart: the two that are often kept in more bits.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import yaml
from pydantic import Field, field_validator, model_validator

from bitgrain.errors import RecipeError, SchemeError
from bitgrain.numerics.ranges import get_range
from bitgrain.recipes.kv_cache import read_cache
from bitgrain.recipes.scheme import Scheme, eight_bits, get_scheme
from bitgrain.recipes.spec_model import ColumnsModel, SchemeModel, Strict
from bitgrain.recipes.steps import read_step
from bitgrain.solvers import get_solver
from bitgrain.solvers.base import make_with_settings
from bitgrain.training.settings import TrainingSettings
from bitgrain.tuning import BlockSettings, EndToEndSettings, Learn

OnIndivisible = Literal["error", "pad", "channel", "skip"]
ENOUGH = 4
"""Tokens for each input of an expert's matrix, below which its moments say little: docs/decisions/0020."""
QUANTIZED_ROLES = ("linear", "expert")
"""What a scheme reaches without a rule: lm_head, embeddings, routers and convolutions only by name."""
_ENDS = {"@first": slice(1), "@last": slice(-1, None)}
_MULTIPLIED = (*QUANTIZED_ROLES, "conv", "lm_head")
"""Among which the first and the last layer are."""


class Layer(Protocol):
    """What a rule sees of a layer."""

    @property
    def module(self) -> str: ...
    @property
    def memory_module(self) -> str: ...
    @property
    def class_name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def place(self) -> int:
        """In the order of the model, from its input to its output."""
        ...


class Rule(Strict):
    """Layers that `match` get `scheme`, are kept as they are, or are included: they get the recipe's own scheme though
    none reaches them by itself (`QUANTIZED_ROLES`), embeddings without its inputs; `--bits` chooses for them too."""

    match: str = Field(min_length=1)
    scheme: str | SchemeModel | None = None
    keep: bool = False
    include: bool = False

    @field_validator("match")
    @classmethod
    def _is_regular(cls, match: str) -> str:
        if match.startswith("re:"):
            try:
                re.compile(match[3:])
            except re.error as error:
                raise ValueError(f"{match!r} is not a regular expression: {error}") from error
        return match

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        if self.keep + self.include + (self.scheme is not None) != 1:
            raise ValueError(f"the rule for {self.match!r} needs either a scheme or keep: true or include: true")
        return self

    def among(self, layers: Sequence[Layer]) -> list[int]:
        """The places of those of `layers`, in their order, that this rule is about."""
        if self.match in _ENDS:
            found = sorted(range(len(layers)), key=lambda i: layers[i].place)
            return [i for i in found if layers[i].role in _MULTIPLIED][_ENDS[self.match]]
        return [i for i, layer in enumerate(layers) if self.matches(layer)]

    def matches(self, layer: Layer) -> bool:
        """Whether this rule names `layer`."""
        names = {layer.module, layer.memory_module}
        if self.match.startswith("re:"):
            return any(re.fullmatch(self.match[3:], name) for name in names)
        return self.match == layer.class_name or any(f".{name}".endswith(f".{self.match}") for name in names)


class Calibration(Strict):
    """The text that is shown to the model, and whose activations the solvers see.

    text         a file, a folder, `builtin`, or hf:DATASET; None: what the command line names
    windows      of `seqlen` tokens; sampling: the first of the text, or drawn at random with `seed`
    activations  "quantized": each layer sees its inputs as the layers quantized before it leave them; "full": those of
                 the full-precision model
    batch        windows in one forward pass: bounds memory
    """

    text: str | None = None
    windows: int = Field(default=128, ge=1)
    seqlen: int = Field(default=512, ge=2)
    sampling: Literal["first", "random"] = "first"
    seed: int = 0
    activations: Literal["quantized", "full"] = "quantized"
    batch: int = Field(default=8, ge=1)


class Experts(Strict):
    """What experts that fewer than `tokens` calibration tokens reached are solved with (docs/experts.md).

    policy  "borrow": with what all tokens of their layer would show them, mixed with what they saw; "nearest": with
            nothing, rounded to nearest; "all": every expert, however many reached it, with all tokens of its layer
    tokens  None: `ENOUGH` for each input of the matrix
    """

    policy: Literal["borrow", "all", "nearest"] = "borrow"
    tokens: int | None = Field(default=None, ge=1)

    def threshold(self, in_features: int) -> int:
        """How many tokens a matrix with so many inputs needs of its own."""
        return ENOUGH * in_features if self.tokens is None else self.tokens


class Target(Strict):
    """What a layer's output is aimed at, beside that of its own weights (see `solvers.target`).

    inputs    how much of the error that earlier layers left in its inputs it makes up for, 0 to 1
    residual  how much of the error in the residual stream that it writes to, 0 to 1
    damping   pull towards the original weights, as a part of the mean of the Hessian's diagonal
    """

    inputs: float = Field(default=1.0, ge=0, le=1)
    residual: float = Field(default=1.0, ge=0, le=1)
    damping: float = Field(default=0.05, gt=0)


class Tuning(Strict):
    """Learning by gradients, after the solver: the settings of `tuning.blockwise` and `tuning.end_to_end`, or None.

    training  quantization-aware training, the last of all: `training.TrainingSettings`
    """

    blockwise: dict[str, Any] | None = None
    end_to_end: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def training_settings(self) -> TrainingSettings | None:
        """Raises SchemeError for a setting that does not exist."""
        return None if self.training is None else make_with_settings(TrainingSettings, self.training, "tuning.training")

    def check(self) -> None:
        """Raises SchemeError for a setting that does not exist, or that cannot be."""
        if self.blockwise is not None:
            block: BlockSettings = make_with_settings(BlockSettings, self.blockwise, "tuning.blockwise")
            block.schedule()
            Learn(block.codes, block.scales)
        if self.end_to_end is not None:
            whole: EndToEndSettings = make_with_settings(EndToEndSettings, self.end_to_end, "tuning.end_to_end")
            whole.schedule()
        self.training_settings()


class Recipe(Strict):
    """Everything that decides the result, apart from the model itself."""

    scheme: str | SchemeModel
    solver: str | dict[str, Any] = "rtn"
    transforms: tuple[str | dict[str, Any], ...] = ()
    calibration: Calibration = Calibration()
    experts: Experts = Experts()
    target: Target | None = None
    tuning: Tuning = Tuning()
    range: str | dict[str, Any] | None = None
    input_range: str | dict[str, Any] | None = None
    kv_cache: str | dict[str, Any] | None = None
    columns: ColumnsModel | None = None
    on_indivisible: OnIndivisible = "error"
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        try:
            get_solver(self.solver)
            for step in self.transforms:
                read_step(step)
            self.tuning.check()
            if self.kv_cache is not None:
                read_cache(self.kv_cache)
            self._build(self.scheme)
            for rule in self.rules:
                if rule.scheme is not None:
                    self._build(rule.scheme)
        except SchemeError as error:
            raise ValueError(str(error)) from error
        return self

    def assign(self, layers: Sequence[Layer], roles: Sequence[str] = QUANTIZED_ROLES) -> list[Scheme | None]:
        """The scheme of each layer, None where it is kept. roles: what is reached without a rule.

        Raises RecipeError for a rule that matches no layer, with the nearest names.
        """
        default = self._build(self.scheme)
        schemes: list[Scheme | None] = [default if layer.role in roles else None for layer in layers]
        for rule in self.rules:
            scheme = None if rule.scheme is None else self._build(rule.scheme)
            hits = rule.among(layers)
            if not hits:
                raise RecipeError(_idle(rule, layers))
            for i in hits:
                looked_up = rule.include and layers[i].role == "embedding"
                schemes[i] = replace(default, input=None) if looked_up else default if rule.include else scheme
        for i, (layer, scheme) in enumerate(zip(layers, schemes, strict=True)):
            if layer.role == "embedding" and scheme is not None and scheme.weight.columns is not None:
                schemes[i] = replace(scheme, weight=replace(scheme.weight, columns=None))  # it has no input channels
        return schemes

    @property
    def needs_calibration(self) -> bool:
        """Whether text must be shown to the model, whatever its schemes."""
        learns = any(tuned is not None for _, tuned in self.tuning) or self.kv_cache is not None
        return bool(get_solver(self.solver).needs_calibration or self.transforms or self.target or learns)

    def for_schemes(self, schemes: Sequence[Scheme | None]) -> Recipe:
        """The recipe with those transforms only that are wanted for layers with these schemes."""
        wanted = tuple(step for step in self.transforms if read_step(step).wanted(schemes))
        return self if wanted == self.transforms else self.model_copy(update={"transforms": wanted})

    def fallback(self) -> SchemeModel:
        """Eight bits for layers that the recipe's scheme would harm: see `scheme.eight_bits`."""
        return SchemeModel.of(eight_bits(self._build(self.scheme)))

    def _build(self, scheme: str | SchemeModel) -> Scheme:
        """A scheme with the recipe's own ranges and columns."""
        built = get_scheme(scheme) if isinstance(scheme, str) else scheme.build()
        if self.range is not None:
            built = replace(built, weight=replace(built.weight, range=get_range(self.range)))
        if self.columns is not None:
            built = replace(built, weight=replace(built.weight, columns=self.columns.build()))
        if self.input_range is not None:
            static, chosen = built.input, get_range(self.input_range)
            if static is not None and not static.dynamic:
                built = replace(built, input=replace(static, range=chosen))
        return built

    def to_yaml(self) -> str:
        """The recipe with every default written out, readable back by `load_recipe`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _idle(rule: Rule, layers: Sequence[Layer]) -> str:
    last = {part for layer in layers for part in (layer.module.rsplit(".", 1)[-1], layer.class_name)}
    names = [*sorted(last), *(layer.module for layer in layers)]
    near = difflib.get_close_matches(rule.match.removeprefix("re:"), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; layers end in {', '.join(sorted(last))}"
    return f"the rule {rule.match!r} matches no layer of this model{hint}"
