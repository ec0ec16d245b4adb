"""The runs of a file that a prompt takes: of how many tokens each is."""

from rankship_pipeline.foundation.formats import Format

_PREFILLS = 16, 128, 512  # tokens that a signature of a TFLite file takes at once, where the context has as many


def list_prefills(context: int) -> list[int]:
    """The tokens that each signature of a TFLite file takes at once, but for that of single tokens."""
    return [one for one in _PREFILLS if one <= context]


def list_runs(format_: Format, prompt_tokens: int, context: int) -> list[int]:
    """The tokens of each run of a file that takes a prompt, in order; only the last gives logits.

    TFLite's signatures are filled up, and the last token goes through its own, as the agent's decoders.py does it.
    """
    if format_ != "tflite":
        return [prompt_tokens]
    runs, rest = list[int](), prompt_tokens - 1
    while rest:
        room = context - (prompt_tokens - 1 - rest)
        fitting = [one for one in list_prefills(context) if one <= room] or [1]
        runs.append(next((one for one in fitting if one >= rest), fitting[-1]))
        rest -= min(rest, runs[-1])
    return [*runs, 1]
