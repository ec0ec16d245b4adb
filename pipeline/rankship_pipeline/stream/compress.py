"""Compresses a decoder far larger than memory: calibrates, decomposes and writes one block at a time.

Two passes over the checkpoint, with the rank allocation between them:

    analyse_stream   each block's Grams, and its layers' factors up to the break-even rank, one file per block
    allocate_stream  ranks for every layer from the spectra only (see ranks/plan.py)
    write_stream     factors cut to the plan's ranks, and every other tensor unchanged, in shards with an index

Memory is bounded by the largest block in float32 with its Grams of two halves of the samples and its factors, or by
the embedding if that is larger. Hidden states of the calibration set are on disk, float32, the even samples before the
odd ones. Only the blocks' linear layers are factored.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.factors.decompose import WHITENINGS, decompose_outputs, decompose_swift, truncate
from rankship_pipeline.factors.forms import keep_efficient
from rankship_pipeline.factors.saved_model import describe_saved, write_saved
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file, publish_file, publish_folder
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Factors, RankPlan, Stored
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.decoder import Call, Decoder, open_decoder
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers
from rankship_pipeline.models.sharded import copy_settings, write_shards
from rankship_pipeline.models.weights import open_tensors
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import LayerStats, Offer
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RANK_METHODS
from rankship_pipeline.stream.block_grams import Grams, find_groups, read_hidden, write_hidden

Array = NDArray[np.floating[Any]]
Parts = tuple[Array, Array, Array]  # energy (r,) float64, B (keep, columns) and A (rows, keep) float32
# float32 is trusted only if the energy beyond the kept ranks exceeds this many float32 roundings of the largest, times
# the size: the tail is then accurate to 1e-4, measured on power-law spectra with and without an outlier.
_TRUSTED = 100
_TIMEOUT_S = 10  # for the scheduler to answer


@record
class StreamChoice:
    """How a checkpoint is streamed; `whitening` is a key of decompose.WHITENINGS, "swift" the fastest by far.

    `precision` is that of the decompositions: float32 takes half the time, but a layer whose spectrum is too steep for
    it (one massive activation is enough) is repeated in float64. Factors are stored as `dtype`, None for the weight's
    own. `workers` decompositions run at once, in threads that share this machine's cores; with a `scheduler` ("tcp://…")
    one per worker of a Dask cluster, with rankship installed on each. Dask runs any code that it receives: use it only
    on a network you trust. Layers that match a pattern in `exclude` stay dense. `shrink` is that of a recipe.
    """

    whitening: str = "swift"
    shrink: bool = True
    precision: Literal["float64", "float32"] = "float64"
    dtype: Literal["float32"] | None = None
    exclude: tuple[str, ...] = ()
    workers: int = 1
    scheduler: str | None = None
    chunk_tokens: int = 2048


@record
class BlockTimes:
    """One block's wall times; `forward_seconds` does not include the Grams, which are computed during the same pass."""

    index: int
    load_seconds: float
    forward_seconds: float
    gram_seconds: float
    decompose_seconds: float
    write_seconds: float


@dataclass(frozen=True)
class StreamAnalysis:
    """A decomposed decoder on disk: `folder` holds one file per block with every layer's energies and factors.

    `samples` are those that inputs were weighed by, None for a plain SVD.
    """

    folder: Path
    decoder: Decoder
    layers: tuple[Layer, ...]
    samples: int | None

    def locate(self, index: int) -> Path:
        """The file of one block."""
        return self.folder / f"block-{index:04d}.safetensors"

    def read_energy(self, layer: str) -> NDArray[np.float64]:
        """A layer's σ², descending."""
        with self._open(layer) as file:
            return np.asarray(file.get_tensor(f"{layer}.energy"))

    def read_shrinkage(self, layer: str) -> float | None:
        """The share of the inputs' correlations that the samples do not bear out; None where they are not asked."""
        with self._open(layer) as file:
            name = f"{layer}.shrinkage"
            return float(file.get_tensor(name)) if name in file.keys() else None  # noqa: SIM118 - safetensors has no in

    def read_factors(self, layer: str, rank: int) -> tuple[Tensor, Tensor]:
        """B (rank, columns) and A (rows, rank), balanced; reads only these parts of the file."""
        with self._open(layer) as file:
            B, A = file.get_slice(f"{layer}.0.weight")[:rank], file.get_slice(f"{layer}.1.weight")[:, :rank]
        return B.contiguous(), A.contiguous()

    def _open(self, layer: str) -> Any:  # noqa: ANN401 - safetensors has no types
        return open_tensors(self.locate(self.decoder.find_block(layer) or 0), f"layer {layer}")


