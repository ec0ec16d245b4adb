"""Reads LoRA adapters saved by peft, without peft, and adds them to the model that they were trained on."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.lora_config import CONFIG, LoraConfig, read_lora_config
from rankship_pipeline.models.skeleton import Skeleton
from rankship_pipeline.models.tensor_pieces import Readable
from rankship_pipeline.models.weights import State, read_state

WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"  # what peft wrote before safetensors
_PREFIX = "base_model.model."  # peft's prefix of the model's own names
_WRAPPED = ".base_layer."  # peft's name of the layer that it adapts, within the layer that stands in its place
_PARTS = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_MATRIX = 2  # dimensions of a linear layer's weight
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class LowRank:
    """An adapter's change of one weight of `shape`: s·BA with B (rows, r) and A (r, columns), computed in pieces."""

    B: Tensor
    A: Tensor
    scale: float
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some or all rows of the change, in the weight's shape, float64."""
        product = self.scale * (self.B[start:stop].to(torch.float64) @ self.A.to(torch.float64))
        return product.reshape(len(product), *self.shape[1:])


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor: the one it `held` in its place, if any, plus the product, if any."""

    held: Tensor | None
    product: LowRank | None

    def apply(self, stored: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of the changed tensor, from the same rows as stored; at least float32, rounded once."""
        rows = stored if self.held is None else self.held[start:stop] if self.held.ndim else self.held
        if self.product is not None:
            rows = rows.to(torch.float64) + self.product.read(start, stop)
        return rows.to(torch.promote_types(stored.dtype, torch.float32) if stored.is_floating_point() else stored.dtype)


@dataclass(frozen=True)
class AdaptedTensor:
    """A stored tensor as an adapter changes it; its type and shape are the stored one's."""

    stored: Readable
    change: Change

    @property
    def type_name(self) -> str:
        """The stored tensor's."""
        return self.stored.type_name

    @property
    def dtype(self) -> torch.dtype:
        """The stored tensor's."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored tensor's."""
        return self.stored.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows, or all, as `Change.apply` gives them."""
        return self.change.apply(self.stored.read(start, stop), start, stop)


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted layer as they are saved: A (r, inputs) and B (outputs, r)."""

    module: str
    A: Tensor
    B: Tensor
    scale: float
    is_embedding: bool

    def orient(self, stored: tuple[int, ...], *, is_transposed: bool) -> LowRank:
        """The change of a weight of shape `stored`; `is_transposed` decides for a square one, (inputs, outputs)."""
        A, B = self.A.flatten(1), self.B.flatten(1)
        shape = (len(B), *self.A.shape[1:])  # a convolution's A has the kernel, (r, channels, height, width)
        square = len(shape) == _MATRIX and shape == shape[::-1]
        if self.is_embedding or (is_transposed if square else shape != stored and shape[::-1] == stored):
            A, B, shape = B.T, A.T, shape[::-1]
        return LowRank(B=B, A=A, scale=self.scale, shape=shape)


