"""Runs a model on one batch again from the first call of a layer on; what returned before it is read from a record.

It needs no trace of the model: a module's call that returned before a layer's first call cannot depend on that layer.
Code between modules runs again. A model that keeps state between its modules may give other outputs than in full:
whether it does is for the caller to compare.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs, call
from rankship_pipeline.models.watch import Ended, watch


class DivergedError(Exception):
    """A pass called other modules than the one that was recorded."""


@dataclass
class _Frame:
    """A call that has not returned: the calls in it that have, and the one that has not."""

    returned: list["_Returned"] = field(default_factory=list)
    inner: "_Frame | None" = None


@dataclass(frozen=True)
class _Returned:
    """A call's output; or, of an output that is more than tensors and numbers, the frame to run it again by."""

    module: nn.Module
    output: Any = None
    frame: _Frame | None = None


class Restart:
    """A model and one batch. Passes are full ones until `advance` has been called.

    In memory are the outputs of the outermost modules that returned before the last stop.
    """

    def __init__(self, model: nn.Module, batch: Inputs) -> None:
        self._model, self._batch = model, batch
        self._root = _Frame()
        self._stops: Collection[nn.Module] = ()
        self._is_recording = False
        self._frame: _Frame | None = None  # of the running call; None beyond the record
        self._place = 0  # the number of calls in it so far

    def advance(self, stops: Sequence[nn.Module]) -> None:
        """Run on, from the last stop, to the first call of one of these modules, where passes begin from now on.

        DivergedError if none is called.
        """
        self._stops, self._is_recording = stops, True
        try:
            self.run()
        except Ended:
            return
        finally:
            self._stops, self._is_recording = (), False
        raise DivergedError

    @property
    def held_bytes(self) -> int:
        """The bytes of its record."""
        return _count_bytes(self._root)

    @torch.inference_mode()
    def run(self) -> Outputs:
        """The model's outputs, computed from the last stop on with the weights of now."""
        self._frame, self._place = self._root, 0
        with self._replaced():
            return call(self._model, self._batch)

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Put `_call` before every submodule's forward."""
        modules = [one for one in self._model.modules() if one is not self._model]
        modules = [one for one in modules if not isinstance(one, torch.jit.ScriptModule)]
        own = [vars(one).get("forward") for one in modules]
        for one in modules:
            vars(one)["forward"] = partial(self._call, one, one.forward)
        try:
            yield
        finally:
            for one, before in zip(modules, own, strict=True):
                if before is None:
                    del vars(one)["forward"]
                else:
                    vars(one)["forward"] = before

    def _call(self, module: nn.Module, forward: Any, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - a module's own
        frame, place = self._frame, self._place
        if frame is None:
            return forward(*args, **named)
        self._place += 1
        if place < len(frame.returned):
            known = frame.returned[place]
            if known.module is not module:
                raise DivergedError
            return _copy(known.output) if known.frame is None else self._enter(known.frame, forward, args, named)
        if module in self._stops:
            raise Ended
        inner = frame.inner if place == len(frame.returned) else None
        if not self._is_recording:
            return self._enter(inner, forward, args, named)
        inner = frame.inner = inner or _Frame()
        output = self._enter(inner, forward, args, named)
        frame.inner = None
        plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(output))
        frame.returned.append(_Returned(module, output=_copy(output)) if plain else _Returned(module, frame=inner))
        return output

    def _enter(self, frame: _Frame | None, forward: Any, args: Any, named: Any) -> Any:  # noqa: ANN401 - as above
        outer = self._frame, self._place
        self._frame, self._place = frame, 0
        try:
            return forward(*args, **named)
        finally:
            self._frame, self._place = outer


def _count_bytes(frame: _Frame) -> int:
    outputs = tree_leaves([one.output for one in frame.returned])
    inner = [one.frame for one in frame.returned] + [frame.inner]
    return sum(one.nbytes for one in outputs if isinstance(one, Tensor)) + sum(
        _count_bytes(one) for one in inner if one
    )


def _copy(output: Any) -> Any:  # noqa: ANN401 - a module's own
    """The output with tensors of its own: code between modules may change them in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


@torch.inference_mode()
def order_calls(model: nn.Module, names: Collection[str], batch: Inputs) -> list[str]:
    """These modules' names in the order of their first calls; one that is never called is left out."""
    order: dict[str, None] = {}
    with watch(model, names, lambda name, _x, _y: order.setdefault(name)):
        model(*batch)
    return list(order)
