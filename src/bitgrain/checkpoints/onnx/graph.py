"""Surgery on a traced graph: the products of a weight become those of its quantized form, parameters become constants
in a file beside the graph. Pure ONNX: nothing here knows of models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.activations import node
from bitgrain.checkpoints.onnx.form import FLOAT, Constant, Form, Initializer, Product
from bitgrain.errors import PlanError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DATA_FILE = "model.onnx.data"


class Surgeon:
    """Rewrites `proto`, whose parameters are inputs of the graph, by the names in memory."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self._users: dict[str, list[NodeProto]] = defaultdict(list)
        for one in proto.graph.node:
            for value in dict.fromkeys(one.input):
                self._users[value].append(one)
        self._shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in proto.graph.input
        }
        self._replaced: dict[str, list[NodeProto]] = {}
        self._before: list[NodeProto] = []
        self._renamed: dict[str, str] = {}
        self._constants: list[Initializer] = []
        self._inline: dict[str, Constant] = {}

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of a parameter, as it is in the graph."""
        return self._shapes[parameter]

    def quantize(self, parameter: str, layer: StoredLayer, form: Form) -> None:
        """Every product with `parameter` in the form of `layer`. Raises PlanError for another use of it."""
        for user, transposed in self._products(parameter, layer):
            bias = user.input[2] if len(user.input) > 2 else None
            expected = layer.shape if transposed else layer.shape[::-1]
            if self._shapes[parameter] != expected:
                raise PlanError(f"{layer.module} has shape {self._shapes[parameter]} in the graph, not {expected}")
            self._replaced[user.output[0]] = form.nodes(layer, Product(user.input[0], user.output[0], bias))
        self._constants += form.initializers(layer)
        self._inline |= form.inline(layer)

    def keep(self, parameter: str, constant: Initializer) -> None:
        """`parameter` is `constant`: of 16 bits, it is widened where it is used."""
        self._constants.append(constant)
        if constant.data_type == FLOAT:
            self._renamed[parameter] = constant.name
            return
        wide = f"{constant.name}/float32"
        for user in self._users[parameter]:
            if user.op_type == "Gather" and user.input[0] == parameter:  # rows are widened, not the whole table
                narrow = f"{user.output[0]}/stored"
                gather = node("Gather", [constant.name, user.input[1]], narrow, axis=_attribute(user, "axis", 0))
                self._replaced[user.output[0]] = [gather, node("Cast", [narrow], user.output[0], to=FLOAT)]
            else:
                self._renamed[parameter] = wide
        if parameter in self._renamed:
            self._before.append(node("Cast", [constant.name], wide, to=FLOAT))

    def finish(self, form: Form, offsets: Mapping[str, int], notes: Mapping[str, str]) -> ModelProto:
        """The graph with its constants at `offsets` of DATA_FILE; `notes`: what it says of itself."""
        from onnx import TensorProto, helper

        graph = self.proto.graph
        nodes = [*self._before]
        for one in graph.node:
            nodes += self._replaced.get(one.output[0], [one])
        for one in nodes:
            for index, value in enumerate(one.input):
                one.input[index] = self._renamed.get(value, value)
        nodes = _used(nodes, [value.name for value in graph.output])
        del graph.node[:]
        graph.node.extend(nodes)
        wanted = {value for one in nodes for value in one.input}
        inputs = [value for value in graph.input if _is_given(value.name)]
        del graph.input[:]
        graph.input.extend(inputs)
        held = [one for one in graph.initializer if one.name in wanted]
        del graph.initializer[:]
        graph.initializer.extend(held)
        graph.initializer.extend(
            helper.make_tensor(name, kind, dims, values) for name, (kind, dims, values) in sorted(self._inline.items())
        )
        for constant in self._constants:
            tensor = graph.initializer.add(name=constant.name, data_type=constant.data_type, dims=constant.dims)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": DATA_FILE, "offset": offsets[constant.name], "length": constant.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        for domain, version in form.domains.items():
            self.proto.opset_import.append(helper.make_opsetid(domain, version))
        helper.set_model_props(self.proto, dict(notes))
        self.proto.producer_name = "bitgrain"
        return self.proto

    def _products(self, parameter: str, layer: StoredLayer) -> list[tuple[NodeProto, bool]]:
        """Nodes that multiply by the weight on their right side, and whether it is transposed for that."""
        found: list[tuple[NodeProto, bool]] = []
        for user in self._users[parameter]:
            between = user.op_type == "Transpose"
            value = user.output[0] if between else parameter
            for last in self._users[value] if between else [user]:
                if not _is_product(last, value):
                    raise PlanError(f"{layer.module} is used by {last.op_type}, which is no linear layer's product")
                found.append((last, between != bool(_attribute(last, "transB", 0))))
        return found


def _is_product(one: NodeProto, weight: str) -> bool:
    if len(one.input) < 2 or one.input[1] != weight or weight in (one.input[0], *one.input[2:]):
        return False
    if one.op_type == "Gemm":
        return not _attribute(one, "transA", 0) and _attribute(one, "alpha", 1.0) == _attribute(one, "beta", 1.0) == 1
    return one.op_type == "MatMul"


def _attribute(one: NodeProto, name: str, default: float) -> float:
    """A number among the attributes of a node."""
    from onnx import helper

    found = next((a for a in one.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _is_given(name: str) -> bool:
    return name in ("input_ids", "attention_mask", "position_ids", "token_type_ids") or name.startswith("past_key_")


def _used(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """The nodes that the outputs need, in their order."""
    wanted = set(outputs)
    kept: list[NodeProto] = []
    for one in reversed(nodes):
        if wanted.intersection(one.output):
            wanted.update(one.input)
            kept.append(one)
    return kept[::-1]
