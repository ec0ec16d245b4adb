"""Hidden states of many samples on their way through a decoder's blocks, on disk between them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.foundation.files import publish_file
from rankship_pipeline.models.decoder import Call, Decoder


def write_hidden(path: Path, parts: Iterable[Tensor]) -> None:
    """Write hidden states (samples, positions, width) part by part as raw float32."""
    with publish_file(path) as temporary, temporary.open("wb") as stream:
        for part in parts:
            part.contiguous().numpy().tofile(stream)


def read_hidden(path: Path, shape: Sequence[int], start: int, count: int) -> Tensor:
    """Hidden states of some samples of a file for `shape` (samples, positions); read, not mapped, to save memory."""
    each = path.stat().st_size // (4 * shape[0])  # numbers of one sample
    numbers = np.fromfile(path, np.float32, count=count * each, offset=4 * start * each)
    return torch.from_numpy(numbers).reshape(count, shape[1], -1)


@dataclass(frozen=True)
class Chunk:
    """Samples that run at once: how many, the place of the first in the files, and the half of the samples."""

    ids: Tensor
    start: int
    half: int

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.ids)


@dataclass(frozen=True)
class Passage:
    """Samples on their way through the blocks; `calls` are each block's by the number of samples that run at once.

    `folder` holds the hidden states that each block reads, and those behind the last, float32, in the chunks' order.
    """

    decoder: Decoder
    folder: Path
    shape: tuple[int, int]
    chunks: tuple[Chunk, ...]
    calls: Mapping[int, tuple[Call, ...]]

    def locate(self, index: int) -> Path:
        """The hidden states that a block reads."""
        return self.folder / f"inputs-{index:04d}.f32"

    def read(self, index: int, start: int, count: int) -> Tensor:
        """Some samples' hidden states (samples, positions, width) before a block."""
        return read_hidden(self.locate(index), self.shape, start, count)

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output of some samples, of as many as a chunk has, or of one."""
        return self.calls[len(hidden)][index].run(block, hidden)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, begin: Callable[[Chunk], None] = lambda _chunk: None) -> None:
        """Run one block on all samples, and write what it gives the next; `begin` is called before each chunk."""

        def run_all() -> Iterator[Tensor]:
            for chunk in self.chunks:
                begin(chunk)
                yield self.run(index, block, self.read(index, chunk.start, chunk.count))

        write_hidden(self.locate(index + 1), run_all())

    def find_latest(self, index: int) -> int | None:
        """The last block up to this one whose inputs are on disk; None where there is none."""
        return next((one for one in range(index, -1, -1) if self.locate(one).exists()), None)


@torch.no_grad()
def start_passage(
    decoder: Decoder, tokens: Tensor, folder: Path, chunk_tokens: int, *, needed: int, halved: bool = True
) -> Passage:
    """Embed ids (samples, positions), unless hidden states up to the block `needed` are on disk already.

    If `halved` the even samples stand before the odd ones, and no chunk has both.
    """
    front = decoder.load_front()
    size = max(1, chunk_tokens // tokens.shape[1])
    halves = [tokens[half::2] for half in range(min(2, len(tokens)))] if halved else [tokens]
    chunks, start = list[Chunk](), 0
    for half, some in enumerate(halves):
        for (ids,) in split((some,), size):
            chunks.append(Chunk(ids, start, half))
            start += len(ids)
    sizes = {len(ids): ids for ids in (tokens[:1], *(one.ids for one in chunks))}
    calls = {count: front.embed(ids)[1] for count, ids in sizes.items()}
    shape = (tokens.shape[0], tokens.shape[1])
    passage = Passage(decoder=decoder, folder=folder, shape=shape, chunks=tuple(chunks), calls=calls)
    if passage.find_latest(needed) is None:
        write_hidden(passage.locate(0), (front.embed(one.ids)[0] for one in chunks))
    return passage
