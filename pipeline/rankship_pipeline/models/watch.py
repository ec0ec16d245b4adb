"""Reads the inputs and outputs of a model's layers while it runs; the only place that registers hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.models.data import Inputs

See = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def watch(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """Call `see(name, input, output)` after every call of one of the named modules, until the context ends.

    A tensor that `see` returns replaces the output. The input is the first argument, by position or by name. An
    exception from `see` ends the forward pass and is raised to its caller.
    """

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor | None]:
        return lambda _module, args, named, output: see(name, _pick_input(args, named), output)

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(make_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def fork_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give every call of the named modules an input that nothing else reads, of the same memory, until the end.

    Its gradient, which it then has in any case, is that of what this one call does with it.
    """

    def fork(
        _module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        x = args[0] if args else named["input"]
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return ((own, *args[1:]), named) if args else (args, {**named, "input": own})

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(fork, with_kwargs=True)
            stack.callback(handle.remove)
        yield


SeeCall = Callable[[str, tuple[Any, ...], Mapping[str, Any]], None]


@contextmanager
def watch_calls(model: nn.Module, names: Iterable[str], see: SeeCall) -> Iterator[None]:
    """Call `see(name, arguments, named arguments)` before every call of one of the named modules, until the end."""

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _module, args, named: see(name, args, named)

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(make_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _pick_input(args: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """The first argument, by position or as `input`, else the first by any name."""
    return args[0] if args else named["input"] if "input" in named else next(iter(named.values()))


class Ended(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.inference_mode()
def run_until(model: nn.Module, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run a model up to the first call of the named module; returns that call's input and output."""
    seen: list[Tensor] = []

    def see(_name: str, x: Tensor, y: Tensor) -> None:
        seen.extend((x, y))
        raise Ended

    with watch(model, [name], see), suppress(Ended):
        model(*inputs)
    x, y = seen
    return x, y
