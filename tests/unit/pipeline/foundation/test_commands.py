import subprocess

import pytest

from rankship_pipeline.foundation.commands import show_command


@pytest.mark.parametrize("name", ["pi4", "my pi", "größe", "it's", "$(touch x)", "a;b", "-x", ""])
def test_a_shell_reads_back_the_words_that_were_shown(name: str) -> None:
    shown = show_command("printf", "%s", name)
    assert shown[0] == shown[-1] == "`"
    done = subprocess.run(["sh", "-c", shown.strip("`")], capture_output=True, text=True, check=True)
    assert done.stdout == name.removeprefix("%")
