"""A model's anatomy, found in its module tree: what every tensor on disk is, and what becomes of it in memory."""

from .anatomy import Anatomy, Parameters, Weight, read_anatomy
from .materialize import load_dense_into
from .naming import StoredTensor
from .skeleton import architecture_of, build_skeleton, load_config
from .source import ModelSource, resolve_model
from .structure import Role

__all__ = [
    "Anatomy",
    "ModelSource",
    "Parameters",
    "Role",
    "StoredTensor",
    "Weight",
    "architecture_of",
    "build_skeleton",
    "load_config",
    "load_dense_into",
    "read_anatomy",
    "resolve_model",
]
