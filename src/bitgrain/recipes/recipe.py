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
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitgrain.errors import RecipeError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, parse_granularity
from bitgrain.numerics.columns import By, ColumnChoice
from bitgrain.numerics.ranges import get_range
from bitgrain.recipes.kv_cache import read_cache
from bitgrain.recipes.scheme import Scheme, eight_bits, get_scheme
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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnsModel(_Strict):
    """A ColumnChoice in YAML."""

    share: float
    by: By = "activation"
    seed: int = 0
    dtype: str = "float16"

    @classmethod
    def of(cls, choice: ColumnChoice) -> ColumnsModel:
        """The names that `build` turns back into `choice`."""
        return cls(share=choice.share, by=choice.by, seed=choice.seed, dtype=choice.dtype.name)

    def build(self) -> ColumnChoice:
        """Raises SchemeError for a share that is none, or a dtype that is not of 16 bits."""
        return ColumnChoice(self.share, self.by, self.seed, get_format(self.dtype))


class SpecModel(_Strict):
    """A QuantSpec in YAML: names instead of objects."""

    format: str
    granularity: str = "per_channel"
    zero_point: Literal["none", "integer", "real"] = "none"
    restricted: bool = False
    range: str | dict[str, Any] = "minmax"
    scale: str | SpecModel = "float32"
    dynamic: bool = False
    outliers: float = 0.0
    threshold: float = 0.0
    columns: ColumnsModel | None = None
    clusters: int = 0

    @classmethod
    def of(cls, spec: QuantSpec) -> SpecModel:
        """The names that `build` turns back into `spec`."""
        settings = {f.name: getattr(spec.range, f.name) for f in fields(spec.range)}  # type: ignore[arg-type]
        return cls(
            format=spec.format.name,
            granularity=spec.granularity.name,
            zero_point=spec.zero_point,
            restricted=spec.restricted,
            range={"name": spec.range.name, **settings} if settings else spec.range.name,
            scale=cls.of(spec.scale) if isinstance(spec.scale, QuantSpec) else spec.scale.name,
            dynamic=spec.dynamic,
            outliers=spec.outliers,
            threshold=spec.threshold,
            columns=spec.columns and ColumnsModel.of(spec.columns),
            clusters=spec.clusters,
        )

    def build(self) -> QuantSpec:
        """Raises SchemeError for an unknown name or a combination without a meaning."""
        return QuantSpec(
            format=get_format(self.format),
            granularity=parse_granularity(self.granularity),
            zero_point=self.zero_point,
            restricted=self.restricted,
            range=get_range(self.range),
            scale=get_format(self.scale) if isinstance(self.scale, str) else self.scale.build(),
            dynamic=self.dynamic,
            outliers=self.outliers,
            threshold=self.threshold,
            columns=self.columns and self.columns.build(),
            clusters=self.clusters,
        )


class SchemeModel(_Strict):
    """A scheme of one's own in YAML."""

    name: str = "custom"
    weight: SpecModel
    input: SpecModel | None = None

    @classmethod
    def of(cls, scheme: Scheme) -> SchemeModel:
        """The names that `build` turns back into `scheme`."""
        given = scheme.input
        return cls(name=scheme.name, weight=SpecModel.of(scheme.weight), input=given and SpecModel.of(given))

    def build(self) -> Scheme:
        """Raises SchemeError."""
        return Scheme(self.name, self.weight.build(), self.input and self.input.build())


class Rule(_Strict):
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


class Calibration(_Strict):
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


class Experts(_Strict):
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


class Target(_Strict):
    """What a layer's output is aimed at, beside that of its own weights (see `solvers.target`).

    inputs    how much of the error that earlier layers left in its inputs it makes up for, 0 to 1
    residual  how much of the error in the residual stream that it writes to, 0 to 1
    damping   pull towards the original weights, as a part of the mean of the Hessian's diagonal
    """

    inputs: float = Field(default=1.0, ge=0, le=1)
    residual: float = Field(default=1.0, ge=0, le=1)
    damping: float = Field(default=0.05, gt=0)


class Tuning(_Strict):
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


class Recipe(_Strict):
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


def make_recipe(**settings: Any) -> Recipe:
    """A Recipe from keyword arguments, with errors as from a file. Raises RecipeError."""
    return _validate(settings, "the recipe")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, in which a key given twice is an error and not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def named_recipes() -> dict[str, Path]:
    """The recipes that come with bitgrain, by name: for every scheme, from cheap to accurate."""
    folder = Path(__file__).with_name("named")
    return {name: folder / f"{name}.yaml" for name in ("fast", "balanced", "best", "rptq", "zeroquant", "train")}


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Reads a recipe file, or the one of `named_recipes`; `overrides` replace its top-level keys.

    An override that is a mapping is merged into the file's. Raises RecipeError: no file, no YAML, unknown key (with
    the nearest known one), bad value, or no scheme in either.
    """
    known = named_recipes()
    if not Path(path).is_file():
        if str(path) not in known:
            raise RecipeError(f"there is no recipe file {path}, and no recipe of that name ({', '.join(known)})")
        if "scheme" not in overrides:
            raise RecipeError(f"the recipe {path} holds for every scheme: say which, for instance --scheme W4A16")
        path = known[str(path)]
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: it needs at least `scheme: NAME`")
    merged = dict(data)
    for key, value in overrides.items():
        old = data.get(key)
        merged[key] = {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value
    return _validate(merged, str(path))


def _validate(data: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first problem in one sentence, with a suggestion for a mistyped key."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    # where a name or a mapping may stand, pydantic complains about both: the deepest is about what was written
    problem = max(unknown or problems, key=lambda p: len(p["loc"]))
    where = ".".join(str(part) for part in problem["loc"] if str(part) not in ("str", "SchemeModel", "SpecModel"))
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        parts = (Recipe, Rule, SchemeModel, SpecModel, ColumnsModel, Calibration, Experts, Target, Tuning)
        known = sorted({name for part in parts for name in part.model_fields})
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown key {where!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
