"""What a language model's own files say of how it generates text."""

from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.models.huggingface import find_snapshot, resolve_config
from rankship_pipeline.models.model_config import read_context, read_json, read_vocabulary
from rankship_pipeline.recipe.choices import Source

_CONTEXT = 512  # tokens, unless the model takes fewer
_PROMPT = 16  # tokens of a proof
_LEAST = 4


def describe_generation(source: Source, folder: Path, context: int | None) -> Generation:
    """How the files of a "causal-lm" are called; `context` as the recipe gives it."""
    most = read_context(source, folder)
    if context is not None and not (_LEAST <= context <= (most or context)):
        allowed = f"{_LEAST} to {most}" if most is not None else f"{_LEAST} or more"
        raise InputError(
            f"export.context is {context}, model {source.name!r} takes {allowed} tokens", hint="state one of these"
        )
    length = context or min(_CONTEXT, most or _CONTEXT)
    snapshot = find_snapshot(source, folder)
    config, own = resolve_config(snapshot).get_text_config(), read_json(snapshot / "generation_config.json")
    begin = own.get("bos_token_id", getattr(config, "bos_token_id", None))
    end = own.get("eos_token_id", getattr(config, "eos_token_id", None))
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return Generation(
        context=length,
        vocabulary=read_vocabulary(source, folder),
        begin=begin if isinstance(begin, int) else None,
        ends=tuple(ends),
        prompt_tokens=min(_PROMPT, length // 2),
    )
