from pathlib import Path

import pytest

from rankship_benchmarks.verbs.compress import compress
from rankship_benchmarks.verbs.stream import draft_job, print_stream
from rankship_pipeline.evaluate.perplexity import Perplexity
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import find_parser
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.job import StreamJob, StreamReport

GIVEN = ["some/model", "--to", "out", "--stream", "--text", "a.txt"]


def draft(*flags: str) -> StreamJob:
    return draft_job(find_parser(compress).parse_args([*GIVEN, *flags]))


def test_flags_say_the_whole_job() -> None:
    assert draft("--kept", "0.8") == StreamJob(
        model="some/model", text=Path("a.txt"), budget=Budget(kept_parameters=0.8)
    )
    flags = "--parameters 1000 --tokens 128 --samples 8 --test-samples 4 --test-text b.txt --method strs"
    more = "--sensitivity relative --step 32 --workers 3 --scheduler tcp://one:8786"
    assert draft(*flags.split(), *more.split()) == StreamJob(
        model="some/model",
        text=Path("a.txt"),
        test_text=Path("b.txt"),
        tokens=128,
        samples=8,
        test_samples=4,
        budget=Budget(parameters=1000),
        ranks=RankChoice(method="strs", sensitivity="relative", step=32),
        how=StreamChoice(workers=3, scheduler="tcp://one:8786"),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "photos"], "--images"),
        (["--latency-ms", "3"], "--latency-ms does not go with --stream"),
        (["--precision", "int8"], "--precision does not go with --stream"),
        (["--formats", "onnx"], "--formats does not go with --stream"),
        (["--merge", "joint"], "--merge does not go with --stream"),
        (["--kept", "0.5", "--parameters", "7"], "two budgets"),
        (["--workers", "0"], "--workers is 0"),
        (["--tokens", "-1"], "--tokens is -1"),
    ],
)
def test_what_does_not_go_with_a_stream_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        draft(*flags)
    except InputError as error:
        said = str(error)
    except SystemExit:  # argparse: two kinds of data
        said = capsys.readouterr().err
    assert message in said


def test_two_models_no_text_and_flags_without_a_stream_are_refused(tmp_path: Path) -> None:
    parser = find_parser(compress)
    with pytest.raises(InputError, match="one model, got 2"):
        draft_job(parser.parse_args(["another", *GIVEN]))
    with pytest.raises(InputError, match="needs a text"):
        draft_job(parser.parse_args(GIVEN[:4]))
    for flag in (["--workers", "2"], ["--method", "uniform"], ["--work", "there"]):
        with pytest.raises(InputError, match=f"{flag[0]} needs --stream"):
            compress(["model", "--to", str(tmp_path / "out"), *flag])


def test_the_report_says_sizes_and_both_perplexities(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (
        Perplexity(
            perplexity=found,
            mean_nll_nats=1.0,
            scored_tokens=4095,
            length_tokens=256,
            stride_tokens=256,
            blocks=16,
            low=None if found > 8 else 7.5,
            high=None if found > 8 else 8.0,
        )
        for found in (7.75, 9.5)
    )
    report = StreamReport(
        made_from="",
        dense_parameters=1000,
        parameters=799,
        budget_parameters=800,
        layers=14,
        factored=5,
        calibration_tokens=1024,
        before=before,
        after=after,
        predicted_nats=1.5,
        doubts=("few samples",),
    )
    print_stream(report, Path("out"))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "799 of 1,000 parameters (79.9 %; budget 800); 5 of 14 layers are pairs now",
        "perplexity before: 7.75 [7.5, 8], 4,095 tokens in windows of 256, stride 256",
        "perplexity after: 9.5, 4,095 tokens in windows of 256, stride 256",
        "note: few samples",
        "out: rankship.load('out') is the model in torch",
    ]
