"""Hugging Face models as plain modules: positional tensors in, logits or named tensors out."""

import inspect
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.constants import is_constant
from rankship_pipeline.models.fit_names import unwrap_names
from rankship_pipeline.models.outputs import Outputs, flatten
from rankship_pipeline.models.settle import settle
from rankship_pipeline.models.sharded import INDEX, WHOLE, Checkpoint, list_weight_files, open_checkpoint
from rankship_pipeline.models.weights import copy_state, describe_tensor, refuse_broken
from rankship_pipeline.recipe.choices import Source

# task → the transformers class that loads it
_AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "feature-extraction": "AutoModel",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
}


# configuration, weights, and the files in which tokenizers differ
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "vocab.txt", "merges.txt", "*.model"]


PREFIX = "model."  # before a transformers model's own names in the wrapped module


class ByPosition(nn.Module):
    """Calls a transformers model with positional tensors, named by `inputs`; keeps no cache of earlier positions.

    It returns the logits; or, of a model without any (of features, or spans), all its tensors by name.
    """

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, *tensors: Tensor) -> Tensor | Outputs:
        """Pass the tensors under the names in `inputs`, in order."""
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.settings)
        logits: Tensor | None = getattr(found, "logits", None)
        return flatten(found) if logits is None else logits


def find_snapshot(source: Source, folder: Path) -> Path:
    """The local folder of a model: a path beside the recipe, an absolute path, or the hub's cached snapshot."""
    local = folder / str(source.huggingface)
    if local.is_dir():
        return local
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _fetch(str(source.huggingface), source.revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        raise InputError(
            f"model {source.name!r}: {source.huggingface!r} is neither a folder nor a hub id that can be fetched"
            f" ({type(failure).__name__})",
            hint="give the path of a downloaded model, or check the id, the network and HF_TOKEN",
        ) from None


@cache
def _fetch(name: str, revision: str | None) -> Path:
    """The hub's cached snapshot; the hub is asked once in a process."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))


def list_snapshot_files(snapshot: Path) -> list[Path]:
    """The configuration of a model folder, the index of its weights if there is one, and the sorted weights."""
    if _is_factored(snapshot / "rankship.json"):
        raise InputError(
            f"{snapshot} holds a compressed model, whose pairs of layers no class of transformers has",
            hint="give a recipe the dense model; this one is exported from Python: rankship.load(FOLDER), then compress"
            " with kept_parameters=1.0, then export",
        )
    weights = list_weight_files(snapshot)
    if not (snapshot / "config.json").is_file():
        raise InputError(f"{snapshot} has no config.json", hint="give the folder that save_pretrained wrote")
    return [snapshot / "config.json", *weights]


def _is_factored(record: Path) -> bool:
    """Whether the record of a saved model (factors/saved_model.py), if there is one, plans pairs of layers."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    plan = found.get("plan", found) or {}
    return any(layer.get("factors") for layer in plan.get("layers", ()))


def resolve_config(folder: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """A model folder's configuration with all defaults; one whose code would come with the files is refused."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as failure:
        raise InputError(
            f"{folder} has no configuration that transformers knows by itself: {failure}",
            hint="no code that comes with a model's files is run: give an architecture of transformers, or a factory",
        ) from None


def make_wrapped(source: Source, snapshot: Path) -> nn.Module:
    """The architecture alone, with random weights, in the forms that every exporter lowers."""
    config = resolve_config(snapshot)
    model = _auto_class(source).from_config(config, attn_implementation="eager", trust_remote_code=False)
    settle(model)
    return ByPosition(model.to(torch.float32), source.inputs).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; our lines say what is loaded."""
    import transformers

    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def load_wrapped_state(source: Source, snapshot: Path, supplied: Collection[str] = ()) -> dict[str, Tensor]:
    """The trained tensors in float32 by the wrapped module's names; InputError for NaN or infinity.

    Tensors in `supplied` may be missing: an adapter has them.
    """
    checkpoint = open_checkpoint(snapshot)
    for path in checkpoint.files:
        refuse_broken(path)
    kind: Any = _auto_class(source)
    given: dict[str, Any] = {"pretrained_model_name_or_path": snapshot, "use_safetensors": True}
    if not _is_plain(checkpoint):
        kind = type(make_wrapped(source, snapshot).model)
        tensors = {name: checkpoint.read(own) for name, own in unwrap_names(checkpoint.places).items()}
        given = {
            "pretrained_model_name_or_path": None,
            "config": resolve_config(snapshot),
            "state_dict": tensors,
        }
    with _without_bars():
        model, found = kind.from_pretrained(
            **given,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    lost = {name: tensor for name, tensor in model.state_dict().items() if name in found["missing_keys"]}
    constants = {name for name, tensor in lost.items() if is_constant(name, describe_tensor(tensor))}
    missing = sorted(name for name in lost.keys() - constants if PREFIX + name not in supplied)
    if missing:  # transformers would initialise them at random
        raise InputError(
            f"model {source.name!r}: its checkpoint lacks {', '.join(missing)}",
            hint=f"give a checkpoint that was trained for {source.task}",
        )
    state = copy_state(ByPosition(model, source.inputs).eval())
    if constants:
        own = make_wrapped(source, snapshot).state_dict()
        state |= {PREFIX + name: own[PREFIX + name].clone() for name in constants}
    return state


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether transformers finds a checkpoint's files by itself, and no wrapper stands before its tensors' names."""
    found = checkpoint.files[0] if checkpoint.index is None else checkpoint.index
    stated = getattr(resolve_config(checkpoint.folder), "transformers_weights", None)
    return found.name in {WHOLE, INDEX, stated} and unwrap_names(checkpoint.places).keys() == checkpoint.places.keys()


def _auto_class(source: Source) -> Any:  # noqa: ANN401 - transformers has no types
    import transformers

    return getattr(transformers, _AUTO_CLASSES[str(source.task)])
