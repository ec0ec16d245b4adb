import json
import os
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from make.dask_ends import collecting
from make.decoders import ARCHITECTURES, BLOCKS, VOCABULARY, make_decoder, save_sharded
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import analyse, fill
from rankship_pipeline.factors.decompose import Metric, decompose_eigen, decompose_swift
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.factors.saved_model import load_model
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.models import decoder as blocks
from rankship_pipeline.models.decoder import Decoder, open_decoder
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.models.sharded import INDEX, Checkpoint
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream import analysis as files
from rankship_pipeline.stream import compress as stream
from rankship_pipeline.stream import forwards, workers
from rankship_pipeline.stream.analysis import StreamAnalysis
from rankship_pipeline.stream.block_grams import Grams, Group, find_groups
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.compress import analyse_stream
from rankship_pipeline.stream.workers import take_apart
from rankship_pipeline.stream.write import write_stream

TOKENS = torch.randint(0, VOCABULARY, (20, 17), generator=torch.Generator().manual_seed(1))
RANKS = RankChoice(step=4)
SMALL = StreamChoice(chunk_tokens=60)  # 2 or 3 samples a chunk
RAW = StreamChoice(chunk_tokens=60, shrink=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharded(make_decoder("llama"), tmp_path_factory.mktemp("llama"))


def check_against_memory(checkpoint: Path, streamed: StreamAnalysis, target: Path) -> RankPlan:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    wrapped = ByPosition(model, ("input_ids",)).eval()
    layers = find_layers(wrapped, exclude=("*embed_tokens", "*lm_head"))
    metrics = {name: Metric(gram=gram) for name, gram in collect_grams(wrapped, (TOKENS,), layers).items()}
    memory = analyse(wrapped, layers, metrics, "eigen")
    assert {f"model.{layer.name}" for layer in streamed.layers} == set(memory.layers)
    for name, layer in memory.layers.items():
        energy, expected = streamed.read_energy(name.removeprefix("model.")), layer.spectrum.energy.numpy()
        used = min(len(energy), len(expected))  # the eigen form drops what is zero
        np.testing.assert_allclose(energy[:used], expected[:used], rtol=0, atol=1e-6 * expected.sum())
        assert energy[used:].sum() <= 1e-6 * expected.sum()
    budget = int(0.7 * count_parameters(model))
    plan = stream.allocate_stream(streamed, budget, RANKS)
    assert budget - 4 * (32 + 88) < plan.total_parameters <= budget
    assert 0 < len(plan.factors) < len(streamed.layers)  # some are factored, some stay dense
    write_stream(streamed, plan, target)
    state = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(state) == set(json.loads((target / INDEX).read_text())["weight_map"])
    built = rebuild(model, plan.factors)
    missing, unexpected = built.load_state_dict(state, strict=False)
    assert (set(missing) <= {"lm_head.weight"}, unexpected) == (True, [])
    if missing:  # tied
        built.get_submodule("lm_head").weight = built.get_submodule("model.embed_tokens").weight
    assert count_parameters(built) == plan.total_parameters
    loaded, _ = load_model(target)
    filled = fill(memory, {f"model.{name}": factors for name, factors in plan.factors.items()})
    with torch.inference_mode():
        torch.testing.assert_close(built(TOKENS).logits, filled(TOKENS), rtol=0, atol=1e-4)
        torch.testing.assert_close(loaded(TOKENS).logits, built(TOKENS).logits, rtol=0, atol=1e-4)
    return plan


WAYS = (
    StreamChoice(whitening="eigen", shrink=False),
    StreamChoice(workers=2, chunk_tokens=10**6, shrink=False),
    StreamChoice(chunk_tokens=1, shrink=False),
)


@pytest.mark.parametrize(("name", "choice"), [*((name, RAW) for name in ARCHITECTURES), *(("llama", w) for w in WAYS)])
def test_streaming_gives_what_compression_in_memory_gives(tmp_path: Path, name: str, choice: StreamChoice) -> None:
    checkpoint = save_sharded(make_decoder(name), tmp_path / "in")
    check_against_memory(checkpoint, analyse_stream(checkpoint, TOKENS, tmp_path / "work", choice), tmp_path / "out")


def test_a_bfloat16_checkpoint_keeps_its_type_unless_asked_otherwise(tmp_path: Path) -> None:
    checkpoint = save_sharded(make_decoder("qwen2", torch.bfloat16), tmp_path / "in")
    streamed = analyse_stream(checkpoint, TOKENS, tmp_path / "work", StreamChoice(dtype="float32", shrink=False))
    plan = check_against_memory(checkpoint, streamed, tmp_path / "float32")
    write_stream(analyse_stream(checkpoint, TOKENS, tmp_path / "work", SMALL), plan, tmp_path / "out")
    types = {value.dtype for path in (tmp_path / "out").glob("*.safetensors") for value in load_file(path).values()}
    assert types == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 2 * plan.total_parameters


def test_the_written_folder_is_whole(tmp_path: Path, llama: Path) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, SMALL)
    plan = stream.allocate_stream(streamed, 20_000, RankChoice(method="uniform", step=1))
    write_stream(streamed, plan, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((llama / "config.json").read_text())
    loaded, saved = load_model(tmp_path / "out")
    assert (saved.plan, saved.architecture) == (plan, "LlamaForCausalLM")
    assert count_parameters(loaded) == plan.total_parameters
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()) == files
    assert len(files) == BLOCKS + 3  # each block, the embedding, the last norm, the head
    with pytest.raises(InputError, match="exists already"):
        write_stream(streamed, plan, tmp_path / "out")


