"""A decoder language model on disk, loaded one block at a time.

Works for transformers models whose decoder layers are one ModuleList, each mapping hidden states (samples, positions,
width) to the next: LLaMA, Mistral, Gemma, Qwen2 and Qwen3 with grouped-query attention, and so on.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.model_config import read_json
from rankship_pipeline.models.sharded import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides its hidden states: masks, positions, rotary embeddings."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output, the next block's hidden states (samples, positions, width)."""
        output = block(hidden, *self.positional, **self.named)
        if not isinstance(output, Tensor):
            _refuse(f"{type(block).__name__} returns a {type(output).__name__} instead of hidden states")
        return output


@dataclass(frozen=True)
class Decoder:
    """A checkpoint and its architecture; `model` is on the meta device, its list of blocks has the name `prefix`."""

    checkpoint: Checkpoint
    model: Any
    prefix: str

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(list(self.model.get_submodule(self.prefix).children()))

    def find_block(self, name: str) -> int | None:
        """The index of the block with this layer or tensor; None outside the blocks."""
        inside = name.removeprefix(self.prefix + ".")
        return None if inside == name else int(inside.partition(".")[0])

    def group_names(self) -> list[list[str]]:
        """The names of the checkpoint's tensors, grouped by block, and outside the blocks by module."""
        groups: dict[object, list[str]] = {}
        for name in sorted(self.checkpoint.places):
            block = self.find_block(name)
            groups.setdefault(name.rpartition(".")[0] if block is None else block, []).append(name)
        return list(groups.values())

    def load_block(self, index: int) -> nn.Module:
        """Load one block with its weights in float32."""
        name = f"{self.prefix}.{index}"
        return self._load(copy.deepcopy(self.model.get_submodule(name)), name)

    def load_front(self) -> "Front":
        """Load the part before the first block with its weights in float32: the embedding and little else."""
        calls, count = list[Call](), self.count

        def record(hidden: Tensor, call: Call) -> Tensor:
            calls.append(call)
            if len(calls) == count:
                raise _LastBlockReached(hidden)
            return hidden

        parent, _, child = self.prefix.rpartition(".")
        shell = _replace(self.model.get_submodule(parent), child, self._stand_in(record))
        return Front(self._load(copy.deepcopy(shell), parent), calls)

    def load_back(self) -> "Back":
        """Load the part behind the last block with its weights in float32: the last norm, the head and little else."""
        given = list[Tensor]()
        shell = _replace(self.model, self.prefix, self._stand_in(lambda _hidden, _call: given[0]))
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        shell = _replace(shell, name, _Blank(embedding.weight.shape[1]))
        return Back(self._load(copy.deepcopy(shell), ""), given)

    def _stand_in(self, act: Callable[[Tensor, Call], Tensor]) -> nn.ModuleList:
        """Modules in the blocks' places that do `act` instead."""
        return nn.ModuleList(_StandIn(block, act) for block in self.model.get_submodule(self.prefix).children())

    def _load(self, module: nn.Module, name: str) -> nn.Module:
        restore_buffers(self.model, module)
        stored, read = self._find_stored(), dict[str, Tensor]()
        state = {}
        for key in module.state_dict():
            place = stored[f"{name}.{key}" if name else key]
            if place not in read:
                tensor = self.checkpoint.read(place)
                read[place] = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
            state[key] = read[place]
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(requires_grad=False)

    def _find_stored(self) -> dict[str, str]:
        """The name in the checkpoint of each of the model's tensors, of which tied ones are stored once."""
        return {
            name: next((one for one in names if one in self.checkpoint.places), name)
            for names in group_aliases(self.model)
            for name in names
        }


@dataclass(frozen=True)
class Front:
    """The model's own forward pass up to its first block."""

    module: nn.Module
    calls: list[Call]

    def embed(self, tokens: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """Hidden states (samples, positions, width) of ids (samples, positions), and every block's call.

        The calls depend only on the shape of the ids.
        """
        self.calls.clear()
        try:
            self.module(input_ids=tokens, use_cache=False)
        except _LastBlockReached as reached:
            return reached.hidden, tuple(self.calls)
        return _refuse(f"{type(self.module).__name__} calls only {len(self.calls)} of its blocks")


@dataclass(frozen=True)
class Back:
    """The model's own forward pass behind its last block; `given` holds the hidden states while it runs."""

    module: nn.Module
    given: list[Tensor]

    def read(self, hidden: Tensor) -> Tensor:
        """Logits (samples, positions, vocabulary) of the last block's output (samples, positions, width)."""
        self.given[:] = [hidden]
        try:
            logits: Tensor = self.module(
                input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long), use_cache=False
            ).logits
        finally:
            self.given.clear()
        return logits


