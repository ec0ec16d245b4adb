"""Reads LoRA adapters saved by peft, without peft, and adds them to the model that they were trained on."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.tensor_pieces import Readable
from rankship_pipeline.models.weights import State, TensorHeader, read_header, read_state

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's prefix of the model's own names
_PARTS = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
# configuration keys that change W + s·BA, with the value for a plain LoRA
_REFUSED = {"use_dora": False, "lora_bias": False, "layer_replication": None, "use_qalora": False}


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
class AdaptedTensor:
    """A stored weight plus an adapter's change; read as float32, or as float64 if it is stored so."""

    stored: Readable
    change: LowRank

    @property
    def type_name(self) -> str:
        """The weight's own."""
        return self.stored.type_name

    @property
    def dtype(self) -> torch.dtype:
        """The weight's own."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own."""
        return self.stored.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of the sum, rounded once."""
        total = self.stored.read(start, stop).to(torch.float64) + self.change.read(start, stop)
        return total.to(torch.promote_types(self.dtype, torch.float32))


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of an adapter that replaces the stored one and takes its type."""

    stored: Readable
    held: Tensor

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
        """Its own, equal to the stored tensor's."""
        return tuple(self.held.shape)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows, or all."""
        return self.held[start:stop] if self.held.ndim else self.held


@dataclass(frozen=True)
class Adapter:
    """Changes by weight name, and tensors that replace the model's own (such as a head trained with the adapter)."""

    folder: Path
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]

    def add_to(self, state: State, prefix: str = "") -> State:
        """W_0 + s·BA for every adapted weight (Hu et al. 2022, eq. 3), in the weights' own type.

        `prefix` is the prefix of the model's names in `state`. InputError for a tensor that is missing or has another
        shape.
        """
        self.check_fits({name: tuple(tensor.shape) for name, tensor in state.items()}, prefix)
        merged = dict(state)
        for name, change in self.changes.items():
            weight = state[prefix + name]
            merged[prefix + name] = (weight.to(torch.float64) + change.read()).to(weight.dtype)
        for name, tensor in self.replaced.items():
            merged[prefix + name] = tensor.to(state[prefix + name].dtype)
        return merged

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
        """Raise an InputError naming what the model lacks, or has in another shape."""
        mine = {name: change.shape for name, change in self.changes.items()}
        mine |= {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        missing = [f"{name} {list(shape)}" for name, shape in mine.items() if shapes.get(prefix + name) != shape]
        if missing:
            raise InputError(
                f"the adapter {self.folder} does not fit its model, which lacks {', '.join(missing[:5])}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),  # noqa: PLR2004 - as many as are shown
                hint="give it the model that it was trained on",
            )


def list_adapter_files(folder: Path) -> list[Path]:
    """Configuration and weights; InputError where either is missing."""
    files = [folder / CONFIG, folder / WEIGHTS]
    for path in files:
        if not path.is_file():
            raise InputError(
                f"no {path.name} in {folder}", hint="give the folder that peft's save_pretrained wrote (safetensors)"
            )
    return files


def peek_replaced(folder: Path) -> dict[str, TensorHeader]:
    """The headers of an adapter's tensors that replace the model's own."""
    headers = {_settle_name(key): header for key, header in read_header(list_adapter_files(folder)[1]).items()}
    return {name: header for name, header in headers.items() if _PARTS.match(name) is None}


def _settle_name(key: str) -> str:
    """The model's own name of a tensor; peft renames biases that are trained beside a LoRA."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter of linear layers, convolutions and embeddings; InputError for other kinds."""
    config_path, weights = list_adapter_files(folder)
    config = _read_config(config_path)
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    replaced = {}
    for key, tensor in read_state(weights).items():
        name = _settle_name(key)
        parts = _PARTS.match(name)
        if parts is None:
            replaced[name] = tensor
        else:
            found.setdefault((parts["module"], parts["embedding"] is not None), {})[parts["side"]] = tensor
    changes = {}
    for (module, is_embedding), sides in found.items():
        if sides.keys() != {"A", "B"}:
            raise InputError(f"{weights}: {module} has only one of lora_A and lora_B", hint="save the adapter again")
        A, B = sides["A"].flatten(1), sides["B"].flatten(1)
        shape = (len(B), *sides["A"].shape[1:])  # a convolution's A has the kernel, (r, channels, height, width)
        scale = _find_scale(config, module, len(A))
        if is_embedding or config.get("fan_in_fan_out"):
            A, B, shape = B.T, A.T, shape[::-1]
        changes[f"{module}.weight"] = LowRank(B=B, A=A, scale=scale, shape=shape)
    return Adapter(folder=folder, changes=changes, replaced=replaced)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is not valid JSON", hint="save the adapter again") from None
    odd = {key: config[key] for key, plain in _REFUSED.items() if config.get(key, plain) != plain}
    if config.get("peft_type") != "LORA":
        odd["peft_type"] = config.get("peft_type")
    if odd:
        raise InputError(
            f"{path}: {', '.join(f'{key} = {value!r}' for key, value in odd.items())} is not a plain LoRA",
            hint="merge it into its model with peft's merge_and_unload, and give that model",
        )
    return config


def _find_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r, or α / √r for rank-stabilised LoRA; a pattern may give a module its own α."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
