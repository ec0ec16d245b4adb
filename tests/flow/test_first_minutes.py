"""What a newcomer types first: `init` and `compress`, on models as save_pretrained writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from rankship_pipeline.cli import main
from rankship_pipeline.flow import idle
from rankship_pipeline.flow.build import read_build
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.artifact_key import VARIANTS
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.profile_file import Profile
from rankship_pipeline.foundation.records import Build, RankPlan, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.session.manifest import read_manifest

pytestmark = pytest.mark.slow
NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 3))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKSHIP_STORE", str(tmp_path / "store"))
    return tmp_path


def check(recipe: Path) -> Prepared:
    """All that a build checks before its long work."""
    return prepare(read_recipe(recipe), recipe.resolve().parent)


def test_compress_lays_proven_files_and_a_recipe_that_goes_on(
    here: Path, tiny_models: Path, colours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", str(tiny_models / "vit"), "--kept", "0.7", "--images", str(colours), "--to", "out"]
    assert main([*command, "--formats", "onnx", "--profile", "profile.json"]) == 0
    shown = capsys.readouterr()
    assert "out/compressed.onnx" in shown.out
    assert "of memory to build; most time: " in shown.err
    profile = decode(Profile, (here / "profile.json").read_bytes(), where="profile")
    compressing = next(one for one in profile.stages if one.name == "compress: knapsack")
    assert compressing.estimated_seconds is not None
    assert compressing.layer_seconds
    out = here / "out"
    models = {f"{variant}.onnx{suffix}" for variant in VARIANTS for suffix in ("", ".manifest.json")}
    records = {"recipe.toml", "build.json", "plan.json", "parity.json"}
    assert {path.name for path in out.iterdir()} == models | records
    build = decode(Build, (out / "build.json").read_bytes(), where="build")
    plan = decode(RankPlan, (out / "plan.json").read_bytes(), where="plan")
    proofs = decode(list[Verified], (out / "parity.json").read_bytes(), where="parity")
    assert build.plan == plan
    assert plan.total_parameters <= 0.7 * build.dense_parameters
    assert {one.artifact_sha256 for one in proofs} == {one.sha256 for one in build.artifacts}
    assert build.answers == "labels"
    manifest = read_manifest(out / "compressed.onnx")  # signed for this very file: it may be deployed
    assert manifest.verified in proofs
    monkeypatch.setattr(idle, "trace_graph", lambda *_: pytest.fail("what is built was checked"))
    assert main(["show", "out/recipe.toml"]) == 0, "the recipe finds the finished build"
    assert main([*command, "--formats", "onnx"]) == 0, "the same command goes on"
    assert main([*command, "--formats", "tflite"]) == 2
    assert "out/recipe.toml was written by another command" in capsys.readouterr().err


def test_compress_merges_several_models_of_text(here: Path, tiny_models: Path) -> None:
    lines = [f"{colour}\ta {colour} thing" for colour in ("red", "green", "blue") * 8]
    (here / "t.tsv").write_text("\n".join(lines))
    models = [str(tiny_models / "bert"), str(tiny_models / "bert")]
    flags = ["--text", "t.tsv", "--merge", "average", "--parameters", "12000", "--formats", "onnx"]
    assert main(["compress", *models, *flags, "--to", "out"]) == 0
    recipe = read_recipe(here / "out/recipe.toml")
    assert [one.name for one in recipe.models] == ["bert", "bert 2"]
    assert recipe.merge.method == "average"
    assert recipe.budget.parameters == 12000


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "compressing needs data"),
        (["--size", "8"], "--size says how to read data"),
        (["--text", "t", "--merge", "ties"], "--merge is for several models"),
        (["--text", "t", "--kept", "0.5", "--flops", "9"], "two budgets: kept_parameters and flops"),
        (["--text", "t", "--formats", "tf"], "--formats: unknown 'tf'"),
        (["--text", "no-such-file.txt", "--formats", "onnx"], "cannot read"),
    ],
)
def test_compress_says_what_is_wrong_with_its_flags(
    here: Path, tiny_models: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_models / "bert"), "--to", str(here / "out"), *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_init_quotes_the_path_of_the_command_that_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my models").mkdir()
    assert main(["init", "my models/the first", "--formats", "onnx"]) == 0
    assert capsys.readouterr().out.endswith("next: rankship build 'my models/the first.toml'\n")
    assert "# Build it: rankship build 'the first.toml'\n" in (here / "my models" / "the first.toml").read_text()


def test_init_without_a_model_builds_on_the_digits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mine", "--formats", "onnx"]) == 0
    shown = capsys.readouterr().out
    assert "to do: mine.py has a small network, trained on scikit-learn's digits" in shown
    assert shown.endswith("next: rankship build mine.toml\n")
    assert main(["build", "mine.toml"]) == 0
    (entry,) = Store(here / "store").root.glob("build-*")
    build = read_build(Store(here / "store").open(entry))
    assert build.accuracies[-1].value > 0.9
    assert main(["init", "mine"]) == 2
    assert "mine.toml is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "flags", "answers"),
    [
        ("vit", ["--images", "colours"], "labels"),
        ("bert", ["--text", "t.tsv"], "labels"),
        ("bert", ["--csv", "t.csv", "--label", "colour", "--columns", "words"], "labels"),
        ("vit", [], "predictions"),
        ("bert", [], "predictions"),
    ],
)
def test_what_init_writes_for_a_hugging_face_model_is_ready_to_build(
    here: Path, tiny_models: Path, colours: Path, model: str, flags: list[str], answers: str
) -> None:
    (here / "colours").symlink_to(colours)
    names = ("red", "green", "blue") * 8
    (here / "t.tsv").write_text("\n".join(f"{name}\ta {name} thing" for name in names))
    (here / "t.csv").write_text("\n".join(["words,colour", *(f"a {name} thing,{name}" for name in names)]))
    assert main(["init", "sub/mine", "--huggingface", str(tiny_models / model), *flags, "--formats", "onnx"]) == 0
    text = (here / "sub/mine.toml").read_text()
    assert "task =" not in text
    assert text.count("#") > 5
    prepared = check(here / "sub/mine.toml")
    assert prepared.data.answers == answers
    assert prepared.recipe.budget.kept_parameters == 0.5


def test_what_init_writes_for_a_factory_is_ready_to_build(here: Path, colours: Path) -> None:
    (here / "net.py").write_text(NET)
    (here / "colours").symlink_to(colours)
    sys.path.insert(0, str(here))
    try:
        import net  # type: ignore[import-not-found]

        save_file(net.make().state_dict(), here / "w.safetensors")
    finally:
        sys.path.remove(str(here))
    flags = ["--factory", "net.py:make", "--weights", "w.safetensors", "--formats", "onnx"]
    assert main(["init", "sub/mine", *flags, "--images", "colours", "--size", "8"]) == 0
    assert check(here / "sub/mine.toml").data.test_inputs[0].shape == (18, 3, 8, 8)
    assert main(["init", "other", *flags]) == 0
    loader = here / "other_data.py"
    loader.write_text(loader.read_text().replace("(3, 224, 224)", "(3, 8, 8)"))
    assert check(here / "other.toml").data.test_inputs[0].shape == (64, 3, 8, 8)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--csv", "t.csv"], "the data need a model"),
        (["--weights", "w"], "--weights needs --factory"),
        (["--factory", "a.py:f", "--text", "t"], "--text is for Hugging Face models"),
        (["--huggingface", "no-such-folder/not a hub id"], "is neither a folder nor a hub id"),
    ],
)
def test_init_writes_nothing_where_a_flag_is_wrong(
    here: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "mine", *flags]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(here.iterdir())


def test_a_users_terminal_shows_our_lines_and_no_librarys(
    here: Path, tiny_models: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in a process of its own: what is printed at import, by loggers and by subprocesses counts too."""
    flags = ["compress", str(tiny_models / "vit"), "--images", str(colours), "--formats", "executorch", "--to"]
    program = "import sys; from rankship_pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    plain = {name: value for name, value in os.environ.items() if name not in {"RANKSHIP_VERBOSE", "PYTHONWARNINGS"}}
    plain.pop("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", None)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *flags, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=plain, cwd=here)

    quiet = run("quiet")
    assert quiet.returncode == 0, quiet.stderr
    strangers = [line for line in quiet.stderr.splitlines() if not line.startswith(("✓", "·"))]
    assert strangers == []
    loud = run("quiet", "--verbose")  # what is finished is taken from the store: these are the imports alone
    assert loud.returncode == 0, loud.stderr
    assert [line for line in loud.stderr.splitlines() if not line.startswith(("✓", "·"))]
    assert main([*flags, "quiet", "--kept", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("InputError: quiet/recipe.toml was written by another command")
