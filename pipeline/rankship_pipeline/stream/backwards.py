"""Takes blocks apart from the last to the first, weighing errors by their effect on the model's own predictions.

Three passes over the samples, each a block at a time, with all hidden states on disk:

    forwards     what every block reads
    the head     the gradient of one random-sign draw of the model's own predictions (evaluate/likelihood.py) at its
                 inputs
    backwards    each block forwards again and then backwards: Grams of its layers' inputs, curvatures at their outputs
                 (E g·gᵀ over the samples' positions, as evaluate/curvature.py collects them), the gradient at the
                 block's inputs for the block before it, and the layers' best factors under both matrices

Layers and predictions are as in memory: the same metric (decompose.fit_metric), the same second-order damage in nats.
Where one side of a layer is far the longer, its matrix is of the shorter side (Layer.is_wide, Layer.is_tall).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import find_dtype
from rankship_pipeline.evaluate.likelihood import Answer, draw_predictions
from rankship_pipeline.evaluate.masks import Masks
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.watch import fork_inputs, watch
from rankship_pipeline.stream.analysis import StreamAnalysis, find_keep, gather_parts, write_block
from rankship_pipeline.stream.block_grams import Grams, Group, count_halves, find_groups
from rankship_pipeline.stream.choice import BlockTimes, StreamChoice, time_block
from rankship_pipeline.stream.passage import Passage, read_hidden, start_passage, write_hidden
from rankship_pipeline.stream.progress import Begin
from rankship_pipeline.stream.workers import Pool, take_apart_curved

_LOGIT_BYTES = 2**28  # of one part of the samples' logits


@dataclass
class Curvatures:
    """Sums of g·gᵀ of the even and of the odd samples, (2, n, n), of every layer, by its name within the block."""

    layers: dict[str, Layer]
    half: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def collect(self, block: nn.Module, stack: ExitStack) -> None:
        """Add those of every backward pass through the block until the stack is closed."""
        tall = {name for name, layer in self.layers.items() if layer.is_tall}
        stack.enter_context(fork_inputs(block, tall))
        stack.enter_context(watch(block, self.layers, self._hook))

    def take_halves(self, name: str, samples: int, positions: int) -> Tensor:
        """Remove a layer; its curvatures of the two halves of the samples, averaged over their positions."""
        counts = count_halves(samples) * positions
        found = self.sums.pop(name)
        return found.div_(counts[:, None, None].to(found.dtype))

    def _hook(self, name: str, x: Tensor, y: Tensor) -> None:
        hooked = x if self.layers[name].is_tall else y
        hooked.register_hook(lambda gradient: self._add(name, gradient))  # type: ignore[no-untyped-call]  # torch types no hook

    def _add(self, name: str, gradient: Tensor) -> None:
        size = gradient.shape[-1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(2, size, size, dtype=find_dtype(size))
        g = gradient.flatten(0, -2).to(self.sums[name].dtype)
        self.sums[name][self.half].addmm_(g.T, g)


@dataclass(frozen=True)
class Backwards:
    """One running analysis with curvature."""

    analysis: StreamAnalysis
    tokens: Tensor
    choice: StreamChoice
    begin: Begin
    tick: Callable[[BlockTimes], None]

    def run(self, pool: Pool) -> None:
        """Analyse every block that has no file yet, the last one first.

        A stopped run goes on at the block that it stopped in: a block's gradients and inputs are deleted only once its
        file and the gradients for the block before it are written.
        """
        decoder, missing = self.analysis.decoder, self.analysis.missing
        top = next((at for at in range(missing[-1] + 1, decoder.count + 1) if self._locate(at).exists()), None)
        needed = range(missing[0], decoder.count + 1 if top is None else top)
        folder, size = self.analysis.folder, self.choice.chunk_tokens
        passage = start_passage(decoder, self.tokens, folder, size, needed=needed[0])
        lacking = [at - 1 for at in range(1, needed[-1] + 1) if self._is_lacking(at, needed[0], passage)]
        for done, index in enumerate(lacking):
            self.begin("run blocks forwards", f"block {index}", len(lacking) - done)
            passage.advance(index, decoder.load_block(index))
        if top is None:
            self.begin("draw predictions", "head", 1)
            self._draw(passage)
            passage.locate(decoder.count).unlink()
            top = decoder.count
        for index in range(top - 1, missing[0] - 1, -1):
            self.begin("analyse blocks backwards", f"block {index}", index + 1 - missing[0])
            self._do(index, passage, pool)

    @staticmethod
    def _is_lacking(at: int, first: int, passage: Passage) -> bool:
        """Whether a block's inputs are still to be made: from `first` on all, before it those on the way."""
        return not passage.locate(at).exists() and (at >= first or at > (passage.find_latest(first) or 0))

    def _locate(self, index: int) -> Path:
        """The gradients at a block's inputs, or at the last block's outputs."""
        return self.analysis.folder / f"gradients-{index:04d}.f32"

    def _draw(self, passage: Passage) -> None:
        """Write the gradients at the last block's outputs, of one draw of the model's predictions for every sample."""
        decoder, (samples, positions) = self.analysis.decoder, passage.shape
        back = decoder.load_back()
        vocabulary = decoder.model.config.get_text_config().vocab_size
        size = max(1, _LOGIT_BYTES // (4 * positions * vocabulary))
        generator = torch.Generator().manual_seed(self.choice.seed)

        def draw_all() -> Iterator[Tensor]:
            for start in range(0, samples, size):
                hidden = passage.read(decoder.count, start, min(size, samples - start)).requires_grad_()
                logits = {"logits": back.read(hidden)}
                for scalar in draw_predictions(logits, {"logits": Answer()}, {}, Masks(), generator):
                    scalar.backward()  # type: ignore[no-untyped-call]  # torch types no backward
                assert hidden.grad is not None  # noqa: S101 - there is one draw
                yield hidden.grad

        with torch.enable_grad():
            write_hidden(self._locate(decoder.count), draw_all())

    def _do(self, index: int, passage: Passage, pool: Pool) -> None:
        """Analyse one block and write the gradients at its inputs; only these if it has a file."""
        analysis, marks = self.analysis, [time.monotonic()]
        block, grams = analysis.decoder.load_block(index), Grams()
        marks.append(time.monotonic())
        is_done = analysis.locate(index).exists()
        named = {} if is_done else {analysis.name_within(one): one for one in analysis.list_layers(index)}
        named = {name: replace(one, only_factored=True) for name, one in named.items()}
        with torch.no_grad():
            groups = find_groups(
                block,
                list(named),
                lambda: passage.run(index, block, passage.read(index, 0, 1)),
                by_output={name for name, one in named.items() if one.is_wide},
            )
        curvatures = Curvatures(layers=named)
        self._go_back(index, block, passage, grams, groups, curvatures)
        marks.append(time.monotonic())
        if not is_done:
            pending = self._submit(block, grams, groups, curvatures, pool)
            tensors = gather_parts(analysis, self.choice, pending)
            marks.append(time.monotonic())
            write_block(analysis.locate(index), tensors)
            marks.append(time.monotonic())
            self.tick(time_block(index, marks, grams.seconds))
        self._locate(index + 1).unlink()
        passage.locate(index).unlink()

    def _go_back(
        self,
        index: int,
        block: nn.Module,
        passage: Passage,
        grams: Grams,
        groups: list[Group],
        curvatures: Curvatures,
    ) -> None:
        """Run a block forwards and backwards on all samples; write the gradients at its inputs, and sum the rest up."""
        after = self._locate(index + 1)

        def run_all() -> Iterator[Tensor]:
            for chunk in passage.chunks:
                grams.half = curvatures.half = chunk.half
                hidden = passage.read(index, chunk.start, chunk.count).requires_grad_()
                gradient = read_hidden(after, passage.shape, chunk.start, chunk.count)
                passage.run(index, block, hidden).backward(gradient)  # type: ignore[no-untyped-call]  # torch's own
                assert hidden.grad is not None  # noqa: S101 - it is what the block reads
                yield hidden.grad

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            curvatures.collect(block, stack)
            stack.enter_context(grams.collect(block, groups))
            write_hidden(self._locate(index), run_all())

    def _submit(
        self, block: nn.Module, grams: Grams, groups: list[Group], curvatures: Curvatures, pool: Pool
    ) -> dict[str, Any]:
        """Every layer's decomposition under way, by its full name; empties both sums."""
        pending = dict[str, Any]()
        samples, positions = self.tokens.shape
        for group in groups:
            gram = pool.hold(grams.take_halves(group, samples).numpy())
            for name in group.names:
                weight = block.get_submodule(name).get_parameter("weight")
                curvature = pool.hold(curvatures.take_halves(name, samples, positions).numpy())
                work = (take_apart_curved, pool.hold(weight.numpy()), gram, curvature, self.choice, find_keep(weight))
                pending[curvatures.layers[name].name] = pool.submit(*work, samples=samples)
        return pending
