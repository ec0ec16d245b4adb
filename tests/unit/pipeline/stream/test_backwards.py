from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from make.decoders import ARCHITECTURES, BLOCKS, VOCABULARY, make_decoder, save_sharded
from rankship_pipeline.evaluate.calibrate import collect_halves
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.factors.decompose import make_metric
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models import decoder as blocks
from rankship_pipeline.models import layers as sides
from rankship_pipeline.models.decoder import Decoder
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream import analysis as files
from rankship_pipeline.stream import backwards
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.compress import allocate_stream, analyse_stream
from rankship_pipeline.stream.workers import take_apart_curved

TOKENS = torch.randint(0, VOCABULARY, (20, 17), generator=torch.Generator().manual_seed(1))
CURVED = StreamChoice(chunk_tokens=60, curvature=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharded(make_decoder("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs that do not depend on the order of samples: those of a position alternate over the classes."""

    def draw(like: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        return torch.ones_like(like) * (1 - 2 * (torch.arange(like.shape[-1]) % 2))

    monkeypatch.setattr("rankship_pipeline.evaluate.likelihood._draw_signs", draw)


@pytest.mark.usefixtures("one_draw")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shrink", [True, False])
def test_streaming_backwards_gives_what_curvature_in_memory_gives(tmp_path: Path, name: str, shrink: object) -> None:
    checkpoint = save_sharded(make_decoder(name), tmp_path / "in")
    choice = StreamChoice(chunk_tokens=60, curvature=True, shrink=bool(shrink), workers=2)
    streamed = analyse_stream(checkpoint, TOKENS, tmp_path / "work", choice)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    wrapped = ByPosition(model, ("input_ids",)).eval()
    layers = find_layers(wrapped, exclude=("*embed_tokens", "*lm_head"))
    grams = collect_halves(collect_grams, wrapped, (TOKENS,), layers)
    curvatures = collect_halves(collect_curvatures, wrapped, (TOKENS,), layers)
    metrics = {
        one.name: make_metric(grams[one.name], curvatures[one.name], len(TOKENS), shrunk=bool(shrink)) for one in layers
    }
    memory = analyse(wrapped, layers, metrics, "swift")
    ranks = RankChoice(step=4, sensitivity="gradient")
    stats = {entry.layer.name.removeprefix("model."): entry for entry in gather_stats(memory, ranks, {})}
    for own, entry in stats.items():
        assert entry.nats is not None
        assert streamed.read_nats(own) == pytest.approx(entry.nats, rel=1e-3)
        energy = streamed.read_energy(own)
        np.testing.assert_allclose(energy, entry.energy[: len(energy)], rtol=0, atol=1e-4 * entry.energy.sum())
    total = sum(parameter.numel() for parameter in model.parameters())
    fixed, budget = total - sum(one.parameters for one in layers), int(0.7 * total)
    plan = allocate_stream(streamed, budget, ranks)
    known = allocate(tuple(stats.values()), fixed, budget, ranks)
    assert {f"model.{one}": factors for one, factors in plan.factors.items()} == known.factors
    assert plan == allocate_stream(streamed, budget, RankChoice(step=4))  # "auto"
    assert plan.factors != allocate_stream(streamed, budget, RankChoice(step=4, sensitivity="relative")).factors


@pytest.mark.usefixtures("one_draw")
def test_a_long_side_is_seen_by_the_short_one(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyse_stream(llama, TOKENS, tmp_path, CURVED)
    monkeypatch.setattr(sides, "_LONG", 64)
    seen = list[tuple[int, ...]]()

    def note(weight: Any, grams: Any, curvatures: Any, *rest: Any, **named: Any) -> Any:  # noqa: ANN401
        seen.append((*weight.shape, grams.shape[-1], curvatures.shape[-1]))
        return real(weight, grams, curvatures, *rest, **named)

    real = take_apart_curved
    monkeypatch.setattr(backwards, "take_apart_curved", note)
    short = analyse_stream(llama, TOKENS, tmp_path / "again", CURVED)
    assert {one[2:] for one in seen if one[:2] == (32, 88)} == {(32, 32)}
    assert {one[2:] for one in seen if one[:2] == (88, 32)} == {(32, 32)}
    for layer in whole.layers:
        ours, theirs = short.read_nats(layer.name), whole.read_nats(layer.name)
        assert ours is not None
        assert ours == pytest.approx(theirs, rel=0.2)  # curvatures are damped and shrunk in other units
        rank = 8
        products = [A.double() @ B.double() for B, A in (one.read_factors(layer.name, rank) for one in (short, whole))]
        assert float((products[0] - products[1]).norm() / products[1].norm()) < 0.5


def test_a_curvature_of_zero_leaves_no_damage(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rankship_pipeline.evaluate.likelihood._draw_signs", lambda like, _generator: torch.zeros_like(like)
    )
    streamed = analyse_stream(llama, TOKENS, tmp_path, CURVED)
    assert {streamed.read_nats(layer.name) for layer in streamed.layers} == {0.0}


def test_a_plan_by_effect_needs_the_curvature(tmp_path: Path, llama: Path) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, StreamChoice(chunk_tokens=60))
    assert streamed.read_nats(streamed.layers[0].name) is None
    with pytest.raises(InputError, match="needs the curvature"):
        allocate_stream(streamed, 27_000, RankChoice(step=4, sensitivity="gradient"))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The numbers of blocks as they are loaded, "head", and "apart" for every layer taken apart."""
    seen: list[object] = []

    def note(module: object, name: str, what: object) -> None:
        real = getattr(module, name)

        def see(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            seen.append(what if isinstance(what, str) else given[1])
            return real(*given, **named)

        monkeypatch.setattr(module, name, see)

    note(Decoder, "load_block", None)
    note(Decoder, "load_back", "head")
    note(backwards, "take_apart_curved", "apart")
    return seen


APART = 7 * ["apart"]


@pytest.mark.parametrize(
    ("place", "name", "call", "left"),
    [
        (blocks.Call, "run", 12, [1, 2, "head", 2, *APART, 1, *APART, 0, *APART]),
        (blocks.Back, "read", 1, ["head", 2, *APART, 1, *APART, 0, *APART]),
        (blocks.Call, "run", 38, [1, *APART, 0, *APART]),  # while the second block goes back
        (backwards, "take_apart_curved", 9, [1, *APART, 0, *APART]),
        (files, "save_file", 2, [1, *APART, 0, *APART]),
        (backwards, "time_block", 2, [0, *APART]),
    ],
)
def test_a_stopped_analysis_goes_on_where_it_was(
    tmp_path: Path, llama: Path, done: list[object], place: object, name: str, call: int, left: list[object]
) -> None:
    calls, real = list[str](), getattr(place, name)

    def die(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **named)

    whole = analyse_stream(llama, TOKENS, tmp_path / "whole", CURVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, die)
        with pytest.raises(KeyboardInterrupt):
            analyse_stream(llama, TOKENS, tmp_path / "work", CURVED)
    done.clear()
    again = analyse_stream(llama, TOKENS, tmp_path / "work", CURVED)
    assert [one for one in done if one != "apart"] == [one for one in left if one != "apart"]
    assert done.count("apart") == left.count("apart")
    for index in range(BLOCKS):
        assert again.locate(index).read_bytes() == whole.locate(index).read_bytes()
    assert sorted(path.name for path in again.folder.iterdir()) == [f"block-{n:04d}.safetensors" for n in range(BLOCKS)]


def test_one_lost_block_is_made_again_alone(tmp_path: Path, llama: Path, done: list[object]) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, CURVED)
    before = streamed.locate(1).read_bytes()
    streamed.locate(1).unlink()
    done.clear()
    analyse_stream(llama, TOKENS, tmp_path, CURVED)
    assert [one for one in done if one != "apart"] == [0, 1, 2, "head", 2, 1]
    assert done.count("apart") == 7
    assert streamed.locate(1).read_bytes() == before
