"""Transforms are found by name; an unknown one lists what there is."""

import pytest
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.transforms import base, get_transform, register_transform, transform_names


def test_unknown_name_lists_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_TRANSFORMS", {})
    with pytest.raises(SchemeError, match="unknown transform 'smooth'; known transforms: none in this version"):
        get_transform("smooth")

    @register_transform("rotate")
    class Rotate:
        def apply(self, block: nn.Module) -> None:
            del block

    assert isinstance(get_transform("ROTATE"), Rotate)
    assert transform_names() == ["rotate"]
    with pytest.raises(SchemeError, match="known transforms: rotate"):
        get_transform("smooth")
