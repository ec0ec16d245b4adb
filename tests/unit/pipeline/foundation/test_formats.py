"""One table of formats: complete, light, and told the same by the agent and by what pip installs."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format
from rankship_targets.agent import programs, runtimes

ROOT = Path(__file__).parents[4]
each_format = pytest.mark.parametrize("name", FORMATS)


def test_every_format_that_may_be_named_has_its_line() -> None:
    assert get_args(Format) == FORMATS
    for sign in ("suffix", "fill"):
        assert len({getattr(facts, sign) for facts in FACTS.values()}) == len(FORMATS), sign


def test_the_table_loads_no_toolchain() -> None:
    code = (
        "import sys; import rankship_pipeline.foundation.formats; print(*{'torch', 'numpy', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@each_format
def test_the_exporter_is_a_module_and_its_extra_installs_what_proves_it(name: Format) -> None:
    facts = FACTS[name]
    assert importlib.util.find_spec(facts.exporter) is not None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extra = facts.extra.removeprefix("rankship[").removesuffix("]")
    pinned = {one.partition("==")[0].replace("-", "_") for one in extras[extra]}
    assert facts.exporter_import in pinned
    assert pinned & {one.replace("-", "_") for one in facts.exporter_distributions}


def test_the_agent_knows_the_same_formats_by_the_same_runtimes() -> None:
    assert tuple(runtimes.RUNTIMES) == FORMATS
    for name, facts in FACTS.items():
        distributions, _ = runtimes.RUNTIMES[name][0]
        assert distributions[0] == facts.runtime_distribution
        assert set(distributions) <= set(facts.device_packages), "what pip is told to install is what the agent needs"
        assert "numpy" in facts.device_packages


def test_the_agent_starts_the_programs_that_kits_compile() -> None:
    compiled = {name for name, facts in FACTS.items() if facts.kit_compiles}
    assert set(programs.VARIABLES) == compiled
    assert all(programs.VARIABLES[name] in FACTS[name].kit_check for name in compiled)


@each_format
def test_an_example_names_the_file_it_loads(name: Format) -> None:
    assert "/a b/model" in FACTS[name].load_example.format(path="/a b/model", json_path='"/a b/model"')
