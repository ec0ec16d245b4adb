"""A bisect finds the night of a step, says when it cannot, and measures nothing twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from make.artifacts import DENSE, describe_file, sign
from make.builds import make_build
from make.bundles import keep, make_header
from make.devices import make_local
from make.nights import make_device_night, make_night
from make.onnx_files import WEIGHT, save_product
from make.trials import make_trial
from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.judge.compare import Outcome
from rankship_benchmarks.nightly import bisect as bisecting
from rankship_benchmarks.nightly import pair as pairs
from rankship_benchmarks.nightly.bisect import Bisection, Kept, Look, bisect_files
from rankship_benchmarks.nightly.records import CaseVerdict, write_night
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import DECODE
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, InputError
from rankship_pipeline.foundation.store import Store
from rankship_targets.client.detached import Ticket
from rankship_targets.session import session as sessions
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import Trial


def make_kept(night: int, sha256: str, gone: str = "") -> Kept:
    return Kept(night=night, run=str(night), sha256=sha256, header=make_header(), gone=gone)


def search(files: str, times: dict[str, float], gone: Sequence[int] = ()) -> Bisection:
    """Search nights 1, 2, … whose files are single letters, each of a known time."""
    kept = [make_kept(1 + n, name, "gone" if 1 + n in gone else "") for n, name in enumerate(files)]

    def compare(first: Kept, other: Kept) -> Look:
        ratio = times[other.sha256] / times[first.sha256]
        word: Outcome = "worse" if ratio > 1.015 else "better" if ratio < 0.985 else "same"
        word = "unknown" if times[other.sha256] == -1 else word
        return Look(night=other.night, verdict=word, reason="", ratio=None)

    return bisect_files(kept, compare)


@pytest.mark.parametrize(
    ("files", "times", "between"),
    [
        ("ab", {"a": 1, "b": 2}, (1, 2)),
        ("aabbccdd", {"a": 1, "b": 1, "c": 2, "d": 2}, (4, 5)),
        ("abcdefgh", {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1, "g": 1, "h": 2}, (7, 8)),
        ("abacd", {"a": 1, "b": 1, "c": 2, "d": 2}, (3, 4)),
        ("abcd", {"a": 2, "b": 2, "c": 1, "d": 1}, (2, 3)),  # faster
        ("abcde", {"a": 1, "b": 1.01, "c": 1.02, "d": 1.03, "e": 1.04}, (2, 3)),  # small ones that add up
    ],
)
def test_a_step_lies_between_two_nights(files: str, times: dict[str, float], between: tuple[int, int]) -> None:
    found = search(files, times)
    assert (found.end, found.low, found.high, found.between) == ("found", *between, ())


def test_a_week_of_files_takes_few_comparisons() -> None:
    files = "abcdefghijklmnopqrstuvwxyz"
    found = search(files, {name: 1 + (name > "s") for name in files})
    assert (found.low, found.high) == (19, 20)
    assert len(found.looks) <= 6


def test_nights_whose_files_are_gone_are_left_out_and_named_where_they_matter() -> None:
    found = search("abcdef", {"a": 1, "b": 1, "e": 2, "f": 2}, gone=(3, 4))
    assert (found.end, found.low, found.high, found.between) == ("found", 2, 5, (3, 4))
    assert search("abcdef", {"a": 1, "b": 1, "c": 1, "e": 2, "f": 2}, gone=(4, 4)).between == (4,)
    with pytest.raises(InputError, match="night 1: gone"):
        search("ab", {"a": 1, "b": 1}, gone=(1,))


@pytest.mark.parametrize(
    ("files", "times", "end"),
    [
        ("abba", {"a": 1, "b": 2}, "same file"),
        ("abc", {"a": 1, "b": 2, "c": 1}, "no step"),
        ("abc", {"a": 1, "b": -1, "c": 2}, "unsure"),
        ("ab", {"a": 1, "b": -1}, "unsure"),
    ],
)
def test_what_cannot_be_found_is_told(files: str, times: dict[str, float], end: str) -> None:
    assert search(files, times).end == end


class Pretended:
    """A device on which a file takes the time that its hash stands for; dies after so many trials."""

    agent_sha256 = "a" * 64

    def __init__(self, times_ns: dict[str, float], dies_after: int | None = None) -> None:
        self.times_ns, self.left, self.taken = times_ns, dies_after, list[tuple[int, str]]()

    def push(self, path: Path, *_: object, **__: object) -> str:
        return str(path)

    def push_file(self, path: Path) -> str:
        return str(path)

    def forget(self, _: Ticket) -> None:
        pass

    def measure(self, request: MeasureRequest, _: Ticket) -> Trial:
        if self.left is not None:
            if self.left == 0:
                raise ConnectionLost("cable out", hint="")
            self.left -= 1
        self.taken.append((request.round, request.artifact_sha256))
        noise = np.random.default_rng(len(self.taken)).lognormal(0, 0.004)
        time = round(self.times_ns[request.artifact_sha256] * noise)
        return make_trial(
            request.key, round=request.round, artifact_sha256=request.artifact_sha256, samples_ns=(time,) * 5
        )


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """Four nights on pi4 whose dense files differ; returns the results folder and the files' hashes."""
    monkeypatch.setattr(pairs, "find_inputs", lambda *_: [tmp_path / "x.npy"])
    monkeypatch.setattr(bisecting, "find_proof", lambda *_: None)
    results, hashes = tmp_path / "nights", []
    (tmp_path / "devices.toml").write_text('[pi4]\ntransport = "local"\npython = "python3"\n')
    for number in range(1, 5):
        model = save_product(tmp_path / f"store/artifact-{number}/model.onnx", WEIGHT * number)
        artifact = replace(describe_file(model), file=f"artifact-{number}/model.onnx", toolchain={"torch": f"{number}"})
        sign(model)
        build = make_build(artifact)
        trials = [make_trial(artifact_sha256=artifact.sha256, round=n) for n in range(3)]
        keep(results / str(number), Bundle(header=make_header(build), trials=tuple(trials), finished=True))
        one = make_device_night("pi4", None, (CaseVerdict(key=DENSE, verdict="same", reason=""),))
        write_night(results, make_night(number, [replace(one, run=str(number))]))
        hashes.append(artifact.sha256)
    return results, hashes


