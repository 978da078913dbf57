# pyright: reportIncompleteStub=false
# Pointers as integers: who calls it (bitgrain.kernels) has checked shapes and dtypes, which no type here could tell.
from typing import Any

def __getattr__(name: str) -> Any: ...