@torch.inference_mode()
def analyse_stream(
    checkpoint: Path,
    tokens: Tensor,
    folder: Path,
    choice: StreamChoice,
    tick: Callable[[BlockTimes], None] = lambda _times: None,
) -> StreamAnalysis:
    """Decompose every block's linear layers, calibrated on unpadded ids (samples, positions).

    Finished blocks are in a subfolder of `folder`, named by a hash of the configuration, the checkpoint files' names,
    sizes and times, the ids, the choice and this package's code; none is done twice. `tick` is called after each new
    block.
    """
    decoder = open_decoder(checkpoint)
    _check(decoder, tokens, choice)
    found = [layer for layer in find_layers(decoder.model, choice.exclude) if layer.kind == "linear"]
    layers = tuple(layer for layer in found if decoder.find_block(layer.name) is not None)
    place = folder / f"analysis-{_make_key(decoder, tokens, choice)}"
    place.mkdir(parents=True, exist_ok=True)
    samples = None if choice.whitening == "plain" else len(tokens)
    analysis = StreamAnalysis(folder=place, decoder=decoder, layers=layers, samples=samples)
    _Work(analysis, tokens, choice, tick).run()
    return analysis


def gather_stream_stats(analysis: StreamAnalysis, choice: RankChoice) -> tuple[LayerStats, ...]:
    """The stats that allocation needs; InputError for methods that need more than whitened spectra."""
    if RANK_METHODS[choice.method].reads != "spectra" or choice.sensitivity not in {"auto", "relative"}:
        raise InputError(
            f"ranks by {choice.method!r} with sensitivity {choice.sensitivity!r} need the whole model in memory",
            hint='a streamed model has only whitened spectra: choose "knapsack", "uniform" or "strs" and "relative"',
        )
    stats = []
    for layer in (one for one in analysis.layers if not any(fnmatchcase(one.name, name) for name in choice.exclude)):
        bare = LayerStats(layer=layer, plain=np.zeros(0), energy=analysis.read_energy(layer.name), candidates=())
        offers = [Stored(factors=Factors(rank=rank)) for rank in bare.list_ranks(choice.step)]
        candidates = [Offer(one, bare.find_cost(one), bare.predict_error(one)) for one in offers]
        stats.append(replace(bare, candidates=keep_efficient(candidates)))
    return tuple(stats)


def allocate_stream(analysis: StreamAnalysis, budget_parameters: int, choice: RankChoice) -> RankPlan:
    """Allocate ranks under a budget for the whole model, with embedding, head, norms and biases.

    Errors are those on the shrunk Grams: a loss on unseen samples would take two more decompositions of every layer.
    losses.list_doubts says of the plan where samples were few.
    """
    stats = gather_stream_stats(analysis, choice)
    factorable = sum(entry.layer.parameters for entry in stats)
    plan = allocate(stats, count_parameters(analysis.decoder.model) - factorable, budget_parameters, choice)
    ranks = tuple(replace(one, shrinkage=analysis.read_shrinkage(one.name)) for one in plan.layers)
    return replace(plan, layers=ranks, calibration_samples=analysis.samples)


def write_stream(analysis: StreamAnalysis, plan: RankPlan, target: Path) -> None:
    """Write the compressed model as a new folder: shards with an index, settings and the plan; one block in memory.

    Tensor names are those of rebuild(model, plan.factors): `<layer>.0.weight` (rank, columns), `<layer>.1.weight`
    (rows, rank) and its bias. Every other tensor is copied as it is stored.
    """
    if target.exists():
        raise InputError(f"{target} exists already", hint="name a new folder, or delete this one")
    factors, checkpoint = plan.factors, analysis.decoder.checkpoint

    def convert(name: str) -> dict[str, Tensor]:
        layer, _, kind = name.rpartition(".")
        if layer not in factors:
            return {name: checkpoint.read(name)}
        if kind != "weight":
            return {f"{layer}.1.{kind}": checkpoint.read(name)}
        B, A = analysis.read_factors(layer, factors[layer].rank)
        return {f"{layer}.0.weight": B, f"{layer}.1.weight": A}

    with publish_folder(target) as folder:
        copy_settings(checkpoint.folder, folder)
        write_shards(folder, analysis.decoder.group_names(), convert)
        write_saved(folder, describe_saved(plan, analysis.decoder.model))


