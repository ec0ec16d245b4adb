"""A decoder language model on disk, brought into memory and watched one block at a time.

Works for transformers models whose decoder layers are one ModuleList, each called with hidden states (samples,
positions, width) and giving the next: LLaMA, Mistral, Gemma, Qwen2 and Qwen3 with grouped-query attention, and so on.
"""

import copy
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError

INDEX = "model.safetensors.index.json"
_FETCH = "fetch that file again, or save the model again with save_pretrained"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, sharded or not; `places` says which file holds which tensor."""

    folder: Path
    places: Mapping[str, Path]

    @property
    def files(self) -> list[Path]:
        """Every file that holds a tensor, sorted."""
        return sorted(set(self.places.values()))

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored; nothing else is read, and NaN is refused as in every checkpoint."""
        with _open(self.locate(name), f"tensor {name}") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"tensor {name} in {self.locate(name)} holds NaN or infinity", hint=_FETCH)
        return tensor

    def read_shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        with _open(self.locate(name), f"tensor {name}") as file:
            return tuple(file.get_slice(name).get_shape())

    def locate(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self.places:
            files = ", ".join(path.name for path in self.files)
            raise InputError(f"tensor {name} is in none of {self.folder}'s files ({files})", hint=_FETCH)
        return self.places[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find every tensor, by the index or by the files' own headers.

    Missing and truncated files are refused here, before any long work: InputError naming a tensor and the file.
    """
    places = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
    if places:
        for path in sorted(set(places.values())):
            names = [name for name, place in places.items() if place == path]
            with _open(path, f"tensor {names[0]}") as file:
                lost = sorted(set(names) - set(file.keys()))
            if lost:
                raise InputError(f"{path} lacks tensor {lost[0]}, which the index says it holds", hint=_FETCH)
    for path in [] if places else sorted(folder.glob("*.safetensors")):
        with _open(path, "its tensors") as file:
            places |= dict.fromkeys(file.keys(), path)
    if not places:
        raise InputError(f"{folder} has no *.safetensors", hint="save the model again with save_pretrained")
    return Checkpoint(folder=folder, places=places)


def read_index(path: Path) -> dict[str, Path]:
    """Which file holds which tensor, as Hugging Face's index says."""
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no index of safetensors files", hint=_FETCH) from None


@contextmanager
def _open(path: Path, wanted: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as failure:
        reason = f"is not a whole safetensors file ({failure})" if path.exists() else "is missing"
        raise InputError(f"{wanted} cannot be read: {path} {reason}", hint=_FETCH) from None


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success the file there becomes `path` in one rename, else it vanishes."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_hidden(path: Path, parts: Iterable[Tensor]) -> None:
    """Hidden states (samples, positions, width) of all samples, part by part: raw float32."""
    with publish_file(path) as temporary, temporary.open("wb") as stream:
        for part in parts:
            part.contiguous().numpy().tofile(stream)


def read_hidden(path: Path, shape: Sequence[int], start: int, count: int) -> Tensor:
    """Hidden states of some samples of a file of `shape` (samples, positions); read, not mapped: memory stays free."""
    each = path.stat().st_size // (4 * shape[0])  # numbers of one sample
    numbers = np.fromfile(path, np.float32, count=count * each, offset=4 * start * each)
    return torch.from_numpy(numbers).reshape(count, shape[1], -1)


def write_shards(folder: Path, groups: Sequence[Sequence[str]], convert: Callable[[str], Mapping[str, Tensor]]) -> None:
    """One safetensors file per group of tensor names, each name as `convert` gives it, and Hugging Face's index."""
    places: dict[str, str] = {}
    size_bytes = 0
    for number, names in enumerate(groups, 1):
        tensors = {new: tensor for name in names for new, tensor in convert(name).items()}
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states: masks, positions, rotary embeddings."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output, the next block's hidden states (samples, positions, width)."""
        output = block(hidden, *self.positional, **self.named)
        if not isinstance(output, Tensor):
            _refuse(f"{type(block).__name__} gives a {type(output).__name__} instead of hidden states")
        return output


@dataclass(frozen=True)
class Decoder:
    """A checkpoint and its architecture; `model` holds no numbers (meta device), its blocks are listed at `prefix`."""

    checkpoint: Checkpoint
    model: Any
    prefix: str

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(list(self.model.get_submodule(self.prefix).children()))

    def find_block(self, name: str) -> int | None:
        """The number of the block that a layer or tensor belongs to; None outside the blocks."""
        inside = name.removeprefix(self.prefix + ".")
        return None if inside == name else int(inside.partition(".")[0])

    def group_names(self) -> list[list[str]]:
        """The checkpoint's tensors, those of one block together, and those of one module outside the blocks."""
        groups: dict[object, list[str]] = {}
        for name in sorted(self.checkpoint.places):
            block = self.find_block(name)
            groups.setdefault(name.rpartition(".")[0] if block is None else block, []).append(name)
        return list(groups.values())

    def load_block(self, index: int) -> nn.Module:
        """One block with its weights, float32."""
        name = f"{self.prefix}.{index}"
        return self._load(copy.deepcopy(self.model.get_submodule(name)), name)

    def load_front(self) -> "Front":
        """What runs before the first block, with its weights, float32: the embedding, and next to nothing else."""
        parent, _, child = self.prefix.rpartition(".")
        blocks, calls = list(self.model.get_submodule(self.prefix).children()), list[Call]()
        recorders = nn.ModuleList(_Recorder(block, calls, len(blocks)) for block in blocks)
        shell = copy.copy(self.model.get_submodule(parent))
        shell._modules = {**shell._modules, child: recorders}  # noqa: SLF001 - the model itself keeps its blocks
        return Front(self._load(copy.deepcopy(shell), parent), calls)

    def _load(self, module: nn.Module, name: str) -> nn.Module:
        restore_buffers(self.model, module)
        state = {}
        for key in module.state_dict():
            tensor = self.checkpoint.read(f"{name}.{key}" if name else key)
            state[key] = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Front:
    """The model's own forward pass up to its first block."""

    module: nn.Module
    calls: list[Call]

    def embed(self, tokens: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """Hidden states (samples, positions, width) of ids (samples, positions), and every block's call.

        Calls depend on the shape of the ids only.
        """
        self.calls.clear()
        try:
            self.module(input_ids=tokens, use_cache=False)
        except _LastBlockReached as reached:
            return reached.hidden, tuple(self.calls)
        return _refuse(f"{type(self.module).__name__} calls {len(self.calls)} of its blocks")


class _LastBlockReached(Exception):
    """The way out of a forward pass."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Recorder(nn.Module):
    """Stands for a block, notes how it is called and passes the hidden states on unchanged."""

    def __init__(self, block: nn.Module, calls: list[Call], count: int) -> None:
        super().__init__()
        self._stands_for = (block,)  # in a tuple it is no submodule, and nothing of it is loaded
        self._calls, self._count = calls, count

    def __deepcopy__(self, _memo: object) -> "_Recorder":
        return self  # the list of calls is shared with whoever reads it

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the model asks its blocks for
        return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden: Tensor, *positional: object, **named: object) -> Tensor:
        self._calls.append(Call(positional, named))
        if len(self._calls) == self._count:
            raise _LastBlockReached(hidden)
        return hidden


def open_decoder(folder: Path) -> Decoder:
    """Read the configuration, build the architecture without numbers and check that every tensor is there and fits."""
    checkpoint, model = open_checkpoint(folder), make_empty(folder)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        _refuse(f"{type(model).__name__} has no ModuleList of its {count} blocks")
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)  # two names: tied
    for aliases in names.values():
        stored = [name for name in aliases if name in checkpoint.places] or aliases
        expected, shape = tuple(tensors[stored[0]].shape), checkpoint.read_shape(stored[0])
        if shape != expected:
            raise InputError(
                f"tensor {stored[0]} in {checkpoint.locate(stored[0])} has shape {list(shape)}, config.json says"
                f" {list(expected)}",
                hint="give a config.json and weights of the same model",
            )
    return Decoder(checkpoint=checkpoint, model=model, prefix=lists[0])


def make_empty(folder: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """The architecture that config.json describes, with every tensor on the meta device."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        make: Any = transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            return make(config, dtype=torch.float32).eval()
    except (ValueError, KeyError, OSError) as failure:
        raise InputError(
            f"{folder / 'config.json'} describes no causal language model: {failure}",
            hint="give the folder of a decoder such as LLaMA or Qwen",
        ) from None


def restore_buffers(model: Any, module: nn.Module) -> None:  # noqa: ANN401 - transformers has no types
    """Compute the buffers that no checkpoint holds (rotary frequencies) as transformers does; before any weight loads.

    Its `_init_weights` may reset the weights beside a buffer, too: they must still be on the meta device.
    """
    for part in module.modules():
        lost = {name: buffer for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in lost.items():
            setattr(part, name, torch.empty_like(buffer, device="cpu"))
        if lost:
            model._init_weights(part)  # noqa: SLF001 - its contract includes these buffers


@dataclass(frozen=True)
class Group:
    """Linear layers of a block (names within it) that read the same tensors, and so share one Gram.

    `by_output` where it is taken of the only layer's outputs without bias, (rows, rows), and not of the inputs.
    """

    names: tuple[str, ...]
    by_output: bool = False


def find_groups(block: nn.Module, names: Sequence[str], run: Callable[[], object], *, outputs: bool) -> list[Group]:
    """Run the block once and see which layers are given the very same tensors: query, key and value; gate and up.

    With `outputs`, a layer that shares with none and has fewer outputs than inputs goes by its outputs.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}  # holding the tensors keeps their ids apart
    with ExitStack() as stack:
        for name, tensors in seen.items():
            stack.enter_context(_watch(block, name, lambda x, _y, tensors=tensors: tensors.append(x)))  # type: ignore[misc]
        run()
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in seen.items():
        if not tensors:
            raise InputError(f"layer {name} of a block never ran", hint="list it in exclude: it stays dense")
        sharing.setdefault(tuple(map(id, tensors)), []).append(name)
    groups = []
    for alike in sharing.values():
        rows, columns = block.get_submodule(alike[0]).get_parameter("weight").shape
        groups.append(Group(tuple(alike), by_output=outputs and len(alike) == 1 and rows < columns))
    return groups


@dataclass
class Grams:
    """One uncentred Gram per group, summed over whatever runs: float64 sums of float32 inputs' or float64 outputs'."""

    seconds: float = 0.0
    sums: dict[Group, Tensor] = field(default_factory=dict)

    @contextmanager
    def collect(self, block: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
        """Add what runs through the block."""
        with ExitStack() as stack:
            for group in groups:
                bias = block.get_submodule(group.names[0]).bias

                def add(x: Tensor, y: Tensor, group: Group = group, bias: Any = bias) -> None:  # noqa: ANN401 - Tensor | None
                    begun = time.monotonic()
                    if group.by_output:
                        x = (y if bias is None else y - bias).double()
                    rows = x.flatten(0, -2)
                    product = rows.T @ rows
                    self.sums[group] = self.sums[group].add_(product) if group in self.sums else product.double()
                    self.seconds += time.monotonic() - begun

                stack.enter_context(_watch(block, group.names[0], add))
            yield


@contextmanager
def _watch(block: nn.Module, name: str, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(input, output)` whenever a layer has run."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> None:
        see(args[0] if args else named["input"], y)

    handle = block.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _refuse(reason: str) -> NoReturn:
    raise InputError(reason, hint="this architecture cannot be streamed: compress it in memory")
