"""Finds what of a traced graph is left once a converter has folded it: what varies with the inputs and is used.

Every converter computes constants beforehand, drops what no output needs and computes equal things once. What it must
keep, and what may be in its file at most, follow from the graph alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

# Their result depends on the first input's shape and type, not on its values.
_SHAPED_LIKE = {
    "aten.empty_like.default", "aten.full_like.default", "aten.new_empty.default", "aten.new_full.default",
    "aten.new_ones.default", "aten.new_zeros.default", "aten.ones_like.default", "aten.zeros_like.default",
}  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """The nodes that vary with a graph's inputs, those that its outputs need, and the first of each computation."""

    varying: frozenset[Node]
    needed: frozenset[Node]
    first: frozenset[Node]

    def is_kept(self, node: Node) -> bool:
        """Whether a converter has to keep the node as an operator."""
        return node in self.varying and node in self.needed and node in self.first


def find_reach(graph: ExportedProgram) -> Reach:
    """Follow the graph from its inputs forwards and from its outputs backwards."""
    return Reach(
        varying=frozenset(_find_varying(graph)),
        needed=frozenset(_find_needed(graph)),
        first=frozenset(_find_first(graph)),
    )


def find_idle_weights(graph: ExportedProgram) -> dict[str, str]:
    """Why a weight, by its name, is in no operator that a file has to hold; those that are in one are left out.

    A weight that the model reads in any other way, not as the weight of a layer that it calls, is not idle.
    """
    reach = find_reach(graph)
    places = {spec.arg.name: str(spec.target) for spec in graph.graph_signature.input_specs if spec.target is not None}
    found = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.name in places:
            users = [user for user in node.users if user in reach.needed]
            if not users:
                found[places[node.name]] = "no output depends on it"
            elif all(_is_layer(user) and user not in reach.varying for user in users):
                found[places[node.name]] = "its output is the same for every input"
    return found


def _is_layer(node: Node) -> bool:
    """Whether a node is a layer that is called, with its weight as second argument (an embedding's is the first)."""
    return str(node.target).startswith(("aten.linear.", "aten.conv", "aten.embedding."))


def _find_varying(graph: ExportedProgram) -> Iterator[Node]:
    given, found = set(graph.graph_signature.user_inputs), set[Node]()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            varies = node.name in given
        else:
            read = node.all_input_nodes
            if str(node.target) in _SHAPED_LIKE and _has_fixed_shape(node):
                read = [one for one in read if one is not node.args[0]]
            varies = _is_random(node) or any(one in found for one in read)
        if varies:
            found.add(node)
            yield node


def _has_fixed_shape(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(side, int) for side in value.shape)


def _is_random(node: Node) -> bool:
    if str(node.target) == "aten.dropout.default":
        return bool(node.args[2])
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _find_needed(graph: ExportedProgram) -> Iterator[Node]:
    pending, found = [node for node in graph.graph.nodes if node.op == "output"], set[Node]()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            yield node
            pending += node.all_input_nodes


def _find_first(graph: ExportedProgram) -> Iterator[Node]:
    """Of nodes that compute the same from the same inputs, the first."""
    same: dict[Node, Node] = {}
    seen: dict[str, Node] = {}

    def settle(one: Node) -> str:
        return f"%{same[one].name}"

    for node in graph.graph.nodes:
        key: Any = node.name
        if node.op == "call_function" and not _is_random(node):
            arguments = torch.fx.map_arg((node.args, node.kwargs), settle)
            key = f"{node.target}{arguments}"
        same[node] = seen.setdefault(key, node)
        if same[node] is node:
            yield node
