"""Why a night is worse: the commits, the operators and the records that differ, shown wherever the night is."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import DENSE
from make.bundles import keep
from make.nights import do_night, make_night_bundle, measure_with, plan_night
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.measure.profiles import Profile, Profiles
from rankship_benchmarks.nightly.moved_operators import compare_profiles, find_moves
from rankship_benchmarks.nightly.page import PAGE, list_alarms
from rankship_benchmarks.nightly.records import list_nights
from rankship_benchmarks.nightly.repository import list_commits, read_commit
from rankship_benchmarks.verbs.nightly import _print_night
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.trials.events import OperatorTime


def call_git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    call_git(folder, "init", "-q")
    commit(folder, "the first model")
    return folder


def commit(folder: Path, subject: str) -> None:
    (folder / "model.py").write_text(subject)
    call_git(folder, "add", "-A")
    call_git(folder, "commit", "-q", "-m", subject)


def make_profile(sha256: str, *operators: tuple[str, str, int]) -> Profile:
    timed = tuple(OperatorTime(name=name, kind=kind, ns=(ns - 1, ns, ns + 1)) for name, kind, ns in operators)
    return Profile(key=DENSE, artifact_sha256=sha256, threads=1, operators=timed, inference_ns=(1, 2, 3))


def keep_profile(folder: Path, profile: Profile) -> None:
    found = Profiles(taken_utc="", profiles=(profile,), missing={})
    (folder / "profiles.json").write_text(encode(found))


def rebuild(bundle: Bundle) -> Bundle:
    """The same run of a file that another package made."""
    build = bundle.header.build
    new = [
        replace(one, sha256=f"new {one.sha256}"[:64], toolchain=one.toolchain | {"torch": "9"})
        for one in build.artifacts
    ]
    trials = [replace(one, artifact_sha256=f"new {one.artifact_sha256}"[:64]) for one in bundle.trials]
    header = replace(bundle.header, build=replace(build, artifacts=tuple(new)))
    return replace(bundle, header=header, trials=tuple(trials))


def test_a_worse_night_names_package_operator_and_commit_on_page_in_json_and_terminal(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tonight = replace(plan_night(tmp_path / "results"), repository=repository)
    first = make_profile("1", ("conv_1", "Conv", 5000), ("gemm", "Gemm", 900))
    later = make_profile("2", ("conv_7", "Conv", 5001), ("pool", "AveragePool", 700), ("gemm_3", "Gemm", 901))

    def profiled(measure: Measure, profile: Profile) -> Measure:
        def work(device: str, steps: Steps) -> Path:
            folder = measure(device, steps)
            keep_profile(folder, profile)
            return folder

        return work

    do_night(tonight, profiled(measure_with(tonight.results), first))
    commit(repository, "average before the head")
    slower = measure_with(tonight.results, slower=1.05, spoil=rebuild)
    night = do_night(tonight, profiled(slower, later))
    (case,) = night.devices[0].cases
    assert case.why is not None
    assert case.why.finding.startswith("The file is another one")
    (alarm,) = list_alarms(night)
    assert alarm.reasons[1] == "package torch: 2.13.0 → 9"
    assert "profiled: pool AveragePool: new, 0.7 µs" in alarm.reasons
    assert [one.name for one in case.why.operators] == ["pool"]
    assert [one.split(" ", 1)[1] for one in case.why.commits] == ["average before the head"]
    assert list_nights(tonight.results)[-1] == night
    page = (tonight.results / PAGE).read_text()
    _print_night(night, tonight.results / PAGE)
    printed = capsys.readouterr().out
    for words in ("package torch: 2.13.0 → 9", "average before the head"):
        assert words in page
        assert words in printed
    assert night.commit is not None
    assert night.commit.commit[:12] in page


def test_a_lasting_step_is_explained_across_the_nights_where_it_began(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    for _ in range(7):
        do_night(tonight)
    for _ in range(2):  # too little for a verdict from night to night, certain on the second
        night = do_night(tonight, measure_with(tmp_path, slower=1.014, spoil=rebuild))
    (case,) = night.devices[0].cases
    assert case.verdict == "worse"
    assert case.step is not None
    assert case.why is not None
    assert (case.why.baseline, case.why.candidate) == ("a-7", "a-8")


def test_a_night_that_is_not_worse_explains_nothing(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    do_night(tonight)
    (case,) = do_night(tonight, measure_with(tmp_path, spoil=rebuild)).devices[0].cases
    assert (case.verdict, case.why) == ("same", None)


def test_operators_of_the_same_file_are_matched_by_name_and_small_ones_left_out() -> None:
    before = make_profile("1", ("a", "Conv", 10_000), ("b", "Conv", 5_000), ("c", "Relu", 100))
    after = make_profile("1", ("a", "Conv", 10_001), ("b", "Conv", 6_000), ("c", "Relu", 190))
    (moved,) = compare_profiles(before, after)
    assert (moved.name, moved.before_ns, moved.after_ns, moved.gained_ns) == ("b", 5_000, 6_000, 1_000)


def test_an_operator_that_is_gone_is_a_gain() -> None:
    before = make_profile("1", ("a", "Conv", 10_000), ("b", "Relu", 5_000))
    (moved,) = compare_profiles(before, make_profile("2", ("z", "Conv", 10_000)))
    assert (moved.name, moved.after_ns, moved.gained_ns) == ("b", None, -5_000)


def test_profiles_that_are_missing_or_did_not_move_are_told(tmp_path: Path) -> None:
    folders = [keep(tmp_path / name, make_night_bundle("a", 1)) for name in ("one", "two")]
    assert find_moves(folders[0], folders[1], DENSE) == ((), "no profile of this case in one and two")
    for folder in folders:
        keep_profile(folder, make_profile("1", ("a", "Conv", 10_000)))
    moves, why = find_moves(folders[0], folders[1], DENSE)
    assert (moves, why) == ((), "no single operator's time moved; all together took 10.0 µs → 10.0 µs")


def test_commits_are_listed_newest_first_and_uncommitted_changes_are_told(repository: Path) -> None:
    before = read_commit(repository)
    assert list_commits(repository, before, before) == ()
    for number in range(3):
        commit(repository, f"change {number}")
    (repository / "results.txt").write_text("not tracked")
    after = read_commit(repository)
    assert [one.split(" ", 1)[1] for one in list_commits(repository, before, after)] == [
        "change 2",
        "change 1",
        "change 0",
    ]
    assert list_commits(None, before, after) == (f"{after.commit[:12]}, was {before.commit[:12]}",)
    assert list_commits(repository, None, after) == ()
    (repository / "model.py").write_text("dirty")
    dirty = read_commit(repository)
    assert (dirty.commit, dirty.clean) == (after.commit, False)
    (told,) = list_commits(repository, after, dirty)
    assert "the later night held changes that were not committed" in told


def test_a_folder_without_a_repository_is_refused_before_the_night_begins(tmp_path: Path) -> None:
    tonight = replace(plan_night(tmp_path / "results"), repository=tmp_path / "nowhere")
    with pytest.raises(InputError, match="git reads no commit"):
        do_night(tonight)
    assert list_nights(tonight.results) == []


def test_a_night_of_an_earlier_release_is_read_without_reasons_and_commit(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    do_night(tonight)
    path = tmp_path / "nights/000001.json"
    old = json.loads(path.read_text())
    del old["commit"]
    del old["devices"][0]["cases"][0]["why"]
    path.write_text(json.dumps(old))
    (night,) = list_nights(tmp_path)
    assert (night.commit, night.devices[0].cases[0].why) == (None, None)
