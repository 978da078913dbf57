"""Specs and schemes in YAML: names in place of objects."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict

from bitgrain.numerics import QuantSpec, get_format, parse_granularity
from bitgrain.numerics.columns import By, ColumnChoice
from bitgrain.numerics.ranges import get_range
from bitgrain.numerics.spec import ZeroPoint
from bitgrain.recipes.scheme import Scheme


class Strict(BaseModel):
    """An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnsModel(Strict):
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


class SpecModel(Strict):
    """A QuantSpec in YAML: names instead of objects."""

    format: str
    granularity: str = "per_channel"
    zero_point: ZeroPoint = "none"
    restricted: bool = False
    range: str | dict[str, Any] = "minmax"
    scale: str | SpecModel = "float32"
    dynamic: bool = False
    outliers: float = 0.0
    threshold: float = 0.0
    columns: ColumnsModel | None = None
    clusters: int = 0
    minimum: str | SpecModel | None = None
    ordered: bool = False

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
            minimum=cls.of(m) if isinstance(m := spec.minimum, QuantSpec) else m and m.name,
            ordered=spec.ordered,
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
            minimum=get_format(self.minimum)
            if isinstance(self.minimum, str)
            else self.minimum and self.minimum.build(),
            ordered=self.ordered,
            dynamic=self.dynamic,
            outliers=self.outliers,
            threshold=self.threshold,
            columns=self.columns and self.columns.build(),
            clusters=self.clusters,
        )


class SchemeModel(Strict):
    """A scheme of one's own in YAML."""

    name: str = "custom"
    weight: SpecModel
    input: SpecModel | None = None
    prescribed: bool = False

    @classmethod
    def of(cls, scheme: Scheme) -> SchemeModel:
        """The names that `build` turns back into `scheme`."""
        given = scheme.input
        weight, inputs = SpecModel.of(scheme.weight), given and SpecModel.of(given)
        return cls(name=scheme.name, weight=weight, input=inputs, prescribed=scheme.prescribed)

    def build(self) -> Scheme:
        """Raises SchemeError."""
        return Scheme(self.name, self.weight.build(), self.input and self.input.build(), prescribed=self.prescribed)
