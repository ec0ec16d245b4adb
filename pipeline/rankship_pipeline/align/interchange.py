"""Finds a model's interchangeable neurons: atoms of its tensors' axes that can be permuted without changing outputs.

The model is exported to a graph of ATen operators. Each operator that is known ties the axes of its inputs and outputs;
an unknown one fixes them, so that nothing is permuted of which it is not known that it may be. Inputs and outputs of
the model are fixed.
"""

import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rankship_pipeline.align.axes import Atoms, Axis
from rankship_pipeline.models.data import Inputs

_SAME = {"clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh_copy", "_softmax", "_log_softmax", "dropout"}
_REDUCED = {"mean", "sum", "amax", "amin", "var", "any", "prod"}
_FILLED = {"full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "scalar_tensor", "empty"}
_POOLED = re.compile(r"(?:pool|upsample).*?([123])d")
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten"}
Axes = list[Axis]


@dataclass(frozen=True)
class Interchange:
    """The free atoms of a model with their sizes, and for each of its tensors the atoms of its dimensions.

    A tensor is seen in the shape of its atoms (`views`), of which only those in `free` may be permuted. `unknown`
    are operators that fixed atoms because no rule is known for them.
    """

    free: Mapping[int, int]
    views: Mapping[str, tuple[Axis, tuple[int, ...]]]
    unknown: tuple[str, ...]


@torch.no_grad()
def find_interchange(model: nn.Module, sample: Inputs) -> Interchange:
    """Trace a model in evaluation mode and find what may be permuted in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, sample, strict=False).run_decompositions()
    tracing = _Tracing()
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = model.state_dict(keep_vars=True)
    tensors: dict[int, Axes] = {}  # a tensor that is used under two names is one
    for node in program.graph.nodes:
        if node.op == "placeholder":
            tensor = state.get(names.get(node.name, ""))
            axes = tracing.make_axes(node, fixed=tensor is None)
            tracing.axes[node] = axes if tensor is None else tensors.setdefault(id(tensor), axes)
        elif node.op == "output":
            tracing.fix(node)
        elif node.op == "call_function":
            tracing.follow(node)
    atoms = tracing.atoms
    views = {
        name: (leaves, tuple(atoms.measure((leaf,)) for leaf in leaves))
        for name, tensor in state.items()
        if id(tensor) in tensors
        for leaves in [tuple(leaf for axis in tensors[id(tensor)] for leaf in atoms.list_leaves(axis))]
    }
    parameters = set(dict(model.named_parameters()))
    used = {leaf for name, (leaves, _) in views.items() if name in parameters for leaf in leaves}
    free = {leaf: atoms.measure((leaf,)) for leaf in sorted(used) if atoms.is_free(leaf)}
    return Interchange(free, views, tuple(dict.fromkeys(tracing.unknown)))


@dataclass
class _Tracing:
    """The axes of every tensor in a graph."""

    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[Node, Any] = field(default_factory=dict)  # axes of a tensor, or a list of them for several outputs
    unknown: list[str] = field(default_factory=list)

    def make_axes(self, node: Node, *, fixed: bool) -> Axes:
        value = node.meta["val"]
        return [self.atoms.make(size, fixed=fixed) for size in value.shape] if isinstance(value, Tensor) else []

    def fix(self, node: Node) -> None:
        """Fix all axes of all tensors that a node takes."""
        for given in node.all_input_nodes:
            found = self.axes.get(given, [])
            for axes in found if found and isinstance(found[0], list) else [found]:
                for axis in axes:
                    self.atoms.fix(axis)

    def follow(self, node: Node) -> None:
        """Find the axes of what a node returns."""
        if node.target is operator.getitem:
            source, index = node.args
            self.axes[node] = self.axes[source][index]  # type: ignore[index]
            return
        target: Any = node.target
        name = getattr(getattr(target, "overloadpacket", None), "__name__", str(target))
        if name.startswith(("_assert", "sym_")):
            return
        pooled = _POOLED.search(name)
        rule = _RULES.get(name)
        if rule is not None:
            self.axes[node] = rule(self, node)
        elif pooled is not None:
            self.axes[node] = self._pool(node, int(pooled[1]))
        elif name in _SAME:
            self.axes[node] = self.take(node, 0)
        elif name in _FILLED:
            self.axes[node] = self.make_axes(node, fixed=False)
        elif name in _VIEWS:
            self.axes[node] = self.atoms.regroup(self.take(node, 0), node.meta["val"].shape)
        elif name in _REDUCED:
            self.axes[node] = _reduce(self, node)
        elif torch.Tag.pointwise in getattr(target, "tags", ()):
            self.axes[node] = self.broadcast([self.axes[one] for one in node.all_input_nodes], node.meta["val"].shape)
        else:
            self.unknown.append(name)
            self.fix(node)
            values = node.meta["val"]
            several = isinstance(values, list | tuple)
            made = [
                [self.atoms.make(size, fixed=True) for size in one.shape] if isinstance(one, Tensor) else []
                for one in (values if several else [values])
            ]
            self.axes[node] = made if several else made[0]

    def take(self, node: Node, position: int) -> Axes:
        """The axes of a node's argument."""
        axes: Axes = self.axes[node.args[position]]  # type: ignore[index]
        return axes

    def broadcast(self, given: list[Axes], shape: tuple[int, ...]) -> Axes:
        """The axes of a result that is computed number by number from tensors of shapes that are broadcast."""
        found: Axes = []
        for place, size in enumerate(shape):
            back = len(shape) - place
            mine = [axes[-back] for axes in given if len(axes) >= back and self.atoms.measure(axes[-back]) == size]
            for other in mine[1:]:
                self.atoms.unite(mine[0], other)
            found.append(mine[0] if mine else self.atoms.make(size))
        return found

    def _pool(self, node: Node, spatial: int) -> Any:  # noqa: ANN401 - axes of one or of several outputs
        """Pooling and resizing: channels stay, positions are ordered."""
        given, values = self.take(node, 0), node.meta["val"]
        for axis in given[-spatial:]:
            self.atoms.fix(axis)
        several = isinstance(values, list | tuple)
        made = [
            [*given[:-spatial], *(self.atoms.make(size, fixed=True) for size in one.shape[-spatial:])]
            for one in (values if several else [values])
        ]
        return made if several else made[0]


def _find_dims(node: Node, position: int, count: int) -> list[int]:
    """An argument that names dimensions, counted from the front; all of them where it is left out."""
    given = node.args[position] if len(node.args) > position else None
    dims: Any = [given] if isinstance(given, int) else given or range(count)
    return [dim % count for dim in dims]


def _reduce(tracing: _Tracing, node: Node) -> Axes:
    """A sum, mean or extreme over some axes does not depend on their order."""
    given = tracing.take(node, 0)
    dims = _find_dims(node, 1, len(given)) if given else []
    kept = len(node.meta["val"].shape) == len(given)
    return [() if place in dims else axis for place, axis in enumerate(given) if kept or place not in dims]


def _multiply(tracing: _Tracing, node: Node) -> Axes:
    """Products of matrices, of batches of them, and with a bias (mm, bmm, addmm, baddbmm)."""
    *bias, left, right = [tracing.axes[one] for one in node.args[:3] if isinstance(one, Node)]
    tracing.atoms.unite(left[-1], right[-2])
    for one, other in zip(left[:-2], right[:-2], strict=True):
        tracing.atoms.unite(one, other)
    found: Axes = [*left[:-1], right[-1]]
    return tracing.broadcast([found, *bias], node.meta["val"].shape)


def _convolve(tracing: _Tracing, node: Node) -> Axes:
    """A convolution of `groups` groups: inputs (groups, in), outputs (groups, out), the weight (groups·out, in, …)."""
    x, weight = tracing.take(node, 0), tracing.take(node, 1)
    transposed, groups = node.args[6], int(node.args[8])  # type: ignore[arg-type]
    atoms, out_size = tracing.atoms, node.meta["val"].shape[1]
    group, inner, outer = (atoms.make(size) for size in (groups, atoms.measure(x[1]) // groups, out_size // groups))
    atoms.unite(x[1], group + inner)
    atoms.unite(weight[0], group + (inner if transposed else outer))
    atoms.unite(weight[1], outer if transposed else inner)
    if node.args[2] is not None:
        atoms.unite(tracing.take(node, 2)[0], group + outer)
    for axis in (*x[2:], *weight[2:]):
        atoms.fix(axis)
    return [x[0], group + outer, *(atoms.make(size, fixed=True) for size in node.meta["val"].shape[2:])]


def _normalise_batch(tracing: _Tracing, node: Node) -> list[Axes]:
    x = tracing.take(node, 0)
    for one in node.args[1:5]:
        if isinstance(one, Node):
            tracing.atoms.unite(x[1], tracing.axes[one][0])
    return [x, [()], [()]]


def _normalise_layer(tracing: _Tracing, node: Node) -> list[Axes]:
    x = tracing.take(node, 0)
    for one in node.args[2:4]:
        if isinstance(one, Node):
            for mine, other in zip(reversed(x), reversed(tracing.axes[one]), strict=False):
                tracing.atoms.unite(mine, other)
    return [x, [], []]


def _normalise_group(tracing: _Tracing, node: Node) -> list[Axes]:
    """Channels are (groups, members): groups may change places, and members in all groups alike."""
    x, atoms = tracing.take(node, 0), tracing.atoms
    groups = int(node.args[6])  # type: ignore[arg-type]
    both = atoms.make(groups) + atoms.make(atoms.measure(x[1]) // groups)
    atoms.unite(x[1], both)
    for one in node.args[1:3]:
        if isinstance(one, Node):
            atoms.unite(tracing.axes[one][0], both)
    return [x, [], []]


def _attend(tracing: _Tracing, node: Node) -> list[Axes]:
    """Attention of queries, keys and values (batch, heads, positions, width); positions are ordered."""
    queries, keys, values = (tracing.take(node, place) for place in range(3))
    for axis in (queries[2], keys[2]):
        tracing.atoms.fix(axis)
    for one, other in ((queries[3], keys[3]), (keys[2], values[2])):
        tracing.atoms.unite(one, other)
    for place in (0, 1):
        tracing.atoms.unite(queries[place], keys[place])
        tracing.atoms.unite(queries[place], values[place])
    mask = node.kwargs.get("attn_mask")
    if isinstance(mask, Node):
        for axis, queried in zip(reversed(tracing.axes[mask]), (keys[2], *reversed(queries[:3])), strict=False):
            if axis:
                tracing.atoms.unite(axis, queried)
    return [[*queries[:3], values[3]], queries[:3]]


def _look_up(tracing: _Tracing, node: Node) -> Axes:
    table, places = tracing.take(node, 0), tracing.take(node, 1)
    tracing.atoms.fix(table[0])
    return [*places, table[1]]


def _expand(tracing: _Tracing, node: Node) -> Axes:
    """A repeated number may change places with itself."""
    return tracing.broadcast([tracing.take(node, 0)], node.meta["val"].shape)


def _permute(tracing: _Tracing, node: Node) -> Axes:
    given = tracing.take(node, 0)
    return [given[dim] for dim in _find_dims(node, 1, len(given))]


def _unsqueeze(tracing: _Tracing, node: Node) -> Axes:
    found, dim = list(tracing.take(node, 0)), int(node.args[1])  # type: ignore[arg-type]
    found.insert(dim % (len(found) + 1), ())
    return found


def _squeeze(tracing: _Tracing, node: Node) -> Axes:
    given = tracing.take(node, 0)
    dims = _find_dims(node, 1, len(given))
    return [axis for place, axis in enumerate(given) if place not in dims or tracing.atoms.measure(axis) > 1]


def _select(tracing: _Tracing, node: Node) -> Axes:
    given, dim = list(tracing.take(node, 0)), int(node.args[1])  # type: ignore[arg-type]
    tracing.atoms.fix(given.pop(dim))
    return given


def _cut(tracing: _Tracing, node: Node) -> Axes:
    """Slices and padding order the axes whose length they change."""
    found = []
    for axis, size in zip(tracing.take(node, 0), node.meta["val"].shape, strict=True):
        same = tracing.atoms.measure(axis) == size
        if not same:
            tracing.atoms.fix(axis)
        found.append(axis if same else tracing.atoms.make(size, fixed=True))
    return found


def _join(tracing: _Tracing, node: Node) -> Axes:
    """Axes that are put one behind the other are ordered; the others are tied."""
    given: list[Axes] = [
        tracing.axes[one] for one in node.all_input_nodes if one.meta["val"].numel()
    ]  # a cache begins empty
    if len(given) == 1:
        return given[0]
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % len(node.meta["val"].shape)  # type: ignore[arg-type]
    for axes in given:
        tracing.atoms.fix(axes[dim])
    found = tracing.broadcast([[*axes[:dim], (), *axes[dim + 1 :]] for axes in given], node.meta["val"].shape)
    tracing.atoms.fix(found[dim])
    return found


_RULES: dict[str, Callable[[_Tracing, Node], Any]] = {
    "mm": _multiply,
    "bmm": _multiply,
    "addmm": _multiply,
    "baddbmm": _multiply,
    "convolution": _convolve,
    "_native_batch_norm_legit_no_training": _normalise_batch,
    "native_layer_norm": _normalise_layer,
    "native_group_norm": _normalise_group,
    "_scaled_dot_product_flash_attention_for_cpu": _attend,
    "embedding": _look_up,
    "expand": _expand,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "slice": _cut,
    "constant_pad_nd": _cut,
    "cat": _join,
}
