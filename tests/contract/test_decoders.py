"""One suite for the files that generate of every format, each driven by the agent in its own runtime."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from make.generating import CONTEXT, PROMPT, RANK, TOKENS, Generating, export_generating
from rankship_pipeline.export.artifact import read_operators
from rankship_pipeline.export.decoders import WRITERS, cached
from rankship_pipeline.foundation.formats import Format
from rankship_targets.agent.decoders import open_decoder
from rankship_targets.agent.protocol import Fault

LIMIT = 1e-5
FORMATS = get_args(Format)


@pytest.fixture(scope="module", params=FORMATS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generating:
    """Grouped queries, biases, and a head that is tied to the embedding."""
    return export_generating("qwen2", request.param, tmp_path_factory.mktemp("built"))


def test_a_file_says_what_torch_says_without_a_cache(built: Generating) -> None:
    """A prompt at once, then one token at a time to the context's last place."""
    decoder = open_decoder(built.format_name, str(built.path), 1)
    assert decoder.context == CONTEXT
    assert built.play(decoder, PROMPT, *[1] * (CONTEXT - PROMPT)) < LIMIT


def test_what_was_seen_is_forgotten_from_any_place_on(built: Generating) -> None:
    decoder = open_decoder(built.format_name, str(built.path), 1)
    decoder.step(TOKENS[::-1].copy())
    decoder.rewind(0)
    assert built.play(decoder, 18) < LIMIT
    decoder.rewind(7)
    assert built.play(decoder, 3, 1, CONTEXT - 11) < LIMIT
    decoder.rewind(0)
    assert built.play(decoder, 1, 1) < LIMIT


def test_a_token_beyond_the_context_is_refused(built: Generating) -> None:
    decoder = open_decoder(built.format_name, str(built.path), 1)
    decoder.step(TOKENS[:-1])
    with pytest.raises(Fault, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        decoder.step(TOKENS[:2])
    assert decoder.position == CONTEXT - 1
    with pytest.raises(Fault, match="no token"):
        decoder.step(TOKENS[:0])
    with pytest.raises(Fault, match=f"cannot go back to token {CONTEXT} of {CONTEXT - 1}"):
        decoder.rewind(CONTEXT)


def test_factored_layers_are_chains(built: Generating) -> None:
    found = Counter((one.rows, one.columns) for one in read_operators(built.format_name, built.path))
    wanted = Counter((one.rows, one.columns) for one in built.expected.needed)
    assert wanted - found == Counter()
    assert (wanted[RANK, 32], wanted[32, RANK], wanted[RANK, 88]) == (6, 9, 3)


def test_weights_are_in_a_file_once(built: Generating) -> None:
    """But for the table of a tied head in ExecuTorch, whose delegate keeps it in an order of its own."""
    data = built.path.read_bytes()
    tied = built.module.get_parameter("model.model.embed_tokens.weight").detach().numpy().tobytes()
    pair = built.module.get_parameter("model.model.layers.0.mlp.down_proj.0.weight").detach().numpy()
    turned = np.ascontiguousarray(pair.T).tobytes()  # as a product x·W has it
    assert data.count(tied) <= 1 + (built.format_name == "executorch")
    assert data.count(pair.tobytes()) + data.count(turned) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("llama", "onnx"),
        ("qwen3", "onnx"),
        ("gemma3", "onnx"),  # in the other formats: test_decoder_bits.py
        *(("gpt2", format_name) for format_name in FORMATS),  # least like the others
    ],
)
def test_other_families(name: str, format_name: Format, tmp_path: Path) -> None:
    made = export_generating(name, format_name, tmp_path)
    assert made.play(open_decoder(format_name, str(made.path), 1), PROMPT, *[1] * (CONTEXT - PROMPT)) < LIMIT


Run = Callable[[nn.Module, Tensor, Tensor, Tensor, cached.Update], Tensor]


def shift_cache(run: Run) -> Run:
    """Every place finds the keys and values of the place before it."""

    def changed(model: nn.Module, tokens: Tensor, places: Tensor, seen: Tensor, update: cached.Update) -> Tensor:
        def shifted(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            k, v = update(layer, keys, values)
            return torch.cat([k[:, :, -1:], k[:, :, :-1]], 2), torch.cat([v[:, :, -1:], v[:, :, :-1]], 2)

        return run(model, tokens, places, seen, shifted)

    return changed


def turn_mask(run: Run) -> Run:
    """Tokens see what comes after them."""

    def changed(model: nn.Module, tokens: Tensor, places: Tensor, seen: Tensor, update: cached.Update) -> Tensor:
        others = torch.arange(seen.shape[1], dtype=places.dtype)
        return run(model, tokens, places, torch.where(others[None] >= places[:, None], 0.0, cached.HIDDEN), update)

    return changed


def turn_further(run: Run) -> Run:
    """Angles of places behind the prompt are off by one; all of them off by one would be right."""

    def changed(model: nn.Module, tokens: Tensor, places: Tensor, seen: Tensor, update: cached.Update) -> Tensor:
        return run(model, tokens, places + (places >= PROMPT), seen, update)

    return changed


def swap_layers(run: Run) -> Run:
    """Two layers have each other's caches."""

    def changed(model: nn.Module, tokens: Tensor, places: Tensor, seen: Tensor, update: cached.Update) -> Tensor:
        mine: dict[int, tuple[Tensor, Tensor]] = {}

        def swapped(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            mine[layer] = update(layer, keys, values)
            return mine[0] if layer == 1 else mine[layer]

        return run(model, tokens, places, seen, swapped)

    return changed


FAULTS = [shift_cache, turn_mask, turn_further, swap_layers]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "fault"),
    # faults of the module that all files are written from: one for each slow exporter shows that its files carry them
    [*(("onnx", fault) for fault in FAULTS), ("tflite", shift_cache), ("executorch", swap_layers)],
)
def test_faults_show(
    format_name: Format, fault: Callable[[Run], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{WRITERS[format_name]}.run_cached", fault(cached.run_cached))
    made = export_generating("qwen3", format_name, tmp_path)
    worst = made.play(open_decoder(format_name, str(made.path), 1), PROMPT, *[1] * (CONTEXT - PROMPT))
    assert worst > 100 * LIMIT