def test_excluded_layers_stay_dense_and_count_as_fixed(tmp_path: Path, llama: Path) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, StreamChoice(exclude=("*.mlp.*",)))
    assert {layer.name.split(".")[-2] for layer in streamed.layers} == {"self_attn"}
    stats = stream.gather_stream_stats(streamed, RankChoice(step=4, exclude=("*.q_proj",)))
    assert {entry.layer.name.split(".")[-1] for entry in stats} == {"k_proj", "v_proj", "o_proj"}
    with pytest.raises(BudgetInfeasible, match="outside the factorable layers"):
        stream.allocate_stream(streamed, 1000, RANKS)


@pytest.mark.parametrize(
    "choice", [RankChoice(method="arp"), RankChoice(method="ara"), RankChoice(sensitivity="kl")], ids=str
)
def test_methods_that_need_the_model_in_memory_are_refused(tmp_path: Path, llama: Path, choice: RankChoice) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, SMALL)
    with pytest.raises(InputError, match="need the whole model in memory"):
        stream.gather_stream_stats(streamed, choice)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The numbers of blocks as they are loaded, and "apart" for every layer taken apart."""
    seen: list[object] = []

    def load_block(self: Decoder, index: int, real: Any = Decoder.load_block) -> Any:  # noqa: ANN401
        seen.append(index)
        return real(self, index)

    def count(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        seen.append("apart")
        return take_apart(*given, **named)

    monkeypatch.setattr(Decoder, "load_block", load_block)
    monkeypatch.setattr(forwards, "take_apart", count)
    return seen


@pytest.mark.parametrize(
    ("place", "name", "call", "finished"),
    [
        (blocks.Call, "run", 12, 1),  # while the second block's outputs are written
        (forwards, "take_apart", 9, 1),
        (files, "save_file", 2, 1),
        (forwards, "time_block", 2, 2),  # once its file is there
    ],
)
def test_a_stopped_analysis_goes_on_where_it_was(
    tmp_path: Path, llama: Path, done: list[object], place: object, name: str, call: int, finished: int
) -> None:
    calls, real = [], getattr(place, name)

    def die(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **named)

    whole = analyse_stream(llama, TOKENS, tmp_path / "whole", SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, die)
        with pytest.raises(KeyboardInterrupt):
            analyse_stream(llama, TOKENS, tmp_path / "work", SMALL)
    done.clear()
    for folder in (tmp_path / "work").iterdir():
        (folder / ".block-0001.safetensors.1f.tmp").touch()  # what a power cut leaves behind
    again = analyse_stream(llama, TOKENS, tmp_path / "work", SMALL)
    assert done == [one for index in range(finished, BLOCKS) for one in (index, *7 * ["apart"])]
    for index in range(BLOCKS):
        assert again.locate(index).read_bytes() == whole.locate(index).read_bytes()
    assert sorted(path.name for path in again.folder.iterdir()) == [f"block-{n:04d}.safetensors" for n in range(BLOCKS)]


def test_a_finished_analysis_does_nothing(tmp_path: Path, llama: Path, done: list[object]) -> None:
    first = analyse_stream(llama, TOKENS, tmp_path, SMALL)
    done.clear()
    second = analyse_stream(llama, TOKENS, tmp_path, StreamChoice(chunk_tokens=60, workers=2))  # how is not what
    assert (first.folder, done) == (second.folder, [])


def test_one_lost_block_is_made_again_alone(tmp_path: Path, llama: Path, done: list[object]) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, SMALL)
    before = streamed.locate(1).read_bytes()
    streamed.locate(1).unlink()
    done.clear()
    analyse_stream(llama, TOKENS, tmp_path, SMALL)
    assert done == [0, 1, *7 * ["apart"]]  # the first block is run, but not taken apart
    assert streamed.locate(1).read_bytes() == before


def test_other_tokens_choices_or_files_are_another_analysis(tmp_path: Path) -> None:
    checkpoint = save_sharded(make_decoder("llama"), tmp_path / "in")
    folders = [analyse_stream(checkpoint, TOKENS, tmp_path / "work", SMALL).folder]
    folders.append(analyse_stream(checkpoint, TOKENS.flip(0), tmp_path / "work", SMALL).folder)
    folders.append(analyse_stream(checkpoint, TOKENS, tmp_path / "work", StreamChoice(whitening="eigen")).folder)
    os.utime(next(checkpoint.glob("*.safetensors")), (1, 1))
    folders.append(analyse_stream(checkpoint, TOKENS, tmp_path / "work", SMALL).folder)
    assert len(set(folders)) == 4


def test_at_most_one_block_is_in_memory(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, read = list[weakref.ref[Tensor]](), list[str]()

    def load_block(self: Decoder, index: int, real: Any = Decoder.load_block) -> nn.Module:  # noqa: ANN401
        assert all(one() is None for one in alive)
        module: nn.Module = real(self, index)
        alive.extend(weakref.ref(parameter) for parameter in module.parameters())
        return module

    def note(self: Checkpoint, name: str, real: Any = Checkpoint.read) -> Any:  # noqa: ANN401
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(Decoder, "load_block", load_block)
    monkeypatch.setattr(Checkpoint, "read", note)
    analyse_stream(llama, TOKENS, tmp_path, SMALL)
    assert len(alive) == 9 * BLOCKS
    assert all(one() is None for one in alive)
    assert read[:2] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert "lm_head.weight" not in read


def test_layers_with_the_same_input_share_one_gram(llama: Path) -> None:
    decoder = open_decoder(llama)
    hidden, calls = decoder.load_front().embed(TOKENS[:2])
    block = decoder.load_block(0)
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    q, k, v, o, gate, up, down = names
    groups = find_groups(block, names, lambda: calls[0].run(block, hidden), by_output={down})
    assert groups == [Group((q, k, v)), Group((o,)), Group((gate, up)), Group((down,), by_output=True)]
    with pytest.raises(InputError, match=r"layer mlp\.up_proj of a block never ran"):
        find_groups(block, [up], lambda: None, ())
    seen = find_groups(block, names, lambda: calls[0].run(block, hidden), ())
    grams = Grams()
    with torch.inference_mode(), grams.collect(block, seen):
        calls[0].run(block, hidden)
    assert [tuple(gram.shape) for gram in grams.sums.values()] == [(2, n, n) for n in (32, 32, 32, 88)]


def break_shard(folder: Path, how: str) -> str:
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    path = folder / index["weight_map"][name]
    state, tensor, file = load_file(path), rf"tensor {re.escape(name)}", re.escape(path.name)
    if how == "missing":
        path.unlink()
        return rf"tensor model\.layers\.1\S+ cannot be read: .*{file} is missing"
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
        return rf"tensor model\.layers\.1\S+ cannot be read: .*{file} is not a whole safetensors file"
    if how == "unlisted":
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
        return rf"{tensor} is in none of .*model-00001"
    changed = {"lost": None, "nan": state[name] * torch.nan, "wrong shape": state[name][:-1].clone()}[how]
    save_file({key: value for key, value in (state | {name: changed}).items() if value is not None}, path)
    return {
        "lost": rf"{file} lacks {tensor}",
        "nan": rf"{file} holds NaN or infinity in 1 tensors: {re.escape(name)}",
        "wrong shape": rf"{tensor} in .*{file} has shape \[87, 32\], config.json says \[88, 32\]",
    }[how]


@pytest.mark.parametrize("how", ["missing", "cut short", "unlisted", "lost", "wrong shape", "nan"])
def test_a_broken_shard_is_named_with_its_tensor(tmp_path: Path, done: list[object], how: str) -> None:
    checkpoint = save_sharded(make_decoder("llama"), tmp_path / "in")
    message = break_shard(checkpoint, how)
    with pytest.raises(InputError, match=message):
        analyse_stream(checkpoint, TOKENS, tmp_path / "work", SMALL)
    assert done == ([0, *7 * ["apart"], 1] if how == "nan" else [])  # all but values is checked before any work


def test_a_checkpoint_of_one_file_needs_no_index(tmp_path: Path) -> None:
    make_decoder("llama").save_pretrained(tmp_path)
    assert not (tmp_path / INDEX).exists()
    assert len(open_decoder(tmp_path).checkpoint.places) == 9 * BLOCKS + 3


@pytest.mark.parametrize("message", ["not an index", "not describe a causal language model", r"no \*\.safetensors"])
def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path, message: str) -> None:
    checkpoint = save_sharded(make_decoder("llama"), tmp_path / "in")
    if "index" in message:
        (checkpoint / INDEX).write_text("{}")
    elif "causal" in message:
        (checkpoint / "config.json").write_text('{"model_type": "vit"}')
    else:
        for path in checkpoint.glob("*.safetensors*"):
            path.unlink()
    with pytest.raises(InputError, match=message):
        open_decoder(checkpoint)


@pytest.mark.parametrize("tokens", [TOKENS[0], TOKENS.float(), TOKENS + VOCABULARY, TOKENS[:0], -TOKENS - 1])
def test_tokens_and_whitenings_that_do_not_fit_are_refused(tmp_path: Path, llama: Path, tokens: Tensor) -> None:
    with pytest.raises(InputError, match="calibration tokens"):
        analyse_stream(llama, tokens, tmp_path, SMALL)
    with pytest.raises(InputError, match="no whitening 'none'"):
        analyse_stream(llama, TOKENS, tmp_path, StreamChoice(whitening="none"))


def make_problem(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(10 if kind == "few" else 400, columns, generator=generator, dtype=torch.float64)
    if kind == "outlier":
        X[0] *= 1e4
    if kind == "float32":
        X = X[:10].float()
        return weight, (X.T @ X).double()  # rounding leaves eigenvalues below zero
    gram = {"none": None, "zero": X.T @ X * 0, "diagonal": (X**2).sum(0)}
    return weight, gram.get(kind, X.T @ X)


@pytest.mark.parametrize("shape", [(24, 24), (60, 24), (24, 60), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("kind", ["full", "few", "outlier", "float32", "none", "zero", "diagonal"])
@pytest.mark.parametrize("keep", [None, 7])
def test_swift_finds_the_optimum_of_every_rank(shape: tuple[int, int], kind: str, keep: int | None) -> None:
    weight, gram = make_problem(*shape, kind)
    swift, expected = decompose_swift(weight, gram, keep), decompose_eigen(weight, gram)
    total = float(expected.energy.sum())
    used = min(len(expected.sigma), len(swift.sigma))
    torch.testing.assert_close(swift.energy[:used], expected.energy[:used], rtol=0, atol=1e-8 * total)
    assert swift.U.shape[1] == swift.right.shape[0] <= min(keep or 60, *shape)
    assert len(swift.sigma) >= len(expected.sigma) or kind == "float32"
    G = torch.ones(shape[1], dtype=torch.float64) if gram is None or not gram.any() else gram
    G = G.diag() if G.ndim == 1 else G
    for rank in range(swift.U.shape[1] + 1):
        lost = weight - (swift.U[:, :rank] * swift.sigma[:rank]) @ swift.right[:rank]
        loss = float(((lost @ G) * lost).sum())
        assert loss == pytest.approx(float(expected.energy[rank:].sum()), rel=1e-6, abs=1e-7 * total)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=str)
@pytest.mark.parametrize(("kind", "again"), [("full", False), ("outlier", True)])
def test_float32_is_done_again_where_it_cannot_be_trusted(shape: tuple[int, int], kind: str, again: object) -> None:
    weight, gram = (tensor.float().numpy() for tensor in make_problem(*shape, kind) if tensor is not None)
    rough = take_apart(weight, gram, StreamChoice(precision="float32"), keep=17, by_output=False).energy
    fine = take_apart(weight, gram, StreamChoice(), keep=17, by_output=False).energy
    error = float(abs(rough - fine).sum() / fine[17:].sum())
    assert error < 1e-4
    assert (error == 0) is again


def test_dask_computes_the_same(tmp_path: Path, llama: Path) -> None:
    import distributed

    here = analyse_stream(llama, TOKENS, tmp_path / "here", SMALL)
    with (
        collecting(),
        distributed.LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
        ) as cluster,
    ):
        assert cluster.scheduler_address.startswith("tcp://127.0.0.1:")
        choice = StreamChoice(chunk_tokens=60, scheduler=cluster.scheduler_address)
        there = analyse_stream(llama, TOKENS, tmp_path / "there", choice)
    for index in range(BLOCKS):
        assert here.locate(index).read_bytes() == there.locate(index).read_bytes()


@pytest.mark.parametrize("reason", ["Dask is not installed", r"no Dask scheduler at tcp://127\.0\.0\.1:1"])
def test_a_scheduler_that_cannot_be_had_is_an_input_error(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if "installed" in reason:
        monkeypatch.setitem(sys.modules, "dask.distributed", None)
    else:
        monkeypatch.setattr(workers, "_TIMEOUT_S", 1)
    with pytest.raises(InputError, match=reason), workers.open_pool(StreamChoice(scheduler="tcp://127.0.0.1:1")):
        pass
