"""What a plan says of clusters of input channels (RPTQ) before a weight is touched."""

from __future__ import annotations

from collections.abc import Sequence

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Weight
from bitgrain.recipes import Recipe
from bitgrain.recipes.steps import read_step
from bitgrain.transforms import Reorder


def cluster_problems(layers: Sequence[tuple[Weight, StoredLayer | None]], recipe: Recipe) -> list[str]:
    """Why these layers cannot have the clusters that their schemes ask for, one sentence each."""
    wanted = [
        (weight, layer)
        for weight, layer in layers
        if layer is not None and layer.static_input is not None and layer.static_input.clusters
    ]
    transforms = [read_step(step).transform for step in recipe.transforms]
    places = [place for place, transform in enumerate(transforms) if isinstance(transform, Reorder)]
    if not wanted:
        return ["reorder: no layer's inputs are in clusters; choose W8A8_RPTQ, or leave it out"] if places else []
    problems: list[str] = []
    if not places:
        name = wanted[0][1].scheme.name
        problems.append(f"{name}: only the transform reorder finds clusters of channels; add it, or use --recipe rptq")
    elif places != [len(transforms) - 1]:
        problems.append("reorder comes once, and last of the transforms: it measures what the others leave")
    for weight, layer in wanted:
        if layer.role != "linear" or weight.block is None:
            what = "an expert" if layer.role == "expert" else "outside the blocks"
            problems.append(
                f"{layer.module} is {what}: {layer.scheme.name} clusters the inputs of linears inside blocks only; "
                "keep it by a rule, or give it another scheme"
            )
    return problems
