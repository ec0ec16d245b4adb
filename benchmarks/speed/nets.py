"""The shapes that speed is measured on: a bottleneck ResNet and encoders of patches or tokens, with random weights.

Plain torch, so that a shape needs neither torchvision nor transformers: at their full sizes they have the layers of
ResNet-50, ViT-B/16 and BERT-base.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """Three convolutions, 1×1, 3×3 and 1×1, beside a shortcut (He et al. 2016; the stride is the 3×3's)."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.reduce = _convolve(channels_in, width, 1)
        self.spatial = _convolve(width, width, 3, stride)
        self.expand = _convolve(width, out, 1)
        changes = stride != 1 or channels_in != out
        self.shortcut = _convolve(channels_in, out, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, 4·width, h / stride, w / stride)."""
        y = functional.relu(self.reduce(x))
        y = functional.relu(self.spatial(y))
        return functional.relu(self.expand(y) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """A stem and four stages of bottlenecks; `width` 64 and blocks 3, 4, 6, 3 are ResNet-50."""

    def __init__(self, width: int, blocks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = _convolve(3, width, 7, 2)
        stages, channels = [], width
        for number, count in enumerate(blocks):
            for place in range(count):
                stages.append(Bottleneck(channels, width << number, 2 if number and not place else 1))
                channels = 4 * (width << number)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, h, w) to logits (batch, classes)."""
        y = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.stages(y).mean((2, 3)))  # type: ignore[no-any-return]  # torch has no types for it


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        y = self.before_attention(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.output(mixed)
        return x + self.down(functional.gelu(self.up(self.before_feed(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Blocks between an embedding of the inputs and a head on the first position."""

    def __init__(self, embedding: nn.Module, positions: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.places = nn.Parameter(0.02 * torch.randn(positions, width))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images or tokens (batch, positions) to logits (batch, classes)."""
        y = self.embedding(x) + self.places
        return self.head(self.norm(self.blocks(y))[:, 0])  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Square patches of an image as tokens, behind one that is learnt for the class."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, side, side)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, h, w) to (batch, 1 + patches, width)."""
        tokens = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), 1, -1), tokens], 1)


@dataclass(frozen=True)
class Shape:
    """A shape's knobs: what it sees, how wide and how deep it is."""

    kind: str  # "resnet", "vit" or "bert"
    width: int
    depth: tuple[int, ...]
    side: int = 0  # of an image in pixels
    tokens: int = 0  # of a text
    words: int = 0  # of its vocabulary
    classes: int = 10


SHAPES = {
    "resnet50": Shape("resnet", 64, (3, 4, 6, 3), side=224, classes=1000),
    "vit-b16": Shape("vit", 768, (12,), side=224, classes=1000),
    "bert-base": Shape("bert", 768, (12,), tokens=128, words=30522, classes=2),
    "resnet-small": Shape("resnet", 8, (1, 1, 1, 1), side=64),
    "vit-small": Shape("vit", 64, (2,), side=64),
    "bert-small": Shape("bert", 64, (2,), tokens=32, words=500),
}
_PATCH = 16


def make_net(shape: Shape) -> nn.Module:
    """Return the shape's model with random weights, the same each time, in evaluation mode."""
    torch.manual_seed(0)
    if shape.kind == "resnet":
        return BottleneckNet(shape.width, shape.depth, shape.classes).eval()
    if shape.kind == "vit":
        embedding: nn.Module = Patches(shape.width, _PATCH)
        positions = 1 + (shape.side // _PATCH) ** 2
    else:
        embedding, positions = nn.Embedding(shape.words, shape.width), shape.tokens
    return Encoder(embedding, positions, shape.width, shape.depth[0], shape.classes).eval()


def make_inputs(shape: Shape, samples: int) -> tuple[Tensor, ...]:
    """Return random inputs of a shape: smooth images (samples, 3, side, side), or tokens (samples, tokens)."""
    generator = torch.Generator().manual_seed(1)
    if shape.kind == "bert":
        return (torch.randint(0, shape.words, (samples, shape.tokens), generator=generator),)
    coarse = torch.randn(samples, 3, shape.side // 8, shape.side // 8, generator=generator)
    return (functional.interpolate(coarse, size=shape.side, mode="bilinear") + 0.1,)


def _convolve(channels_in: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    )
