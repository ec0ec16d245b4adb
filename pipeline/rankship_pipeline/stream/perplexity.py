"""Measures the perplexity of a decoder larger than memory: all windows pass one block after the other."""

import shutil
from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rankship_pipeline.evaluate.perplexity import BATCH, Perplexity, cut_window, list_begins, measure_perplexity
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.models.decoder import Back, Decoder
from rankship_pipeline.stream.passage import Passage, start_passage
from rankship_pipeline.stream.progress import Begin, ignore

_CHUNK_TOKENS = 2048
_LOGIT_BYTES = 2**28  # of one batch


def stream_perplexity(
    decoder: Decoder,
    tokens: Tensor,
    folder: Path,
    *,
    length: int,
    stride: int,
    begin: Begin = ignore,
    stage: str = "perplexity",
) -> Perplexity:
    """The perplexity of a text, token ids (tokens,), by `evaluate.perplexity.measure_perplexity`'s definitions.

    The result, and until then the hidden states before the next block, are in a subfolder of `folder` that is named by
    all that they depend on; a stopped measurement goes on at that block.
    """
    key = _make_key(decoder, tokens, length, stride)
    result = folder / f"perplexity-{key}.json"
    if result.exists():
        return decode(Perplexity, result.read_bytes(), where=str(result))
    windows = [cut_window(tokens, at, length, stride)[0] for at in list_begins(tokens, length, stride)]
    place = folder / f"perplexity-{key}"
    place.mkdir(parents=True, exist_ok=True)
    padded = pad_sequence(windows, batch_first=True)
    passage = start_passage(decoder, padded, place, _CHUNK_TOKENS, needed=decoder.count, halved=False)
    for index in range(passage.find_latest(decoder.count) or 0, decoder.count):
        begin(stage, f"block {index}", decoder.count + 1 - index)
        passage.advance(index, decoder.load_block(index))
        passage.locate(index).unlink()
    begin(stage, "head", 1)
    vocabulary = decoder.model.config.get_text_config().vocab_size
    batch = max(1, min(BATCH, _LOGIT_BYTES // (4 * padded.shape[1] * vocabulary)))
    ending = _Ending(decoder.load_back(), passage)
    found = measure_perplexity(ending, tokens, length=length, stride=stride, batch=batch)
    write_atomic(result, encode(found).encode())
    shutil.rmtree(place)
    return found


class _Ending(nn.Module):
    """The end of the model as if it were the whole: it takes the windows in their order, and reads their states."""

    def __init__(self, back: Back, passage: Passage) -> None:
        super().__init__()
        self._back, self._passage, self._next = back, passage, 0

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (windows, positions, vocabulary) of the next windows."""
        count = len(tokens)
        hidden = self._passage.read(self._passage.decoder.count, self._next, count)
        self._next += count
        return self._back.read(hidden[:, : tokens.shape[1]])


def _make_key(decoder: Decoder, tokens: Tensor, length: int, stride: int) -> str:
    """The first 16 characters of the hash of everything that affects the perplexity."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in decoder.checkpoint.files}
    text = digest(tokens.tolist())
    config = (decoder.checkpoint.folder / "config.json").read_text(encoding="utf-8")
    return digest(
        {"files": files, "config": config, "text": text, "as": [length, stride], "code": [hash_code(), list_versions()]}
    )[:16]
