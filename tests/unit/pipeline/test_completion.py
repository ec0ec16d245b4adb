"""The scripts for bash, zsh and fish, each run by its own shell."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankship_pipeline.cli import VERBS, find_verb, main
from rankship_pipeline.completion import join_parsers
from rankship_pipeline.foundation.flags import find_parser

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p rankship | sed 's/.*-F \\([^ ]*\\).*/\\1/') rankship "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'source $argv[1]; complete -C "$argv[2]" | string split -f 1 \\t'
# A terminal of its own, as zsh's completion insists on: the words typed, then what the list under them shows. A busy
# machine takes its time over the list: it is read until the words looked for are there, for a minute at most, and asked
# for again every second, as the terminal swallows the key while the shell is not reading it.
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1=; fpath=($1 \\$fpath); autoload -U compinit; compinit -u -D; zstyle ':completion:*' list-prompt ''"
zpty -w shell "LISTMAX=0; COLUMNS=200; LINES=200; bindkey '^D' list-choices; print ready"
zpty -r shell line '*ready*ready*'
zpty -w -n shell "$2"$'\\x04'
shift 2; shown=
for turn in {1..1200}; do
    while zpty -r -t shell line; do shown+=$line; done
    missing=0; for word; do [[ $shown = *$word* ]] || missing=1; done
    (( missing )) || break
    (( turn % 20 )) || zpty -w -n shell $'\\x04'
    sleep 0.05
done
print -r -- "$shown"
zpty -d shell
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three scripts as the verb prints them."""
    folder = tmp_path_factory.mktemp("completion")
    for shell, name in (("bash", "rankship.bash"), ("zsh", "_rankship"), ("fish", "rankship.fish")):
        program = f"import sys; from rankship_pipeline.cli import main; sys.exit(main(['completion', {shell!r}]))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        (folder / name).write_text(done.stdout)
    return folder


def complete_in_bash(scripts: Path, *words: str) -> set[str]:
    command = ["bash", "--norc", "-c", BASH, "bash", str(scripts / "rankship.bash"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts)
    return {word.strip() for word in done.stdout.split("\n") if word}


def complete_in_fish(scripts: Path, typed: str) -> set[str]:
    if not shutil.which("fish"):
        pytest.skip("no fish: apt-get install fish")
    command = ["fish", "--no-config", "-c", FISH, str(scripts / "rankship.fish"), typed]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts).stdout.split("\n"))


def complete_in_zsh(scripts: Path, typed: str, *expected: str) -> str:
    if not shutil.which("zsh"):
        pytest.skip("no zsh: apt-get install zsh")
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(scripts), typed, *expected]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts).stdout


def test_bash_completes_verbs_flags_choices_and_files(scripts: Path) -> None:
    assert complete_in_bash(scripts, "rankship", "") >= set(VERBS)
    assert complete_in_bash(scripts, "rankship", "co") == {"compare", "completion", "compress", "costs"} & set(VERBS)
    assert {"--on", "--store", "--results", "--verbose"} <= complete_in_bash(scripts, "rankship", "run", "--")
    assert complete_in_bash(scripts, "rankship", "costs", "--format", "") == {"onnx", "tflite", "executorch"}
    assert complete_in_bash(scripts, "rankship", "devices", "ad") == {"add"}
    assert complete_in_bash(scripts, "rankship", "build", "rankship.f") == {"rankship.fish"}


def test_fish_completes_verbs_and_flags(scripts: Path) -> None:
    assert complete_in_fish(scripts, "rankship ") >= set(VERBS)
    assert {"--on", "--store", "--verbose"} <= complete_in_fish(scripts, "rankship run --")
    assert {"build", "install", "benchmark"} <= complete_in_fish(scripts, "rankship kit ")


def test_zsh_completes_verbs_and_flags(scripts: Path) -> None:
    shown = complete_in_zsh(scripts, "rankship ", *VERBS)
    assert all(verb in shown for verb in VERBS), shown
    assert "--results" in complete_in_zsh(scripts, "rankship run --", "--results")


def test_every_verb_is_known_with_all_its_flags_and_no_others() -> None:
    for verb in VERBS:
        parser = find_parser(find_verb(verb))
        flags = {flag for action in parser._actions for flag in action.option_strings}
        assert flags >= {"--help", "--verbose"}, verb
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            join_parsers().parse_args([verb, "--help"])
        assert {
            word.strip("[],") for word in shown.getvalue().split() if word.strip("[],").startswith("--")
        } >= flags - {"-h"}


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "tcsh"])