class _LastBlockReached(Exception):
    """Ends a forward pass at its last block."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Blank(nn.Module):
    """Replaces an embedding whose output nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self._width)


class _StandIn(nn.Module):
    """Replaces a block, and does something else with its hidden states and its call."""

    def __init__(self, block: nn.Module, act: Callable[[Tensor, Call], Tensor]) -> None:
        super().__init__()
        self._stands_for = (block,)  # in a tuple it is not a submodule, and its weights are not loaded
        self._act = act

    def __deepcopy__(self, _memo: object) -> "_StandIn":
        return self  # so that Front and Back see the same lists

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute that the model reads from its blocks
        return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, hidden: Tensor, *positional: object, **named: object) -> Tensor:
        return self._act(hidden, Call(positional, named))


def _replace(module: nn.Module, name: str, other: nn.Module) -> nn.Module:
    """A shallow copy of a module with another one under a dotted name; the original stays as it is."""
    first, _, rest = name.partition(".")
    shell = copy.copy(module)
    inside = _replace(module.get_submodule(first), rest, other) if rest else other
    shell._modules = {**module._modules, first: inside}  # noqa: SLF001 - setattr would change the original too
    return shell


def group_aliases(model: nn.Module) -> list[list[str]]:
    """The names of a model's tensors, those of tied ones together."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def open_decoder(folder: Path, restructure: Callable[[Any], Any] = lambda model: model) -> Decoder:
    """Read the configuration, build the architecture without weights and check that every tensor exists and fits.

    `restructure` makes of the dense architecture that of the checkpoint, where its layers are stored in another way.
    """
    refuse_quantised(folder)
    checkpoint, model = open_checkpoint(folder), make_empty(folder)
    with torch.device("meta"):
        model = restructure(model)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        _refuse(f"{type(model).__name__} has no ModuleList with its {count} blocks")
    tensors = model.state_dict(keep_vars=True)
    for aliases in group_aliases(model):
        stored = [name for name in aliases if name in checkpoint.places] or aliases
        expected, shape = tuple(tensors[stored[0]].shape), checkpoint.read_shape(stored[0])
        if shape != expected:
            raise InputError(
                f"tensor {stored[0]} in {checkpoint.locate(stored[0])} has shape {list(shape)}, config.json says"
                f" {list(expected)}",
                hint="give a config.json and weights of the same model",
            )
    return Decoder(checkpoint=checkpoint, model=model, prefix=lists[0])


def refuse_quantised(folder: Path) -> None:
    """Raise InputError for a quantised model, whose integers mean nothing without the code that unpacks them."""
    quantised = read_json(folder / "config.json").get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{folder} is stored quantised ({method}): its packed weights cannot be read as numbers",
            hint="give the model as it was before it was quantised",
        )


def make_empty(folder: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """The architecture that config.json describes, with every tensor on the meta device."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        make: Any = transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            return make(config, dtype=torch.float32, trust_remote_code=False).eval()
    except (ValueError, KeyError, OSError) as failure:
        raise InputError(
            f"{folder / 'config.json'} does not describe a causal language model: {failure}",
            hint="give the folder of a decoder such as LLaMA or Qwen",
        ) from None


def restore_buffers(model: Any, module: nn.Module) -> None:  # noqa: ANN401 - transformers has no types
    """Compute the buffers that are not in checkpoints (rotary frequencies) as transformers does; call before loading.

    Its `_init_weights` may also reset weights beside a buffer: they must still be on the meta device.
    """
    for part in module.modules():
        lost = {name: buffer for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in lost.items():
            setattr(part, name, torch.empty_like(buffer, device="cpu"))
        if lost:
            model._init_weights(part)  # noqa: SLF001 - its contract includes these buffers


def _refuse(reason: str) -> NoReturn:
    raise InputError(reason, hint="this architecture cannot be streamed: compress it in memory")
