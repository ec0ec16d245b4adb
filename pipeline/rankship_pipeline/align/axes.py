"""Atoms of tensors' axes: which axes of a model's tensors can only be permuted together, or not at all.

An axis is a product of atoms, outermost first: 8 heads of 16 numbers are (heads, width) on an axis of 128. Atoms that
an operation ties are united; an atom that an operation orders is fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

Axis = tuple[int, ...]  # atoms, outermost first; empty for an axis of one


@dataclass
class Atoms:
    """The atoms of one graph: united ones share a root, and a root may be split into parts."""

    _sizes: list[int] = field(default_factory=list)
    _parents: list[int] = field(default_factory=list)
    _parts: dict[int, Axis] = field(default_factory=dict)
    _fixed: set[int] = field(default_factory=set)

    def make(self, size: int, *, fixed: bool = False) -> Axis:
        """A new axis of one atom."""
        if size == 1:
            return ()
        self._sizes.append(size)
        self._parents.append(len(self._parents))
        if fixed:
            self._fixed.add(len(self._parents) - 1)
        return (len(self._parents) - 1,)

    def list_leaves(self, axis: Axis) -> Axis:
        """The unsplit roots of an axis, outermost first."""
        found: list[int] = []
        for atom in axis:
            root = self._find(atom)
            found += self.list_leaves(self._parts[root]) if root in self._parts else [root]
        return tuple(found)

    def measure(self, axis: Axis) -> int:
        """The length of an axis."""
        return prod(self._sizes[atom] for atom in axis)

    def is_free(self, leaf: int) -> bool:
        """Whether a leaf may be permuted."""
        return leaf not in self._fixed

    def fix(self, axis: Axis) -> None:
        """Forbid every permutation of an axis."""
        self._fixed |= set(self.list_leaves(axis))

    def unite(self, left: Axis, right: Axis) -> None:
        """Permute two axes of one length only together; what cannot be matched part by part is fixed."""
        while True:
            mine, theirs = self.list_leaves(left), self.list_leaves(right)
            pairs = list(zip(mine, theirs, strict=False))
            uneven = [pair for pair in pairs if self._sizes[pair[0]] != self._sizes[pair[1]]]
            for one, other in pairs[: pairs.index(uneven[0])] if uneven else pairs:
                self._join(one, other)
            if not uneven:
                return
            small, large = sorted(uneven[0], key=lambda leaf: self._sizes[leaf])
            if self._sizes[large] % self._sizes[small]:
                self.fix(left)
                self.fix(right)
                return
            self._split(large, self._sizes[small])

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """The axes of a tensor after a reshape; where a new axis begins inside of an atom, the atom is split."""
        left = [leaf for axis in axes for leaf in self.list_leaves(axis)]
        found: list[Axis] = []
        for size in shape:
            axis: Axis = ()
            while self.measure(axis) < size and left:
                wanted, leaf = size // self.measure(axis), left.pop(0)
                if self._sizes[leaf] > wanted:
                    if size % self.measure(axis) or self._sizes[leaf] % wanted:
                        left.insert(0, leaf)
                        break
                    parts = self._split(leaf, wanted)
                    left = [part for one in (leaf, *left) for part in self.list_leaves((one,))]
                    leaf, left = parts[0], left[1:]
                axis += (leaf,)
            if self.measure(axis) != size:
                for one in axes:
                    self.fix(one)
                return [self.make(one, fixed=True) for one in shape]
            found.append(axis)
        return found

    def _find(self, atom: int) -> int:
        while self._parents[atom] != atom:
            atom = self._parents[atom]
        return atom

    def _join(self, left: int, right: int) -> None:
        left, right = self._find(left), self._find(right)
        if left == right:
            return
        self._parents[right] = left
        if right in self._fixed:
            self._fixed.add(left)

    def _split(self, leaf: int, outer: int) -> Axis:
        """Split a leaf into `outer` blocks of equal length; blocks of a fixed one are fixed."""
        fixed = leaf in self._fixed
        parts = (*self.make(outer, fixed=fixed), *self.make(self._sizes[leaf] // outer, fixed=fixed))
        self._parts[leaf] = parts
        return parts