def call(results: Path, device: Pretended, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    @contextmanager
    def open_session(*_: object, **__: object) -> Iterator[Pretended]:
        yield device

    monkeypatch.setattr(sessions, "open_session", open_session)
    where = ["--results", str(results), "--store", str(results.parent / "store")]
    where += ["--inventory", str(results.parent / "devices.toml")]
    return main(["bisect", "1", "4", "--case", "onnx dense", *where, *more])


def test_the_verb_measures_pairs_in_turn_resumes_and_names_what_differs(
    lab: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, hashes = lab
    times = dict(zip(hashes, (1e6, 1e6, 1.1e6, 1.1e6), strict=True))
    killed = Pretended(times, dies_after=7)
    assert call(results, killed, monkeypatch) == 4
    device = Pretended(times)
    assert call(results, device, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "onnx dense: worse since night 3, the same until night 2" in printed
    assert "package torch: 2 → 3" in printed
    assert len(killed.taken) + len(device.taken) == 3 * 2 * pairs.LOOKS[0]  # three pairs, no trial twice
    assert killed.taken[:4] == [(0, hashes[0]), (0, hashes[3]), (1, hashes[3]), (1, hashes[0])]
    found = list((results / "bisect").glob("*/1-*/*/trials.jsonl"))
    assert len(found) == 6
    assert {len(open_bundle(path.parent).trials) for path in found} == {pairs.LOOKS[0]}
    again = Pretended(times)
    assert call(results, again, monkeypatch) == 0
    assert again.taken == []


def test_files_that_take_the_same_time_today_blame_the_device(
    lab: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, hashes = lab
    assert call(results, Pretended(dict.fromkeys(hashes, 1e6)), monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "the step is not in the files\n    no condition of the device on record differs" in printed
    assert "package torch" not in printed


def test_a_file_that_is_gone_and_a_case_that_is_unknown_are_refused(
    lab: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, hashes = lab
    (results.parent / "store/artifact-4/model.onnx").unlink()
    assert call(results, Pretended(dict.fromkeys(hashes, 1e6)), monkeypatch) == 2
    assert "night 4: dense onnx (model.onnx): the file is gone" in capsys.readouterr().err
    assert call(results, Pretended({}), monkeypatch, "--on", "pi5") == 2
    assert "it measured pi4: onnx dense" in capsys.readouterr().err


def test_a_phase_of_a_file_that_generates_is_refused(
    lab: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    results, _ = lab
    key = replace(DENSE, part=DECODE)
    one = make_device_night("pi4", None, (CaseVerdict(key=key, verdict="worse", reason=""),))
    write_night(results, make_night(5, [one]))
    assert main(["bisect", "1", "5", "--case", key.heading, "--results", str(results)]) == 2
    assert "a phase of a file that generates" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pair_is_measured_in_turn_through_a_real_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "find_inputs", lambda *_: [tmp_path / "store/artifact-1/x.npy"])
    monkeypatch.setattr(pairs, "LOOKS", (2,))
    headers = []
    for number in (1, 2):
        model = save_product(tmp_path / f"store/artifact-{number}/model.onnx", WEIGHT * number)
        sign(model)
        headers.append(make_header(make_build(replace(describe_file(model), file=f"artifact-{number}/model.onnx"))))
    suite = Suite(recipe="r", min_samples=20, min_duration_ms=1, max_warmup_ms=50)
    device = make_local(tmp_path / "at-pi4", "pi4")
    with sessions.open_session(device) as session:
        bench = pairs.Bench(session, Store(tmp_path / "store"), tmp_path / "bisect", suite, Steps(quiet=True))
        verdict = pairs.measure_pair(bench, (headers[0], headers[1]), ("1", "2"), DENSE)
    assert verdict.verdict == "unknown"  # two rounds are too few, and say so
    (folder,) = (tmp_path / "bisect").iterdir()
    for side, header in zip(("before", "after"), headers, strict=True):
        trials = open_bundle(folder / side).trials
        assert [one.round for one in trials] == [0, 1]
        assert {one.artifact_sha256 for one in trials} == {header.build.artifacts[0].sha256}
        assert all(len(one.samples_ns) >= 20 for one in trials)
    assert not list((tmp_path / "at-pi4").glob("lease*"))
