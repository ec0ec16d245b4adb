"""The units and CI files of examples/nightly really run: their own lines in a shell, `rankship` being a stand-in."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from make.artifacts import DENSE
from make.nights import make_device_night, make_night
from rankship_benchmarks.judge.changes import Change, Explanation
from rankship_benchmarks.nightly.alerts import summarise_night
from rankship_benchmarks.nightly.records import CaseVerdict
from rankship_pipeline.foundation.codec import encode

EXAMPLES = Path(__file__).parents[2] / "examples/nightly"
# Parses its words with the verb's own flags, leaves what the verb would, and ends with the status in $STATUS.
STAND_IN = """#!{python}
import os, shutil, sys
from importlib import import_module
from pathlib import Path
from rankship_pipeline.cli import VERBS
from rankship_pipeline.foundation.flags import find_parser

verb, *words = sys.argv[1:]
module, _, function = VERBS[verb][0].partition(":")
given = find_parser(getattr(import_module(module), function)).parse_args(words)
with open({calls!r}, "a") as stream:
    print(verb, *words, file=stream)
given.results.mkdir(parents=True, exist_ok=True)
(given.results / ("lab.html" if verb == "lab" else "nightly.html")).write_text("a page")
if verb == "nightly":
    shutil.copyfile({night!r}, given.json)
    sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with the stand-in in bin/, a repository's folder, and what a worse night writes."""
    change = Change(about="file", what="package torch", before="2.1", after="2.2")
    why = Explanation(baseline="a", candidate="b", finding="The file is another one.", changes=(change,))
    case = CaseVerdict(key=DENSE, verdict="worse", reason="+5.0% time", why=why)
    night = replace(make_night(7, [make_device_night("pi4", None, (case,))]), exit_code=1)
    (tmp_path / "worse.json").write_text(encode(summarise_night(night)))
    (tmp_path / "bin").mkdir()
    (tmp_path / "repository").mkdir()
    words = {"python": sys.executable, "calls": f"{tmp_path}/calls", "night": f"{tmp_path}/worse.json"}
    program = tmp_path / "bin/rankship"
    program.write_text(STAND_IN.format(**words))
    program.chmod(0o755)
    return tmp_path


def run_shell(lab: Path, script: str, status: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines as a runner's shell does: it ends at the first that fails."""
    path = f"{lab}/bin:{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "STATUS": str(status), "NIGHTS": f"{lab}/nights"} | environment
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=lab / "repository",
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def read_calls(lab: Path) -> list[str]:
    return [line.split()[0] for line in (lab / "calls").read_text().splitlines()]


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 1), (3, 3), (4, 0), (5, 0)])
def test_the_actions_workflow_fails_for_a_worse_night_and_warns_of_a_gap(lab: Path, status: int, ends: int) -> None:
    workflow: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    (job,) = workflow["jobs"].values()
    steps = {one.get("name", one.get("uses")): one for one in job["steps"]}
    assert set(job["env"]) == {"NIGHTS", "RANKSHIP_ALERT_URLS"}
    done = run_shell(lab, steps["Measure"]["run"], status)
    assert (done.returncode, done.stderr) == (ends, "")
    assert ("::warning::" in done.stdout) == (status in {4, 5})
    assert read_calls(lab) == ["nightly", "lab"]
    uploaded = steps["actions/upload-artifact@v4"]
    assert uploaded["if"] == steps["Say it in the summary"]["if"] == "always()"
    assert all((lab / "repository" / one).exists() for one in uploaded["with"]["path"].split())
    told = run_shell(lab, steps["Say it in the summary"]["run"], status, GITHUB_STEP_SUMMARY=f"{lab}/summary")
    assert (told.returncode, told.stderr) == (0, "")
    summary = (lab / "summary").read_text()
    assert "**pi4 onnx dense**: +5.0% time" in summary
    assert "- package torch: 2.1 to 2.2" in summary


@pytest.mark.parametrize(("status", "allowed"), [(0, False), (1, False), (4, True), (5, True)])
def test_the_gitlab_job_allows_gaps_to_fail_and_keeps_the_pages(lab: Path, status: int, allowed: bool) -> None:  # noqa: FBT001 - a parameter of the table above
    (job,) = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text()).values()
    done = run_shell(lab, "\n".join(job["script"]), status)
    assert (done.returncode, done.stderr) == (status, "")
    assert (status in job["allow_failure"]["exit_codes"]) == allowed
    assert read_calls(lab) == ["nightly", "lab"]
    assert all((lab / "repository" / one).exists() for one in job["artifacts"]["paths"])


@pytest.mark.parametrize(("status", "fails"), [(0, False), (1, True), (4, False), (5, False)])
def test_the_unit_runs_and_fails_only_for_a_worse_night(lab: Path, status: int, fails: bool) -> None:  # noqa: FBT001 - a parameter of the table above
    service, timer = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    for parser, kind in ((service, "service"), (timer, "timer")):
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string((EXAMPLES / f"rankship-nightly.{kind}").read_text())
    unit = service["Service"]
    assert set(service["Service"]) <= KNOWN
    assert unit["Environment"] == "RANKSHIP_ALERT_URLS_FILE=%d/alerts"
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d", timer["Timer"]["OnCalendar"])
    lines = [shlex.split(unit[name]) for name in ("ExecStart", "ExecStopPost")]
    assert all(words[0].endswith("/bin/rankship") for words in lines)
    moved = [shlex.join(["rankship", *(word.replace("/srv", str(lab)) for word in words[1:])]) for words in lines]
    (start, stop) = (run_shell(lab, line, status) for line in moved)
    assert (start.returncode, stop.returncode) == (status, 0)
    assert (status != 0 and str(status) not in unit["SuccessExitStatus"].split()) == fails
    assert read_calls(lab) == ["nightly", "lab"]


KNOWN = {
    "Type",
    "User",
    "WorkingDirectory",
    "LoadCredential",
    "Environment",
    "ExecStart",
    "ExecStopPost",
    "TimeoutStartSec",
    "SuccessExitStatus",
}
