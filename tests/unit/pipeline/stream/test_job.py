import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from make.dask_ends import collecting
from make.decoders import BLOCKS, VOCABULARY, save_speaking, write_words
from rankship_pipeline.evaluate.perplexity import measure_perplexity
from rankship_pipeline.factors.saved_model import load_model
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.models.decoder import open_decoder
from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream import foresee
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.job import StreamJob, compress_stream
from rankship_pipeline.stream.perplexity import stream_perplexity

QUIET = Steps(quiet=True)
RANKS = RankChoice(step=4)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> StreamJob:
    folder = tmp_path_factory.mktemp("speaking")
    text = write_words(folder / "text.txt", 600)
    model = save_speaking(folder / "model")
    budget = Budget(kept_parameters=0.7)
    return StreamJob(model=str(model), text=text, tokens=16, samples=20, test_samples=9, ranks=RANKS, budget=budget)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens).logits
        return logits


def test_a_folder_becomes_a_smaller_folder_and_both_are_measured(tmp_path: Path, given: StreamJob) -> None:
    import transformers

    report = compress_stream(given, tmp_path / "out", QUIET)
    loaded, saved = load_model(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    assert saved.plan is not None
    assert report.parameters == saved.plan.total_parameters == count_parameters(loaded)
    assert report.dense_parameters == count_parameters(dense)
    assert report.budget_parameters - 4 * (32 + 88) < report.parameters <= report.budget_parameters
    assert (report.layers, report.factored) == (7 * BLOCKS, len(saved.plan.factors))
    words = [int(word[1:]) for word in given.text.read_text(encoding="utf-8").split()]
    test = torch.tensor(words[20 * 16 : 29 * 16])
    for model, found in ((dense, report.before), (loaded, report.after)):
        expected = measure_perplexity(Logits(model), test, length=16, stride=16)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert (found.scored_tokens, found.blocks, found.length_tokens) == (9 * 16 - 1, 9, 16)
        assert found.low == pytest.approx(expected.low, rel=1e-3)
    assert report.calibration_tokens == 20 * 16
    assert report.predicted_nats
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left behind
    assert compress_stream(given, tmp_path / "out", QUIET) == report  # read, not done again


def test_a_changed_text_is_another_job(tmp_path: Path, given: StreamJob) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(given.text, text)
    job = replace(given, text=text, samples=6, test_samples=3)
    compress_stream(job, tmp_path / "out", QUIET)
    text.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        compress_stream(job, tmp_path / "out", QUIET)


@pytest.mark.parametrize("stride", [16, 5])
def test_streamed_perplexity_slides_as_in_memory(tmp_path: Path, given: StreamJob, stride: int) -> None:
    import transformers

    tokens = torch.randint(0, VOCABULARY, (71,), generator=torch.Generator().manual_seed(3))
    decoder = open_decoder(Path(given.model))
    streamed = stream_perplexity(decoder, tokens, tmp_path, length=16, stride=stride)
    dense = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    expected = measure_perplexity(Logits(dense), tokens, length=16, stride=stride)
    assert streamed.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert (streamed.scored_tokens, streamed.blocks) == (expected.scored_tokens, expected.blocks)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])  # a tied head; scaled embeddings and capped logits
def test_other_families_end_as_they_do_in_memory(tmp_path: Path, name: str) -> None:
    import transformers

    folder = save_speaking(tmp_path / "model", name)
    tokens = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(3))
    streamed = stream_perplexity(open_decoder(folder), tokens, tmp_path, length=16, stride=16)
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    expected = measure_perplexity(Logits(dense), tokens, length=16, stride=16)
    assert streamed.perplexity == pytest.approx(expected.perplexity, rel=1e-4)


@pytest.mark.parametrize("ranks", [RankChoice(step=4, method="uniform"), RankChoice(step=4, method="strs")], ids=str)
def test_other_methods_keep_to_the_budget(tmp_path: Path, given: StreamJob, ranks: RankChoice) -> None:
    job = replace(given, ranks=replace(ranks, sensitivity="relative"))
    report = compress_stream(job, tmp_path / "out", QUIET, tmp_path / "work")
    assert report.parameters <= report.budget_parameters
    assert report.predicted_nats is None  # of errors relative to each layer's output nothing is known of predictions
    smaller = compress_stream(
        replace(job, budget=Budget(parameters=report.parameters - 3000)), tmp_path / "less", QUIET, tmp_path / "work"
    )
    assert smaller.parameters <= report.parameters - 3000
    assert smaller.before == report.before
    assert len(list((tmp_path / "work").glob("analysis-*"))) == 1  # the second budget took the first one's


def test_a_short_text_is_halved_and_one_of_its_own_tests(tmp_path: Path, given: StreamJob) -> None:
    short = replace(given, text=write_words(tmp_path / "short.txt", 16 * 6))
    report = compress_stream(short, tmp_path / "out", QUIET)
    assert (report.calibration_tokens, report.before.scored_tokens) == (3 * 16, 3 * 16 - 1)
    own = replace(short, test_text=given.text)
    report = compress_stream(own, tmp_path / "other", QUIET)
    assert (report.calibration_tokens, report.before.scored_tokens) == (6 * 16, 9 * 16 - 1)


