import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankship_pipeline import __version__, cli
from rankship_pipeline.foundation import errors
from rankship_pipeline.foundation.errors import InputError, RankshipError

Install = Callable[[Callable[[list[str]], int]], None]

EXIT_CODES = {
    "RankshipError": 70,
    "InputError": 2,
    "BuildError": 3,
    "BudgetInfeasible": 3,
    "UnsupportedOp": 3,
    "ParityFailed": 3,
    "MergeMismatch": 3,
    "QualityLost": 3,
    "TargetError": 4,
    "TransientTargetError": 4,
    "ConnectionLost": 4,
    "Unreachable": 4,
    "Rebooted": 4,
    "TargetTimeout": 4,
    "TargetBusy": 4,
    "AgentDied": 4,
    "PersistentTargetError": 4,
    "AuthError": 4,
    "Unauthorised": 4,
    "HostKeyChanged": 4,
    "CommandFailed": 4,
    "AgentMismatch": 4,
    "Lacks": 4,
    "WrongSystem": 4,
    "AmbiguousDevice": 4,
    "NoSpace": 4,
    "ReadOnly": 4,
    "Quarantined": 4,
    "ManifestRefused": 4,
    "MeasurementError": 5,
    "UnlikeConditions": 5,
    "Throttled": 5,
    "ClockJumped": 5,
    "TraceGap": 5,
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a function behind the verb `try`."""

    def put(function: Callable[[list[str]], int]) -> None:
        module = ModuleType("verbs_of_this_test")
        module.try_it = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.VERBS, "try", ("verbs_of_this_test:try_it", "try"))

    return put


def raise_it(error: BaseException) -> Callable[[list[str]], int]:
    """A verb that raises, from no file: neither this test's nor a user's code."""
    space: dict[str, Any] = {"error": error}
    exec("def verb(_): raise error", space)  # noqa: S102 - as above
    verb: Callable[[list[str]], int] = space["verb"]
    return verb


def test_the_table_of_exit_codes_names_every_error() -> None:
    found = {name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)}
    assert found == EXIT_CODES.keys()


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_every_kind_of_error_has_its_exit_status(
    name: str, code: int, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    kind: type[RankshipError] = getattr(errors, name)
    install(raise_it(kind("it broke", hint="mend it")))
    assert cli.main(["try"]) == code
    assert capsys.readouterr() == ("", f"{name}: it broke\n  → mend it\n")


def test_an_error_without_a_hint_is_one_line(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(raise_it(InputError("it broke")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "InputError: it broke\n"


def test_an_interrupt_exits_130_and_says_that_nothing_is_lost(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(raise_it(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert "finished work is kept" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "gone", "/x"), SystemExit(1)])
def test_a_mistake_in_the_program_is_shown_whole_and_never_looks_like_a_verdict(
    error: BaseException, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(raise_it(error))
    assert cli.main(["try"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "mistake in Rankship" in err
    assert "report it" in err


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG]
)
def test_a_disk_that_refuses_is_told_without_a_traceback(
    number: int, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(raise_it(OSError(number, os.strerror(number), "/the/store")))
    assert cli.main(["try"]) == 2
    said, advice = capsys.readouterr().err.splitlines()
    assert said == f"{os.strerror(number)}: /the/store"
    assert "then run again" in advice


def test_a_full_disk_that_names_no_file_is_told_too(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(raise_it(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err.startswith("No space left on device\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_full_memory_is_told_without_a_traceback(
    error: Exception, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(raise_it(error))
    assert cli.main(["try"]) == 3
    err = capsys.readouterr().err
    assert "memory is full" in err
    assert "Traceback" not in err


VERB = """
import sys, time, types
from rankship_pipeline import cli
def verb(_):
    {body}
    return 0
module = types.ModuleType("own")
module.verb = verb
sys.modules["own"] = module
cli.VERBS["try"] = ("own:verb", "")
sys.exit(cli.main(["try"]))
"""


@pytest.mark.parametrize(
    "body",
    [
        "sys.stdout.write('line\\n' * 100_000)",
        "sys.stdout.write('line\\n')",
        "import rich; [rich.print('line') for _ in range(100_000)]",
    ],
)
def test_a_reader_that_goes_away_ends_the_verb_quietly(body: str) -> None:
    words = [sys.executable, "-c", VERB.format(body=body)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_broken_connection_is_no_reader_that_went_away(install: Install) -> None:
    install(raise_it(BrokenPipeError()))
    assert cli.main(["try"]) == 70


def test_an_error_of_the_users_own_code_names_its_place(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "factory.py"
    own.write_text("import json\ndef make():\n    return json.loads('no')\n")
    space: dict[str, Callable[[], int]] = {}
    exec(compile(own.read_text(), str(own), "exec"), space)  # noqa: S102 - as recipes' files are
    install(lambda _: space["make"]())
    assert cli.main(["try"]) == 2
    err = capsys.readouterr().err
    assert "JSONDecodeError comes from your own factory.py, line 3" in err
    assert "Traceback" in err


def test_a_closed_stdout_is_no_mistake() -> None:
    words = [sys.executable, "-c", f"import sys; sys.stdout = None\n{VERB.format(body='sys.stdout.write(chr(65))')}"]
    done = subprocess.run(words, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_a_terminals_encoding_lacks_is_shown_as_escapes() -> None:
    words = [sys.executable, "-c", VERB.format(body="print('a \u2192 b')")]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, "a \\u2192 b\n")


def test_a_verb_gets_its_arguments_and_gives_its_status(install: Install) -> None:
    install(len)
    assert cli.main(["try", "a", "--b"]) == 2


def test_without_arguments_the_command_line_is_read(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    install(len)
    monkeypatch.setattr(sys, "argv", ["rankship", "try", "1", "2", "3"])
    assert cli.main() == 3


@pytest.mark.parametrize(("typed", "meant"), [("biuld", "build"), ("benchmark", "bench"), ("reprot", "report")])
def test_an_unknown_verb_suggests_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    err = capsys.readouterr().err
    assert f"unknown verb {typed!r}" in err
    assert f"did you mean {meant!r}?" in err


def test_a_verb_like_no_other_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["zzz"]) == 2
    err = capsys.readouterr().err
    assert "did you mean" not in err
    assert "rankship --help" in err


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for verb, (_, summary) in cli.VERBS.items():
        assert f"  {verb:11}{summary}\n" in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rankship {__version__}\n"


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_is_there_and_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    assert f"usage: rankship {verb}" in capsys.readouterr().out


def test_help_loads_no_heavy_package() -> None:
    program = (
        "import sys; from rankship_pipeline.cli import main; main(['--help']);"
        "print(*sorted({'torch', 'numpy', 'pydantic', 'rich', 'scipy'} & sys.modules.keys()), file=sys.stderr, end='')"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_a_spelling_mistake_in_a_recipe_is_told_before_torch_is_loaded() -> None:
    program = (
        "import sys; from rankship_pipeline.cli import main; status = main(['build', '/nowhere/recipe.toml']);"
        "print(status, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "2 False\n"


@pytest.mark.parametrize(("own", "kept"), [(None, "passive"), ("active", "active")])
def test_torchs_threads_wait_asleep_unless_the_user_says_otherwise(
    own: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")  # so that it is put back
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert cli.main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == kept
