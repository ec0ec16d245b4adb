"""Saves and loads a compressed model as a folder: safetensors, and `rankship.json` with the plan of its structure.

    rankship.json        SavedModel: how each layer is stored, the dense architecture, the versions that made it
    model.safetensors    its tensors; or shards with Hugging Face's index
    config.json          of a transformers model: its configuration, from which the dense structure is made

A planned layer's tensors are `<layer>.0.weight`, `<layer>.1.weight`, … in running order, with the bias on the last. No
code is saved, and no code that a file names is run: to load a plain torch model, the caller gives its architecture.
"""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import publish_file, write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.huggingface import resolve_config
from rankship_pipeline.models.plain_modules import copy_module, is_plain, make_plain
from rankship_pipeline.models.sharded import INDEX, open_checkpoint
from rankship_pipeline.models.weights import State, list_differences, read_state

RECORD, WEIGHTS, CONFIGURATION = "rankship.json", "model.safetensors", "config.json"


@record
class SavedModel:
    """The content of `rankship.json`.

    `plan` is None if nothing is factored. `architecture` is the class of the dense model. With `family` "transformers"
    it is made from config.json, with "torch" the caller has to give it. `recipe_sha256` is None for a model that was
    made without a recipe. `plain` says that the tensors are named as models.plain_modules rewrites the architecture.
    """

    plan: RankPlan | None
    family: Literal["transformers", "torch"]
    architecture: str
    versions: dict[str, str]
    recipe_sha256: str | None = None
    plain: bool = False


def describe_saved(plan: RankPlan | None, module: nn.Module, recipe_sha256: str | None = None) -> SavedModel:
    """The record of a dense or rebuilt model to save."""
    kind = type(module)
    return SavedModel(
        plan=plan,
        family="transformers" if _is_transformers(kind) else "torch",
        architecture=kind.__name__ if _is_transformers(kind) else f"{kind.__module__}.{kind.__qualname__}",
        versions=list_versions(),
        recipe_sha256=recipe_sha256,
        plain=True,
    )


def save_model(folder: Path, module: nn.Module, plan: RankPlan | None, recipe_sha256: str | None = None) -> None:
    """Write a module that was rebuilt by its plan and filled; each file is replaced in one step, the record last."""
    refuse_shards(folder)
    saved = describe_saved(plan, module, recipe_sha256)
    folder.mkdir(parents=True, exist_ok=True)
    if saved.family == "transformers":
        settings = copy.deepcopy(_configuration_of(module))
        settings.architectures = [saved.architecture]
        write_atomic(folder / CONFIGURATION, settings.to_json_string(use_diff=False).encode())
    tensors = module.state_dict()
    kept = {names[0]: tensors[names[0]].cpu().clone(memory_format=torch.contiguous_format) for names in _group(module)}
    with publish_file(folder / WEIGHTS) as path:
        save_file(kept, path, metadata={"format": "pt"})
    write_saved(folder, saved)


def refuse_shards(folder: Path) -> None:
    """InputError where a folder holds a model in shards, beside which another cannot be saved."""
    if (folder / INDEX).exists():
        raise InputError(f"{folder} holds another model, in shards", hint="name a new folder, or delete this one")


def write_saved(folder: Path, saved: SavedModel) -> None:
    """Write `rankship.json`."""
    write_atomic(folder / RECORD, encode(saved).encode())


def read_saved(folder: Path) -> SavedModel:
    """Read `rankship.json`; InputError if the folder holds no saved model."""
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder} holds no {RECORD}", hint="give a folder that `save` or `export` wrote")
    text = path.read_bytes()
    if "plan" in json.loads(text):
        return decode(SavedModel, text, where=str(path))
    plan = decode(RankPlan, text, where=str(path))  # streams of 0.1 wrote the plan alone, beside config.json
    named = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8")).get("architectures") or ["?"]
    return SavedModel(plan=plan, family="transformers", architecture=named[0], versions={})


def load_model(folder: Path, into: nn.Module | None = None) -> tuple[nn.Module, SavedModel]:
    """The saved model in evaluation mode, float32 on the CPU, and its record.

    `into` is the dense architecture, which is not changed; a transformers model needs none.
    """
    saved = read_saved(folder)
    dense = _make_dense(folder, saved) if into is None else into
    if saved.plain and not is_plain(dense):
        dense = make_plain(copy_module(dense))
    try:
        module = rebuild(dense, {} if saved.plan is None else saved.plan.factors)
    except (AttributeError, TypeError) as failure:
        raise InputError(
            f"{folder} holds a {saved.architecture}, and {type(dense).__name__} does not fit it: {failure}",
            hint="give the architecture that was compressed, dense and untrained",
        ) from None
    _fill(module, _read_tensors(folder), folder, saved)
    return module.eval(), saved


def _make_dense(folder: Path, saved: SavedModel) -> nn.Module:
    if saved.family == "torch":
        raise InputError(
            f"{folder} holds the weights of a {saved.architecture}, but not its code",
            hint="give the architecture, dense and untrained: load(FOLDER, into=MyModel())",
        )
    import transformers

    kind = getattr(transformers, saved.architecture, None)
    if not isinstance(kind, type) or not _is_transformers(kind):
        raise InputError(
            f"{folder / RECORD} names {saved.architecture!r}, which is not a model of transformers"
            f" {transformers.__version__}",
            hint="install the version that it was saved with, or give the architecture by `into`",
        )
    model: nn.Module = kind(resolve_config(folder))
    return model


def _read_tensors(folder: Path) -> State:
    if (folder / INDEX).is_file():
        checkpoint = open_checkpoint(folder)
        return {name: checkpoint.read(name) for name in checkpoint.places}
    return read_state(folder / WEIGHTS)


def _fill(module: nn.Module, found: State, folder: Path, saved: SavedModel) -> None:
    """Fill the module's tensors; a shared tensor needs to be stored under only one of its names."""
    whole = dict(found)
    for names in _group(module):
        stored = next((name for name in names if name in found), None)
        if stored is not None:
            whole |= dict.fromkeys(names, found[stored])
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    complaints = list_differences(expected, {name: tuple(tensor.shape) for name, tensor in whole.items()})
    if complaints:
        raise InputError(
            f"{folder} holds a {saved.architecture}, whose tensors do not fit {type(module).__name__}:\n  "
            + "\n  ".join(complaints),
            hint="give the architecture that was compressed, dense and untrained",
        )
    module.load_state_dict(whole)


def _group(module: nn.Module) -> list[list[str]]:
    """The names of a module's tensors, grouped by tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _is_transformers(kind: type) -> bool:
    """Whether a class is a model that transformers itself exports by its name."""
    if kind.__module__.partition(".")[0] != "transformers":
        return False
    import transformers

    return issubclass(kind, transformers.PreTrainedModel) and getattr(transformers, kind.__name__, None) is kind


def _configuration_of(module: nn.Module) -> Any:  # noqa: ANN401 - transformers has no types
    return module.config