@dataclass(frozen=True)
class _Work:
    """One running analysis."""

    analysis: StreamAnalysis
    tokens: Tensor
    choice: StreamChoice
    tick: Callable[[BlockTimes], None]

    def run(self) -> None:
        """Analyse every block that has no file yet; earlier blocks run again if their outputs are gone."""
        decoder = self.analysis.decoder
        missing = [index for index in range(decoder.count) if not self.analysis.locate(index).exists()]
        if not missing:
            return
        front = decoder.load_front()
        size = max(1, self.choice.chunk_tokens // self.tokens.shape[1])
        halves = [self.tokens[half::2] for half in range(min(2, len(self.tokens)))]
        chunks = [_Chunk(ids, half) for half, some in enumerate(halves) for (ids,) in split((some,), size)]
        sizes = {len(ids): ids for ids in (self.tokens[:1], *(one.ids for one in chunks))}
        calls = {count: front.embed(ids)[1] for count, ids in sizes.items()}
        ready = [index for index in range(missing[0] + 1) if self._locate_inputs(index).exists()]
        if not ready:
            write_hidden(self._locate_inputs(0), (front.embed(one.ids)[0] for one in chunks))
        del front
        with open_pool(self.choice) as pool:
            for index in range(ready[-1] if ready else 0, missing[-1] + 1):
                runs = {size: found[index] for size, found in calls.items()}
                self._do(index, chunks, runs, pool)
        for path in [*self.analysis.folder.glob("inputs-*.f32"), *self.analysis.folder.glob(".*.tmp")]:
            path.unlink()

    def _do(self, index: int, chunks: Sequence["_Chunk"], runs: Mapping[int, Call], pool: "Pool") -> None:
        """Analyse one block: its Grams and the next block's inputs, then its file; only these inputs if it has a file.

        The next inputs are written before the block's file, and its own inputs deleted after it, so that nothing is
        lost when stopped at any point.
        """
        decoder, marks = self.analysis.decoder, [time.monotonic()]
        block, grams = decoder.load_block(index), Grams()
        marks.append(time.monotonic())
        is_done = self.analysis.locate(index).exists()
        prefix = f"{decoder.prefix}.{index}."
        wanted = [] if is_done else [one.name for one in self.analysis.layers if one.name.startswith(prefix)]
        names, is_swift = [name.removeprefix(prefix) for name in wanted], self.choice.whitening == "swift"
        read = partial(read_hidden, self._locate_inputs(index), self.tokens.shape)
        groups = find_groups(block, names, lambda: runs[1].run(block, read(0, 1)), outputs=is_swift)
        starts = np.cumsum([0, *(len(one.ids) for one in chunks[:-1])]).tolist()

        def run_all() -> Iterator[Tensor]:
            for at, one in zip(starts, chunks, strict=True):
                grams.half = one.half
                yield runs[len(one.ids)].run(block, read(at, len(one.ids)))

        with grams.collect(block, groups):
            write_hidden(self._locate_inputs(index + 1), run_all())
        marks.append(time.monotonic())
        if not is_done:
            tensors = self._take_apart(block, prefix, grams, pool)
            marks.append(time.monotonic())
            with publish_file(self.analysis.locate(index)) as path:
                save_file(tensors, path, metadata={"format": "pt"})
            marks.append(time.monotonic())
            load, forward, decompose, write = np.diff(marks).tolist()
            self.tick(
                BlockTimes(
                    index=index,
                    load_seconds=load,
                    forward_seconds=forward - grams.seconds,
                    gram_seconds=grams.seconds,
                    decompose_seconds=decompose,
                    write_seconds=write,
                )
            )
        self._locate_inputs(index).unlink()

    def _locate_inputs(self, index: int) -> Path:
        """The hidden states that a block reads: raw float32 (samples, positions, width)."""
        return self.analysis.folder / f"inputs-{index:04d}.f32"

    def _take_apart(self, block: nn.Module, prefix: str, grams: Grams, pool: "Pool") -> dict[str, Tensor]:
        """Every layer's energies and factors by their names in the block's file; empties `grams`."""
        pending: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        is_shrunk = self.choice.shrink and self.choice.whitening != "plain"
        for group in list(grams.sums):
            matrix, shrinkage = grams.take(group, block, len(self.tokens), shrunk=is_shrunk)
            if shrinkage is not None:
                share = torch.tensor(shrinkage, dtype=torch.float64)
                tensors |= {f"{prefix}{name}.shrinkage": share.clone() for name in group.names}
            gram = pool.hold(matrix.numpy())
            del matrix
            for name in group.names:
                weight = block.get_submodule(name).get_parameter("weight")
                keep = max(1, (weight.numel() - 1) // sum(weight.shape))  # break-even: more is not smaller than dense
                held = pool.hold(weight.numpy())
                work = (take_apart, held, gram, self.choice, keep)
                pending[prefix + name] = pool.submit(*work, by_output=group.by_output)
        for name in list(pending):
            stored = self.analysis.decoder.checkpoint.read(f"{name}.weight").dtype
            dtype = stored if self.choice.dtype is None else torch.float32
            energy, B, A = pending.pop(name).result()
            tensors |= {f"{name}.energy": torch.tensor(energy), f"{name}.0.weight": torch.tensor(B, dtype=dtype)}
            tensors[f"{name}.1.weight"] = torch.tensor(A, dtype=dtype)
        return tensors


@dataclass(frozen=True)
class _Chunk:
    """Ids that run at once, (samples, positions), and the half of the samples that they are of."""

    ids: Tensor
    half: int


def take_apart(weight: Array, gram: Array, choice: StreamChoice, keep: int, *, by_output: bool) -> Parts:
    """One layer's energies and balanced factors; takes and returns arrays, so that it can run on any thread or machine.

    With `by_output` the Gram is that of the outputs.
    """
    for dtype in (torch.float32, torch.float64) if choice.precision == "float32" else (torch.float64,):
        W, G = torch.tensor(weight, dtype=dtype), torch.tensor(gram, dtype=dtype)
        if by_output:
            spectrum = decompose_outputs(W, G, keep)
        elif choice.whitening == "swift":
            spectrum = decompose_swift(W, G, keep)
        else:
            spectrum = WHITENINGS[choice.whitening](W, G)
        del W, G
        rounding = torch.finfo(dtype).eps * len(spectrum.sigma) * spectrum.energy[0]
        if spectrum.energy[keep:].sum() >= _TRUSTED * rounding:
            break
    A, B = truncate(spectrum, keep)
    return spectrum.energy.double().numpy(), B.float().numpy(), A.float().numpy()


@dataclass(frozen=True)
class Pool:
    """The workers that decompose layers: `hold` sends them an array, `submit` starts a call, whose `result()` waits."""

    hold: Callable[[Array], Any]
    submit: Callable[..., Any]


@contextmanager
def open_pool(choice: StreamChoice) -> Iterator[Pool]:
    """Open threads that share the cores (LAPACK releases the GIL; processes would copy), or a Dask cluster."""
    if choice.scheduler is None:
        each = max(1, torch.get_num_threads() // choice.workers)
        with ThreadPoolExecutor(choice.workers, initializer=torch.set_num_threads, initargs=(each,)) as executor:
            yield Pool(lambda array: array, executor.submit)
        return
    try:
        client = importlib.import_module("dask.distributed").Client(
            choice.scheduler, timeout=_TIMEOUT_S, set_as_default=False
        )
    except ImportError:
        raise InputError("scheduler: Dask is not installed", hint="pip install 'rankship[dask]'") from None
    except (OSError, ValueError) as failure:
        raise InputError(f"no Dask scheduler at {choice.scheduler}: {failure}", hint="run `dask scheduler`") from None
    with client:
        yield Pool(client.scatter, partial(client.submit, pure=False))


def _check(decoder: Decoder, tokens: Tensor, choice: StreamChoice) -> None:
    vocabulary = decoder.model.config.get_text_config().vocab_size
    is_table = tokens.ndim == 2 and tokens.dtype == torch.int64 and tokens.numel() > 0  # noqa: PLR2004
    if not is_table or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(
            f"calibration tokens of {tokens.dtype}, shape {list(tokens.shape)}, do not fit",
            hint=f"give int64 (samples, positions), from 0 to {vocabulary - 1}",
        )
    if choice.whitening not in WHITENINGS:
        raise InputError(f"no whitening {choice.whitening!r}", hint=f"choose one of {', '.join(WHITENINGS)}")


def _make_key(decoder: Decoder, tokens: Tensor, choice: StreamChoice) -> str:
    """The first 16 characters of the hash of everything that affects the analysis."""
    ingredients = {
        "config": hash_file(decoder.checkpoint.folder / "config.json"),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in decoder.checkpoint.files},
        "tokens": [*tokens.shape, sha256(tokens.contiguous().numpy().tobytes()).hexdigest()],
        "choice": encode(replace(choice, workers=1, scheduler=None)),
        "code": [hash_code(), list_versions()],
    }
    return digest(ingredients)[:16]
