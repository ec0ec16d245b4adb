"""Files that generate from weights of fewer bits: all are stored, and compute what torch says of them."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from make.generating import CONTEXT, GENERATION, PROMPT, TOKENS, make_generating
from make.rounded import round_net
from rankship_pipeline.export.artifact import Part
from rankship_pipeline.export.bits import fit_format, store_bits
from rankship_pipeline.export.decoders import write_decoder
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_targets.agent.decoders import open_decoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format_name"), [("qwen2", "onnx"), *(("gemma3", format_name) for format_name in get_args(Format))]
)
def test_a_rounded_file_says_what_torch_says(name: str, format_name: Format, tmp_path: Path) -> None:
    """The first block in 4 bits, where its rows have whole blocks; all else in 8, with the tied embedding and head."""
    module = make_generating(name)
    four = tuple(
        path
        for path, layer in module.named_modules()
        if ".layers.0." in path and isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0
    )
    assert four
    weights = round_net(module, four)
    given = torch.from_numpy(TOKENS)[None]
    part = fit_format(
        Part("compressed", module, (given,), precision="int8", weights=weights, activations="dynamic"), format_name
    )
    path = tmp_path / f"model.{FACTS[format_name].suffix}"
    write_decoder(part.module, format_name, path, GENERATION)
    assert store_bits(part, None, format_name, path) == []  # none stays float32
    with torch.no_grad():
        wanted = part.proven(given)[0].numpy()
    decoder = open_decoder(format_name, str(path), 1)
    errors = [
        np.abs(decoder.step(TOKENS[start:end]) - wanted[end - 1]).max() / np.abs(wanted).max()
        for start, end in ((0, PROMPT), *((place, place + 1) for place in range(PROMPT, CONTEXT)))
    ]
    assert np.median(errors) < 2e-5  # where an activation lies between two integers, a last bit moves it
