"""Runs zero-shot tasks with EleutherAI's lm-evaluation-harness, on local task files and without network access.

lm_eval is an optional extra, imported when tasks are run. The split between context and continuation, and the cut where
both are too long, follow lm_eval 0.4 (`api/model.py`, `models/huggingface.py`).
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.perplexity import NOT_SCORED, score_windows
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    AnyTokenizer = Tokenizer | PreTrainedTokenizerFast

Pair = tuple[list[int], list[int]]  # token ids of a context, never empty, and of its continuation

_BOOTSTRAPS = 1000  # resamples for the standard error of metrics without a formula
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}


@record
class Reading:
    """How a model reads text: its longest input in tokens, and the token before the first.

    `prefix_token` is the id of BOS (or EOS, for GPT-2), used as context if there is none. With `always_prefixed` it
    begins every context, for models that were trained so (LLaMA); here tokenizers add no tokens by themselves.
    """

    length_tokens: int
    prefix_token: int
    always_prefixed: bool
    batch: int = 16


@record
class TaskScore:
    """One metric of one task over `documents` documents, and its standard error (None if lm_eval gives none).

    `values` are the values per document, in order, so that two models can be compared pairwise: 0 or 1 for accuracy,
    nats for perplexity; None for a metric without one number per document.
    """

    task: str
    version: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    values: tuple[float, ...] | None


@dataclass(frozen=True)
class Scorer:
    """Log-likelihoods of texts under a causal model, (batch, positions) to (batch, positions, vocabulary)."""

    model: nn.Module
    tokenizer: "Tokenizer"
    reading: Reading

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def split(self, context: str, continuation: str) -> Pair:
        """Tokens of both, encoded as one text and split at the context's end; its trailing spaces go to the second."""
        kept = context.rstrip()
        whole, cut = self.encode(context + continuation), len(self.encode(kept)) if kept else 0
        prefix = [self.reading.prefix_token] if self.reading.always_prefixed or not cut else []
        return prefix + whole[:cut], whole[cut:]

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether greedy decoding would produce it."""
        if not pairs:
            return []
        order = sorted(range(len(pairs)), key=lambda one: -sum(map(len, pairs[one])))  # similar lengths together
        found = score_windows(self.model, (self._mask(*pairs[one]) for one in order), self.reading.batch)
        greedy = (found.hits == found.counts).tolist()
        answers = dict(zip(order, zip((-found.sums).tolist(), greedy, strict=True), strict=True))
        return [answers[one] for one in range(len(pairs))]

    def _mask(self, context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and labels that score the continuation; a context that is too long is cut at its beginning."""
        limit = self.reading.length_tokens
        if not 1 <= len(continuation) <= limit:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, the model takes 1 to {limit}",
                hint="shorten the task's answers, or raise length_tokens if the model allows it",
            )
        tokens = torch.tensor((context + continuation)[-(limit + 1) :])
        labels = tokens[1:].clone()
        labels[: -len(continuation)] = NOT_SCORED
        return tokens[:-1], labels


def evaluate_tasks(
    model: nn.Module,
    tokenizer: "AnyTokenizer",
    tasks: Sequence[str],
    task_folder: Path,
    limit: int | None = None,
    *,
    reading: Reading,
) -> tuple[TaskScore, ...]:
    """Run log-likelihood tasks, zero-shot, on the first `limit` documents of each (None: all).

    `tokenizer` is a `tokenizers.Tokenizer` or a transformers fast tokenizer. `task_folder` holds the tasks' .yaml
    files; the paths of their data files are relative to it. During the call it is the process's working directory,
    downloads are off, and data sets go to a temporary cache, so no other thread may run.

    Raises InputError if lm_eval is missing, a task is unknown or needs generation, or its data cannot be read.
    """
    lm = make_lm(model, tokenizer, reading)
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped, unused-ignore]
    from lm_eval import simple_evaluate  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped, unused-ignore]

    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1", hint="give the number of documents per task")
    folder = task_folder.resolve()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        raise InputError(
            f"no task {', '.join(unknown)} in {folder}" if unknown else "no task is named",
            hint=f"the folder has {', '.join(manager.all_tasks) or 'none: a task is a .yaml file with the key task'}",
        )
    unseeded = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))  # keep the caller's seeds
    choices = {"tasks": list(tasks), "task_manager": manager, "num_fewshot": 0, "limit": limit}
    with _work_offline(folder):
        try:
            results = simple_evaluate(lm, **choices, bootstrap_iters=_BOOTSTRAPS, **unseeded)
        except (OSError, DatasetsError) as failure:
            raise InputError(
                f"the data of {', '.join(tasks)} cannot be read: {failure}", hint=f"put its data file into {folder}"
            ) from failure
    return tuple(score for name in results["samples"] for score in _read(results, name))


