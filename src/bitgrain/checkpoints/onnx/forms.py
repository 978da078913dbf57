"""The forms of ONNX, by the name that `--to` has."""

from __future__ import annotations

from bitgrain.checkpoints.onnx.form import Form
from bitgrain.checkpoints.onnx.nbits import NBits
from bitgrain.checkpoints.onnx.qdq import Qdq

FORMS: dict[str, Form] = {form.name: form for form in (Qdq(), NBits())}
