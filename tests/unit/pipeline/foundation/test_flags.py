import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rankship_pipeline.foundation import quiet
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import find_parser, parse, parse_formats, share, start_parser

CHATTER = """
import logging, sys, warnings
from rankship_pipeline.cli import VERBS, main

def chatter(argv):
    warnings.warn("theirs", DeprecationWarning)
    logging.getLogger("torch").warning("theirs too")
    logging.getLogger("torch").error("an error")
    return 0

sys.modules["verbs_here"] = sys.modules["__main__"]
VERBS["chatter"] = ("verbs_here:chatter", "")
sys.exit(main(sys.argv[1:]))
"""


def test_a_shared_flag_is_told_in_one_place_and_its_default_may_differ(tmp_path: Path) -> None:
    first, second = (start_parser(name, "…", "--results", "--store") for name in ("a", "b"))
    second.set_defaults(results=Path("elsewhere"))
    assert parse(first, []).results == Path("rankship-results")
    assert parse(second, []).results == Path("elsewhere")
    assert "default: elsewhere" in second.format_help()
    assert parse(first, ["--store", str(tmp_path)]).store == tmp_path
    assert parse(first, ["--verbose"]).verbose


def test_the_store_is_where_the_environment_says_when_the_verb_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSHIP_STORE", "/one")
    assert parse(start_parser("a", "…", "--store"), []).store == Path("/one")


@pytest.mark.parametrize("argv", [["--inventory", "i", "sub"], ["sub", "--inventory", "i"]])
def test_a_flag_may_stand_before_a_verbs_own_verb_or_after_it(argv: list[str]) -> None:
    parser = start_parser("a", "…", "--inventory")
    parser.add_subparsers().add_parser("sub", parents=[share("--inventory", again=True)])
    assert parse(parser, argv).inventory == Path("i")
    assert parse(parser, ["sub"]).inventory is None


def test_formats_come_in_their_usual_order() -> None:
    assert parse_formats("tflite, onnx") == ("onnx", "tflite")
    with pytest.raises(InputError, match="--formats: unknown 'tf'"):
        parse_formats("onnx,tf")


def test_a_verbs_parser_is_found_without_running_the_verb() -> None:
    ran: list[argparse.Namespace] = []

    def verb(argv: list[str]) -> int:
        parser = start_parser("a", "…")
        parser.add_argument("needed")
        ran.append(parse(parser, argv))
        return 0

    assert "needed" in find_parser(verb).format_help()
    assert ran == []
    assert verb(["x"]) == 0
    with pytest.raises(TypeError, match="len does not read its arguments"):
        find_parser(len)


def test_warnings_and_log_lines_of_libraries_stay_away_until_asked_for() -> None:
    hidden = {name: value for name, value in os.environ.items() if name not in {quiet.VERBOSE, "PYTHONWARNINGS"}}

    def run(*argv: str, **environment: str) -> str:
        command = [sys.executable, "-W", "default", "-c", CHATTER, *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**hidden, **environment})
        return done.stderr

    assert run("chatter") == "an error\n"
    for loud in (run("chatter", "--verbose"), run("--verbose", "chatter"), run("chatter", **{quiet.VERBOSE: "1"})):
        assert "DeprecationWarning: theirs" in loud
        assert "theirs too\nan error\n" in loud


def test_nothing_is_hidden_where_the_environment_asks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(quiet.VERBOSE, "1")
    before = list(warnings.filters)
    quiet.silence()
    assert warnings.filters == before
    assert logging.getLogger().isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("flag", ["--store", "--results"])
def test_an_address_is_no_folder(flag: str) -> None:
    with pytest.raises(InputError, match=r"s3://bucket/x is an address, and this is a folder of this machine"):
        share(flag).parse_args([flag, "s3://bucket/x"])