def make_lm(model: nn.Module, tokenizer: "AnyTokenizer", reading: Reading) -> Any:  # noqa: ANN401 - lm_eval is untyped
    """The model as an lm_eval.api.model.LM; InputError if lm_eval is not installed."""
    try:
        from lm_eval.api.model import LM  # type: ignore[import-untyped, unused-ignore]
        from lm_eval.utils import (  # type: ignore[import-untyped, unused-ignore]
            get_rolling_token_windows,
            make_disjoint_window,
        )
    except ModuleNotFoundError as missing:
        raise InputError(
            f"zero-shot tasks need lm-evaluation-harness ({missing.name} is not installed)",
            hint="pip install 'rankship[harness]'",
        ) from None
    scorer = Scorer(model, _free(tokenizer), reading)

    class RankshipLM(LM):  # type: ignore[misc, unused-ignore]  # untyped: lm_eval's seam is an abstract class
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return scorer.score([scorer.split(*request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [scorer.encode(*request.args) for request in requests]
            begin, length = reading.prefix_token, reading.length_tokens
            pieces = [
                list(map(make_disjoint_window, get_rolling_token_windows(text, begin, length, 1))) for text in texts
            ]
            found = iter(scorer.score([pair for windows in pieces for pair in windows]))
            return [sum(next(found)[0] for _ in windows) for windows in pieces]

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise InputError(
                f"{', '.join(sorted({str(request.task_name) for request in requests}))}: generation is not supported",
                hint="choose tasks of output_type multiple_choice, loglikelihood or loglikelihood_rolling",
            )

    return RankshipLM()


def _free(tokenizer: "AnyTokenizer") -> "Tokenizer":
    """A copy of the tokenizer that neither truncates nor pads."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _read(results: Any, task: str) -> Iterator[TaskScore]:  # noqa: ANN401 - lm_eval has no types
    """The scores in lm_eval's results, keyed there as "metric,filter"."""
    samples = results["samples"][task]
    for key, value in results["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        stderr = results["results"][task].get(f"{metric}_stderr,{chosen}")
        values = [sample[metric] for sample in samples if sample["filter"] == chosen]
        yield TaskScore(
            task=task,
            version=str(results["versions"].get(task)),
            metric=metric if chosen == "none" else key,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, float | int) and isfinite(stderr) else None,
            documents=len(values),
            values=tuple(map(float, values)) if all(isinstance(one, float | int) for one in values) else None,
        )


@contextmanager
def _work_offline(folder: Path) -> Iterator[None]:
    """Make `folder` the working directory, turn downloads off and cache data sets for this call only; restored after.

    The libraries read the environment once, when they are imported, so both their variables and values are set.
    """
    from unittest.mock import patch

    import datasets.config  # type: ignore[import-untyped, unused-ignore]
    import huggingface_hub.constants

    with (
        tempfile.TemporaryDirectory(prefix="rankship-") as cache,
        patch.dict(os.environ, _ENVIRONMENT),
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", new=True),
        patch.multiple(datasets.config, HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True, HF_DATASETS_CACHE=Path(cache)),
        chdir(folder),
        redirect_stdout(sys.stderr),  # lm_eval prints; stdout is the verb's
    ):
        yield
