"""Takes blocks apart in their own order, each during one forward pass: errors count as shares of a layer's outputs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.stream.analysis import StreamAnalysis, find_keep, gather_parts, write_block
from rankship_pipeline.stream.block_grams import Grams, find_groups
from rankship_pipeline.stream.choice import BlockTimes, StreamChoice, time_block
from rankship_pipeline.stream.passage import Chunk, Passage, start_passage
from rankship_pipeline.stream.progress import Begin
from rankship_pipeline.stream.workers import Pool, take_apart


@dataclass(frozen=True)
class Forwards:
    """One running analysis without curvature."""

    analysis: StreamAnalysis
    tokens: Tensor
    choice: StreamChoice
    begin: Begin
    tick: Callable[[BlockTimes], None]

    def run(self, pool: Pool) -> None:
        """Analyse every block that has no file yet; earlier blocks run again if their outputs are gone."""
        analysis, missing = self.analysis, self.analysis.missing
        folder, size = analysis.folder, self.choice.chunk_tokens
        passage = start_passage(analysis.decoder, self.tokens, folder, size, needed=missing[0])
        for index in range(passage.find_latest(missing[0]) or 0, missing[-1] + 1):
            self.begin("analyse blocks", f"block {index}", missing[-1] + 1 - index)
            self._do(index, passage, pool)

    @torch.inference_mode()
    def _do(self, index: int, passage: Passage, pool: Pool) -> None:
        """Analyse one block: its Grams and the next block's inputs, then its file; only these inputs if it has a file.

        The next inputs are written before the block's file, and its own inputs deleted after it, so that nothing is
        lost when stopped at any point.
        """
        analysis, marks = self.analysis, [time.monotonic()]
        block, grams = analysis.decoder.load_block(index), Grams()
        marks.append(time.monotonic())
        is_done = analysis.locate(index).exists()
        names = {} if is_done else {analysis.name_within(one): one for one in analysis.list_layers(index)}
        wide = {name for name, one in names.items() if self.choice.whitening == "swift" and one.rows < one.columns}
        groups = find_groups(
            block, list(names), lambda: passage.run(index, block, passage.read(index, 0, 1)), by_output=wide
        )

        def start(chunk: Chunk) -> None:
            grams.half = chunk.half

        with grams.collect(block, groups):
            passage.advance(index, block, start)
        marks.append(time.monotonic())
        if not is_done:
            tensors = self._take_apart(block, {name: one.name for name, one in names.items()}, grams, pool)
            marks.append(time.monotonic())
            write_block(analysis.locate(index), tensors)
            marks.append(time.monotonic())
            self.tick(time_block(index, marks, grams.seconds))
        passage.locate(index).unlink()

    def _take_apart(self, block: nn.Module, full: Mapping[str, str], grams: Grams, pool: Pool) -> dict[str, Tensor]:
        """Every layer's energies and factors by their names in the block's file; empties `grams`."""
        pending, shares = dict[str, Any](), dict[str, Tensor]()
        is_shrunk = self.choice.shrink and self.choice.whitening != "plain"
        for group in list(grams.sums):
            matrix, shrinkage = grams.take(group, block, len(self.tokens), shrunk=is_shrunk)
            if shrinkage is not None:
                share = torch.tensor(shrinkage, dtype=torch.float64)
                shares |= {f"{full[name]}.shrinkage": share.clone() for name in group.names}
            gram = pool.hold(matrix.numpy())
            del matrix
            for name in group.names:
                weight = block.get_submodule(name).get_parameter("weight")
                submit = partial(pool.submit, take_apart, pool.hold(weight.numpy()), gram, self.choice)
                pending[full[name]] = submit(find_keep(weight), by_output=group.by_output)
        return gather_parts(self.analysis, self.choice, pending) | shares