@dataclass(frozen=True)
class Adapter:
    """The pairs of an adapter, and the tensors that it holds in place of the model's own, such as a trained head."""

    folder: Path
    config: LoraConfig
    pairs: tuple[Pair, ...]
    held: Mapping[str, Tensor]

    def fit(self, shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton | None) -> dict[str, Change]:
        """The changes by the names of the model whose tensors have these shapes.

        InputError for a tensor that the model lacks or has in another shape, and where a tied tensor would no longer be
        one tensor. Without a skeleton the file's own word decides whether square weights are stored transposed.
        """
        bones = Skeleton() if skeleton is None else skeleton
        known = {**_name_twins(shapes, bones), **shapes}
        transposed = {bones.find_name(name, known) for name in bones.transposed}
        products = {}
        for pair in self.pairs:
            name = bones.find_name(f"{pair.module}.weight", known)
            turned = self.config.is_transposed if skeleton is None else name in transposed
            products[name] = pair.orient(known.get(name, ()), is_transposed=turned)
        held = {bones.find_name(name, known): tensor for name, tensor in self.held.items()}
        mine = {name: tuple(one.shape) for name, one in held.items()}
        self._refuse_misfits(mine | {name: one.shape for name, one in products.items()}, known)
        changes = {name: Change(held.get(name), products.get(name)) for name in {**held, **products}}
        return {name: change for name, change in self._tie(changes, known, bones).items() if name in shapes}

    def add_to(self, state: State, skeleton: Skeleton | None = None) -> State:
        """W_0 + s·BA for every adapted weight (Hu et al. 2022, eq. 3), in the weights' own type; errors are fit's."""
        changes = self.fit({name: tuple(tensor.shape) for name, tensor in state.items()}, skeleton)
        return {
            name: changes[name].apply(tensor).to(tensor.dtype) if name in changes else tensor
            for name, tensor in state.items()
        }

    def doubt_base(self, *given: str | None) -> str | None:
        """What to say where the adapter names another base than the one given, by any of its names; None if nothing."""
        named = self.config.base
        if named is None or _shorten(named) in {_shorten(name) for name in given if name}:
            return None
        return f"{self.folder} says that it was trained on {named}: it is added to {given[0]}"

    def _refuse_misfits(self, mine: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        wrong = {name: shape for name, shape in mine.items() if shapes.get(name) != shape}
        resized = [name for name in wrong if name in shapes and _is_table(name) and shapes[name][1:] == wrong[name][1:]]
        if resized:
            name = resized[0]
            raise InputError(
                f"the adapter {self.folder} was trained on a vocabulary resized from {shapes[name][0]} to"
                f" {wrong[name][0]} tokens ({name}), its model here was not",
                hint="resize the model as before training, and give that: model.resize_token_embeddings("
                f"{wrong[name][0]}); model.save_pretrained(NEW_FOLDER)",
            )
        if wrong:
            shown = [f"{name} {list(shape)}" for name, shape in list(wrong.items())[:_SHOWN]]
            hint = "give it the model that it was trained on"
            if all(name in self.held and name not in shapes for name in wrong):
                hint = "save that model together with the head that was trained, and give the new folder"
            raise InputError(
                f"the adapter {self.folder} does not fit its model, which lacks {', '.join(shown)}"
                + (f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""),
                hint=hint + (f" (it names {self.config.base})" if self.config.base else ""),
            )

    def _tie(
        self, changes: Mapping[str, Change], known: Mapping[str, tuple[int, ...]], bones: Skeleton
    ) -> dict[str, Change]:
        """The changes, also under the other names of tied tensors; InputError where those would differ."""
        tied = dict(changes)
        for own, others in bones.twins.items():
            group = [bones.find_name(name, known) for name in (own, *others)]
            changed = [name for name in group if name in changes]
            if not changed:
                continue
            alike = len(changed) == len(group) or self.config.is_tied
            if not alike or any(not _is_same(changes[one], changes[two]) for one, two in pairwise(changed)):
                raise InputError(
                    f"the adapter {self.folder} changes {' and '.join(changed)}, but its model ties"
                    f" {' and '.join(group)}: one tensor cannot be both",
                    hint="untie the model once, and give that: model.config.tie_word_embeddings = False; head ="
                    " model.get_output_embeddings(); head.weight = torch.nn.Parameter(head.weight.clone());"
                    " model.save_pretrained(NEW_FOLDER)",
                )
            tied |= dict.fromkeys(group, changes[changed[0]])
        return tied


def _name_twins(shapes: Mapping[str, tuple[int, ...]], bones: Skeleton) -> dict[str, tuple[int, ...]]:
    """The shapes of tied tensors by those of their names that are not stored."""
    found: dict[str, tuple[int, ...]] = {}
    for own, others in bones.twins.items():
        stored = bones.find_name(own, shapes)
        if stored in shapes:
            found |= dict.fromkeys(others, shapes[stored])
    return found


def _is_same(one: Change, two: Change) -> bool:
    """Whether two changes of one tensor are equal."""
    if (one.held is None) != (two.held is None) or (one.product is None) != (two.product is None):
        return False
    if one.held is not None and two.held is not None and not torch.equal(one.held, two.held):
        return False
    if one.product is None or two.product is None:
        return True
    return one.product.shape == two.product.shape and bool(torch.allclose(one.product.read(), two.product.read()))


def _shorten(name: str) -> str:
    """A model's name without its owner or folders; the hub's cache has both names in one folder's."""
    cached = re.search(r"models--[^/]+--([^/]+)", name)
    return (cached[1] if cached else Path(name).name).casefold()


def _is_table(name: str) -> bool:
    """Whether a tensor has one row for each token, by its name in transformers."""
    return re.search(r"(embed|wte|lm_head|shared)[^.]*\.weight$", name) is not None


def list_adapter_files(folder: Path) -> list[Path]:
    """Configuration and weights; InputError where either is missing."""
    files = [folder / CONFIG, folder / WEIGHTS]
    old = folder / _PICKLE
    if old.is_file() and not files[1].is_file():
        code = (
            f'import torch, safetensors.torch as s; old = torch.load("{old}", map_location="cpu", weights_only=True);'
            f' s.save_file({{name: one.contiguous().clone() for name, one in old.items()}}, "{files[1]}")'
        )
        raise InputError(
            f"{old} is a pickle, which can run code when it is read", hint=f"convert it: python -c {shlex.quote(code)}"
        )
    for path in files:
        if not path.is_file():
            raise InputError(
                f"no {path.name} in {folder}", hint="give the folder that peft's save_pretrained wrote (safetensors)"
            )
    return files


def _settle_name(key: str) -> str:
    """The model's own name of a tensor."""
    return key.removeprefix(_PREFIX).replace(_WRAPPED, ".")


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter of linear layers, convolutions and embeddings; InputError for other kinds."""
    config_path, weights = list_adapter_files(folder)
    config = read_lora_config(config_path)
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    held = {}
    for key, tensor in read_state(weights).items():
        parts = _PARTS.match(key.removeprefix(_PREFIX))
        if parts is not None:
            found.setdefault((parts["module"], parts["embedding"] is not None), {})[parts["side"]] = tensor
        elif "lora_" in key.removeprefix(_PREFIX):
            raise InputError(
                f"{weights}: {key} is not a part of a plain LoRA",
                hint="save the adapter with peft's save_pretrained, or merge it into its model with peft first",
            )
        else:
            held[_settle_name(key)] = tensor
    return Adapter(folder=folder, config=config, pairs=tuple(_pair(found, config, weights)), held=held)


def _pair(found: Mapping[tuple[str, bool], Mapping[str, Tensor]], config: LoraConfig, weights: Path) -> Iterator[Pair]:
    """The pairs of factors; InputError where one is missing or has another rank than the other or the file says."""
    for (module, is_embedding), sides in found.items():
        if sides.keys() != {"A", "B"}:
            raise InputError(f"{weights}: {module} has only one of lora_A and lora_B", hint="save the adapter again")
        A, B = sides["A"], sides["B"]
        if _WRAPPED in f".{module}.":  # peft 0.21 adds an adapted output projection of torch's attention twice
            raise InputError(
                f"{weights}: {module} is a layer inside an adapted one (torch's attention, expert parameters)",
                hint="merge it into its model with peft's merge_and_unload, and give that model",
            )
        if min(A.ndim, B.ndim) < _MATRIX or len(A) != B.shape[1] or not A.numel() * B.numel():
            raise InputError(
                f"{weights}: {module} has factors of shapes {list(A.shape)} and {list(B.shape)}, which do not multiply",
                hint="merge it into its model with peft first (grouped convolutions), or save it again from whole"
                " tensors (sharded training)",
            )
        if config.find_rank(module) not in (None, len(A)):
            raise InputError(
                f"{weights}: {module} has rank {len(A)}, its {CONFIG} says {config.find_rank(module)}",
                hint="take both files from one save",
            )
        yield Pair(
            module=module,
            A=A,
            B=B,
            scale=config.find_scale(module, len(A)),
            is_embedding=is_embedding,
        )
