"""Collects the facts of a checkpoint from its headers and configuration files, without reading a weight."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankship_pipeline.align.settings import read_settings
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.models.huggingface import PREFIX, resolve_config
from rankship_pipeline.models.lora import Adapter, list_adapter_files
from rankship_pipeline.models.model_config import read_json, read_normalisation
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.skeleton import Skeleton, read_folder_skeleton
from rankship_pipeline.models.tensor_pieces import NAMES, open_pieces
from rankship_pipeline.models.ties import list_copies
from rankship_pipeline.models.weights import TensorHeader
from rankship_pipeline.recipe.normalisation import Normalisation

_OF_HEADS = {"num_labels", "problem_type", "task"}  # settings that only the head uses
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Facts:
    """One checkpoint's tensors, settings and data preparation; an empty mapping or None means unknown.

    `settings` affect the computation ("rope_scaling.factor": nested keys joined by dots). `labels` are class names in
    the model's own order. `tokens` maps a vocabulary's tokens to their ids. `preparation` describes how text or images
    are prepared, under the keys of the model's own files. `files` hold the weights.
    """

    name: str
    tensors: Mapping[str, TensorHeader]
    settings: Mapping[str, object] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    preparation: Mapping[str, object] = field(default_factory=dict)
    normalise: Normalisation | None = None
    files: tuple[Path, ...] = ()


def gather_facts(opened: OpenedSource) -> Facts:
    """The facts of a recipe's model; those of a model without files come from its untrained module."""
    source = opened.source
    if source.huggingface is not None:
        facts = _gather_huggingface(opened)
    else:
        facts = Facts(
            name=source.name,
            tensors=opened.headers,
            settings={"factory": source.factory or repr(opened.untrained)},
            labels=source.labels,
            normalise=source.normalise,
            files=tuple(path.resolve() for path in opened.weights),
        )
    return facts if opened.adapter is None else _gather_adapter(facts, opened.adapter)


def leave_out_head(facts: Facts, head: str) -> Facts:
    """The facts of a model without its head's tensors and its class names, where every model keeps its own head.

    The factory, one per head, is left out too: heads.join checks that all backbones have the same modules.
    """
    mine = head.removeprefix(PREFIX) + "."
    return replace(
        facts,
        tensors={
            name: header for name, header in facts.tensors.items() if not name.removeprefix(PREFIX).startswith(mine)
        },
        settings={key: value for key, value in facts.settings.items() if key not in {"factory", *_OF_HEADS}},
        labels=(),
    )


def leave_out_copies(facts: Facts, opened: OpenedSource) -> Facts:
    """The facts of a Hugging Face model without the copies of tied tensors that its files may hold."""
    if opened.source.huggingface is None:
        return facts
    skeleton = read_folder_skeleton(opened.snapshot) or Skeleton()
    stored = {name: one for path in opened.weights for name, one in open_pieces(path).items()}
    prefix = f"{facts.settings.get('model_type')}."
    copies = {_settle_name(name, prefix) for name in list_copies(stored, skeleton)}
    return replace(facts, tensors={name: one for name, one in facts.tensors.items() if name not in copies})


def gather_folder_facts(name: str, folder: Path, tensors: Mapping[str, TensorHeader]) -> Facts:
    """The facts of a checkpoint folder on disk, class names among the settings."""
    return replace(_read_habits(name, folder, None), tensors=tensors, settings=read_settings(folder, labels=True))


def _read_habits(name: str, folder: Path, stated: Normalisation | None) -> Facts:
    """How a folder's model takes text and images; a `stated` normalisation replaces the folder's own."""
    images, tokenizer = read_json(folder / "preprocessor_config.json"), read_json(folder / "tokenizer.json")
    return Facts(
        name=name,
        tensors={},
        tokens=_read_tokens(folder, tokenizer),
        preparation={**_read_text_habits(folder, tokenizer), **_read_image_habits(images)},
        normalise=stated or read_normalisation(images),
    )


def _gather_adapter(bare: Facts, adapter: Adapter) -> Facts:
    """The facts of a model with an adapter, which may have its own head."""
    prefix = f"{bare.settings.get('model_type')}."
    held = {
        _settle_name(name, prefix): TensorHeader(tuple(tensor.shape), NAMES[tensor.dtype])
        for name, tensor in adapter.held.items()
    }
    files = tuple(path.resolve() for path in list_adapter_files(adapter.folder))
    return replace(bare, tensors={**bare.tensors, **held}, files=(*bare.files, *files))


def _gather_huggingface(opened: OpenedSource) -> Facts:
    source, snapshot = opened.source, opened.snapshot
    config = resolve_config(snapshot).to_dict()  # fills in what old files leave to defaults
    prefix = f"{config.get('model_type')}."
    labels = tuple(str(config["id2label"][index]) for index in sorted(config.get("id2label") or {}))
    return replace(
        _read_habits(source.name, snapshot, source.normalise),
        tensors={_settle_name(name, prefix): header for name, header in opened.headers.items()},
        settings={**read_settings(snapshot, labels=False), "inputs": list(source.inputs), "task": source.task},
        labels=source.labels or (() if all(_UNNAMED.fullmatch(one) for one in labels) else labels),
        files=tuple(path.resolve() for path in opened.weights),
    )


def _settle_name(name: str, prefix: str) -> str:
    """One name for what transformers treats alike: without the backbone's prefix, BERT's old norms renamed."""
    plain = name.removeprefix(prefix)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain))


def _read_tokens(snapshot: Path, whole: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of a tokenizer.json (`whole`), vocab.json or vocab.txt; empty if there is none."""
    entries = (whole.get("model") or {}).get("vocab") or read_json(snapshot / "vocab.json")
    if isinstance(entries, list):  # Unigram: (token, score) in order
        tokens = {str(entry[0]): index for index, entry in enumerate(entries)}
    else:
        tokens = {str(token): int(index) for token, index in entries.items()}
    tokens |= {str(one["content"]): int(one["id"]) for one in whole.get("added_tokens") or []}
    if not tokens and (snapshot / "vocab.txt").is_file():
        lines = (snapshot / "vocab.txt").read_text(encoding="utf-8").splitlines()
        tokens = {token: index for index, token in enumerate(lines)}
    return tokens


def _read_text_habits(snapshot: Path, whole: Mapping[str, Any]) -> dict[str, object]:
    """How text becomes tokens: the tokenizer's configuration, and its files' settings beyond the vocabulary."""
    habits: dict[str, object] = {key: whole[key] for key in ("normalizer", "pre_tokenizer") if key in whole}
    merges = (whole.get("model") or {}).get("merges")
    if merges is not None:
        habits["merges"] = digest(merges)[:12]
    habits |= {path.name: hash_file(path)[:12] for path in sorted(snapshot.glob("*.model"))}
    configured = read_json(snapshot / "tokenizer_config.json")
    return {**habits, **{key: value for key, value in configured.items() if isinstance(value, bool | int | str)}}


def _read_image_habits(images: Mapping[str, Any]) -> dict[str, object]:
    """How images are resized and cropped; a size that older files write as one number means a square."""
    sizes = {key: images[key] for key in ("size", "crop_size") if isinstance(images.get(key), int)}
    return {**images, **{key: {"height": side, "width": side} for key, side in sizes.items()}}
