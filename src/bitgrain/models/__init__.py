"""A model's anatomy, found in its module tree: what every tensor on disk is, and what becomes of it in memory."""

from bitgrain.models.anatomy import Anatomy, Parameters, Weight, read_anatomy
from bitgrain.models.materialize import load_dense_into
from bitgrain.models.naming import StoredTensor
from bitgrain.models.skeleton import architecture_of, build_skeleton, load_config
from bitgrain.models.source import ModelSource, resolve_model
from bitgrain.models.structure import Role

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