Disk = namedtuple("Disk", "free")  # noqa: PYI024 - of a value that shutil names so


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "there is no text"),
        ("short", "holds only 1 windows of 16 tokens"),
        ("long", "windows of 65 tokens do not fit: the model takes at most 64"),
        ("tokenizer", "without a tokenizer"),
        ("target", "exists already"),
        ("disk", r"needs about \S+ [kM]B of disk, and \S+ has 1.0 kB free"),
        ("memory", r"needs about \S+ [MG]B of memory and 1,000.0 kB are free"),
        ("method", "need the whole model in memory"),
        ("budget", "the smallest model at rank step 4"),
        ("scheduler", r"no Dask scheduler at tcp://127\.0\.0\.1:1"),
        ("compressed", "is a compressed model already"),
        ("model", "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_work_is_said_first(
    tmp_path: Path, given: StreamJob, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    job, target = given, tmp_path / "out"
    if what == "tokenizer":
        job = replace(job, model=str(shutil.copytree(job.model, tmp_path / "model")))
        for path in Path(job.model).glob("tokenizer*"):
            path.unlink()
    if what == "compressed":
        job = replace(job, model=str(shutil.copytree(job.model, tmp_path / "model")))
        (tmp_path / "model" / "rankship.json").touch()
    if what == "target":
        target.mkdir()
    if what == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _place: Disk(1000))
    if what == "memory":
        monkeypatch.setattr(foresee, "find_free_bytes", lambda: 1_000_000 - 1)
    monkeypatch.setattr("rankship_pipeline.stream.workers._TIMEOUT_S", 1)
    job = {
        "text": replace(job, text=tmp_path / "none.txt"),
        "short": replace(job, text=write_words(tmp_path / "short.txt", 20)),
        "long": replace(job, tokens=65),
        "method": replace(job, ranks=RankChoice(method="ara")),
        "budget": replace(job, budget=Budget(parameters=10)),
        "scheduler": replace(job, how=StreamChoice(scheduler="tcp://127.0.0.1:1")),
        "model": replace(job, model="nobody/nothing here"),
    }.get(what, job)
    monkeypatch.setattr(
        "rankship_pipeline.stream.job.stream_perplexity", lambda *_given, **_named: pytest.fail("began")
    )
    with pytest.raises((InputError, BudgetInfeasible), match=message):
        compress_stream(job, target, QUIET)
    assert not (tmp_path / "out").exists() or what == "target"
    assert not (tmp_path / ".out.stream").exists()


# Every child is killed inside the named call, and the last one goes on to the end.
SCRIPT = """
import importlib, os, signal, sys
from pathlib import Path
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.stream import analysis, passage, write
from rankship_pipeline.stream import job as jobs
from rankship_pipeline.models.decoder import Back, Call

job = decode(jobs.StreamJob, sys.argv[1], where="argv")
target = Path(sys.argv[2])
points = [(Call, "run", 2), (Call, "run", 4), (Call, "run", 5), (Back, "read", 1), (Call, "run", 5),
          (analysis, "save_file", 1), (analysis, "save_file", 2), (write, "save_file", 3), (Call, "run", 2),
          (jobs, "publish_part", 1)]
for place, name, call in points:
    child = os.fork()
    if not child:
        calls, real = [], getattr(place, name)

        def die(*given, **named):
            calls.append(name)
            found = None if len(calls) == call and name == "publish_part" else real(*given, **named)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(place, name, die)
        jobs.compress_stream(job, target, Steps(quiet=True))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, call, status)
    assert not target.exists()
jobs.compress_stream(job, target, Steps(quiet=True))
"""


def test_killed_anywhere_it_gives_the_same_bytes(tmp_path: Path, given: StreamJob) -> None:
    from rankship_pipeline.foundation.codec import encode

    compress_stream(given, tmp_path / "whole", QUIET)
    command = [sys.executable, "-c", SCRIPT, encode(given), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names
    for name in names:
        if name != "rankship.json":  # it names the versions, alike too
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.slow
def test_two_dask_workers_and_two_threads_give_the_same_bytes(tmp_path: Path, given: StreamJob) -> None:
    import distributed

    here = compress_stream(replace(given, how=StreamChoice(workers=1)), tmp_path / "here", QUIET)
    two = compress_stream(replace(given, how=StreamChoice(workers=2)), tmp_path / "two", QUIET)
    with (
        collecting(),
        distributed.LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=2, threads_per_worker=1, processes=True, protocol="tcp", host="127.0.0.1", dashboard_address=None
        ) as cluster,
    ):
        how = StreamChoice(scheduler=cluster.scheduler_address)
        there = compress_stream(replace(given, how=how), tmp_path / "there", QUIET)
        with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            ran = client.run(lambda: __import__("sys").modules.get("rankship_pipeline.stream.workers") is not None)
    assert list(ran.values()) == [True, True]  # both took layers apart
    assert here == two == there
    for path in (tmp_path / "here").glob("*.safetensors"):
        for other in ("two", "there"):
            assert (tmp_path / other / path.name).read_bytes() == path.read_bytes(), (other, path.name)
