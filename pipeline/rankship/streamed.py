"""A language model larger than memory, compressed block by block from its folder to a folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rankship.choices import choose_budget, choose_ranks
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RankMethod

if TYPE_CHECKING:
    from rankship_pipeline.stream.job import StreamReport


def stream(  # noqa: PLR0913 - a keyword for each thing that may be chosen
    model: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    kept_parameters: float | None = None,
    parameters: int | None = None,
    tokens: int = 256,
    samples: int = 64,
    test_text: str | os.PathLike[str] | None = None,
    test_samples: int = 64,
    ranks: RankMethod | RankChoice = "knapsack",
    workers: int | None = None,
    scheduler: str | None = None,
    work: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> "StreamReport":
    """Compress a language model with only one of its blocks in memory; stopped anywhere, the same call goes on.

    The new folder holds the model in safetensors; `load` reads it. It appears whole. The report is in it too, as
    stream.json: the sizes, and the perplexity before and after on the same text.

    Args:
        model: A Hugging Face folder of a decoder such as LLaMA, or its id on the hub.
        to: The new folder; it must not exist, unless this very call wrote it: then its report is read.
        text: A text to calibrate with, and what follows in it to test by: .txt, or .jsonl with "text" on every line.
        kept_parameters: The share of all parameters to keep.
        parameters: The number of parameters to keep instead.
        tokens: The length of a window of text in tokens.
        samples: The number of windows to calibrate with; of a text too short for all, half.
        test_text: Another text to test by.
        test_samples: The number of windows to test by.
        ranks: How ranks are allocated: "knapsack", "uniform" or "strs". The sensitivity "auto" is "gradient", the
            effect on the model's predictions to second order; "relative" saves one pass.
        workers: Decompositions at once; None: one per core, at most four. Their number changes no byte.
        scheduler: The address of a Dask cluster that decomposes ("tcp://…"), on a network you trust.
        work: A folder for intermediate files, which stay there for other budgets; None: a hidden one beside `to` until
            it is done.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: The model, its tokenizer or the text cannot be used, the new folder exists, or disk or memory will
            not do; it says how much is needed.
        BudgetInfeasible: The budget is below the smallest model.

    Example:
        >>> import rankship as rs
        >>> from pathlib import Path
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({str(word): word for word in range(100)}, unk_token="0"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("dense")
        >>> shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)).save_pretrained("dense")
        >>> _ = Path("numbers.txt").write_text(" ".join(str(place**2 % 100) for place in range(2000)))
        >>> report = rs.stream("dense", "small", text="numbers.txt", tokens=32, kept_parameters=0.8, progress=False)
        >>> report.parameters <= 0.8 * report.dense_parameters
        True
        >>> rs.load("small").config.num_hidden_layers
        2

    """
    from rankship_pipeline.stream.choice import StreamChoice
    from rankship_pipeline.stream.job import StreamJob, compress_stream

    job = StreamJob(
        model=os.fspath(model),
        text=Path(text),
        test_text=None if test_text is None else Path(test_text),
        tokens=tokens,
        samples=samples,
        test_samples=test_samples,
        budget=choose_budget(kept_parameters, None, None if parameters is None else Budget(parameters=parameters)),
        ranks=choose_ranks(ranks),
        how=StreamChoice(workers=workers, scheduler=scheduler),
    )
    return compress_stream(job, Path(to), Steps(quiet=not progress), None if work is None else Path(work))
