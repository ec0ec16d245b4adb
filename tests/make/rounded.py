"""Nets whose weights lie on grids of 8 and 4 bits."""

import torch
from torch import Tensor, nn

from rankship_pipeline.export.rounded_weight import RoundedWeight, store
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.quantise.grid import LARGEST

BLOCK = 32


class Text(nn.Module):
    """A transformer's layers of all kinds that are rounded: look-ups, pairs of odd and even width, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.marks, self.first = nn.Embedding(40, 160), nn.Embedding(40, 160), nn.LayerNorm(160)
        self.odd = nn.Sequential(nn.Linear(160, 7, bias=False), nn.Linear(7, 160))
        self.even = nn.Sequential(nn.Linear(160, 32, bias=False), nn.Linear(32, 160))
        self.wide, self.last, self.head = nn.Linear(160, 160), nn.LayerNorm(160), nn.Linear(160, 5)
        self.tied = nn.Linear(160, 40, bias=False)
        self.tied.weight = self.words.weight
        nn.init.normal_(self.first.weight)  # a converter may multiply it into the layers that follow
        nn.init.normal_(self.last.weight)

    def forward(self, places: Tensor) -> Tensor:
        x = self.first(self.words(places) + self.marks(places))
        x = self.wide(self.last(x + self.even(torch.tanh(self.odd(x)))))
        return torch.cat([self.head(x), self.tied(x)], -1)


class Image(nn.Module):
    """A convolution of every kind that is rounded, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.apart = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pair = nn.Sequential(nn.Conv2d(8, 5, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(5, 8, (1, 3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.pair(torch.relu(self.apart(torch.relu(self.dense(x))))))
        return torch.as_tensor(self.head(y.mean((2, 3))))


def round_net(net: nn.Module, four: tuple[str, ...] = ()) -> tuple[RoundedWeight, ...]:
    """Put every weight of a net on its grid: 4 bits in blocks of 32 for those named, 8 bits a row for others."""
    found = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            precision: Precision = "int4" if name in four else "int8"
            weight, one = round_weight(name, layer.weight.detach(), precision)
            layer.weight.data = weight
            found.append(one)
    net.eval()
    return tuple(found)


def round_weight(name: str, weight: Tensor, precision: Precision) -> tuple[Tensor, RoundedWeight]:
    """A weight on its grid, with scales that fit bfloat16, and as a file stores it."""
    rows, limit = len(weight), LARGEST[precision]
    blocks = weight.reshape(rows, -1, BLOCK if precision == "int4" else weight[0].numel())
    scales = (blocks.abs().amax(-1, keepdim=True) / limit).bfloat16().float()
    integers = (blocks / scales).round().clamp(-limit, limit)
    largest = blocks.abs().argmax(-1, keepdim=True)
    integers.scatter_(-1, largest, blocks.gather(-1, largest).sign() * limit)
    return (integers * scales).reshape(weight.shape), store(name, precision, integers.to(torch.int8), scales[..., 0])
