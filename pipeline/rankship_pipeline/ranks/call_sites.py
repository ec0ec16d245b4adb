"""The call sites of a model's layers: shapes of layer and input, on which its time on a device depends.

Layers of equal shapes share a site, so that a device times each kind once. A site's layer is timed as several copies
side by side on one input, their outputs summed: the copies share the cost of reading the input and calling the runtime,
and timing one copy alone gives that cost (see rankship_benchmarks.costs.sweeps).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.rebuild import chain
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Convolution, Factorable, Kind, Layer, Transposed, get_layer
from rankship_pipeline.models.watch import watch


@record
class Site:
    """The shapes of a layer and its input, (1, …); `padding` is torch's string or its two numbers.

    `rows` and `columns` are those of the layer as a matrix; the kernel of a linear layer or an embedding is (1, 1). A
    convolution over one axis has a height of one. What a transposed convolution adds to its output's size is not told.
    """

    kind: Kind
    rows: int
    columns: int
    bias: bool
    input_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: str | tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def layer(self) -> Layer:
        """The site's layer, without a name."""
        kernel = self.kernel if self.kind == "convolution" else (1, 1)
        return Layer(name="", rows=self.rows, columns=self.columns, kind=self.kind, kernel=kernel)

    @property
    def name(self) -> str:
        """A readable and unique name."""
        return f"{self} {digest(self)[:8]}"

    def __str__(self) -> str:
        """Its name in tables and progress: "convolution 64→128 3x3 /2 on 64x8x8"."""
        shape = "x".join(map(str, self.input_shape[1:]))
        kernel = f" {self.kernel[0]}x{self.kernel[1]}" if "convolution" in self.kind else ""
        stride = f" /{self.stride[0]}" if self.stride != (1, 1) else ""
        return f"{self.kind} {self.layer.channels}→{self.rows}{kernel}{stride} on {shape or 1}"


def find_sites(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, tuple[Site, ...]]:
    """The sites of every layer by its name, one for each call on one sample of it or of what is tied to it."""
    return watch_sites(model, layers, lambda: model(*(tensor[:1] for tensor in inputs)))


@torch.inference_mode()
def watch_sites(model: nn.Module, layers: Sequence[Layer], run: Callable[[], object]) -> dict[str, tuple[Site, ...]]:
    """The sites of every layer by its name, one for each call of it, or of what is tied to it, in `run`."""
    found: dict[str, list[Site]] = {layer.name: [] for layer in layers}
    by_name = {use.name: (layer.name, use, get_layer(model, use.name)) for layer in layers for use in layer.uses}

    def note(name: str, x: Tensor, _y: Tensor) -> None:
        owner, use, module = by_name[name]
        found[owner].append(_describe(use, module, tuple(x.shape)))

    with watch(model, by_name, note):
        run()
    return {name: tuple(sites) for name, sites in found.items()}


def hash_model(model: nn.Module, sites: Mapping[str, Sequence[Site]]) -> str:
    """SHA-256 of what a model's time depends on: its modules, their settings and every site, without its weights."""
    return digest({"modules": repr(model), "sites": {name: list(some) for name, some in sites.items()}})


class Copies(nn.Module):
    """Layers of the same shape on one input, their outputs summed."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map the input of one layer to the sum of all outputs."""
        total: Tensor = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return total


class Branches(nn.Module):
    """Several modules on one input, each with its own output: exported as one graph and then split into files."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map the one input to all outputs, in order."""
        return tuple(branch(x) for branch in self.branches)


def make_copies(site: Site, factors: Factors | None, count: int) -> Copies:
    """The site's layer, dense or factored, `count` times with different random weights; torch's seed is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = [_make_layer(site) for _ in range(count)]
        return Copies([one if factors is None else chain(one, factors) for one in dense]).eval()


def make_samples(site: Site, count: int) -> Tensor:
    """Random inputs of the site, samples first; token ids for an embedding."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *site.input_shape[1:])
    if site.kind == "embedding":
        return torch.randint(site.columns, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _describe(layer: Layer, module: Factorable, shape: tuple[int, ...]) -> Site:
    bias = getattr(module, "bias", None) is not None
    site = Site(kind=layer.kind, rows=layer.rows, columns=layer.columns, bias=bias, input_shape=shape)
    if not isinstance(module, Convolution | Transposed):
        return site
    return replace(
        site,
        kernel=_pair(module.kernel_size, 1),
        stride=_pair(module.stride, 1),
        padding=module.padding if isinstance(module.padding, str) else _pair(module.padding, 0),
        dilation=_pair(module.dilation, 1),
    )


def _pair(values: Sequence[int], neutral: int) -> tuple[int, int]:
    """Height and width; a single axis is the width."""
    first, second = (neutral, *map(int, values))[-2:]
    return first, second


def _make_layer(site: Site) -> Factorable:
    if site.kind == "embedding":
        return nn.Embedding(site.columns, site.rows)
    if site.kind == "linear":
        return nn.Linear(site.columns, site.rows, bias=site.bias)
    axes = len(site.input_shape) - 2
    settings: dict[str, Any] = {
        "kernel_size": site.kernel[-axes:],
        "stride": site.stride[-axes:],
        "padding": site.padding if isinstance(site.padding, str) else site.padding[-axes:],
        "dilation": site.dilation[-axes:],
        "bias": site.bias,
    }
    if site.kind == "convolution":
        return (nn.Conv1d if axes == 1 else nn.Conv2d)(site.layer.channels, site.rows, **settings)
    outputs = site.rows // prod(site.kernel)
    return (nn.ConvTranspose1d if axes == 1 else nn.ConvTranspose2d)(site.columns, outputs, **settings)
