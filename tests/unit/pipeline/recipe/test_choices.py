from pathlib import Path

import pytest

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.choices import Recipe, find_unit
from rankship_pipeline.recipe.rules import read_recipe

RECIPES = Path(__file__).parents[4] / "pipeline/recipes"
MODEL = """
[[models]]
name = "a"
factory = "net.py:make"
weights = "a.safetensors"
"""
DATA = """
[data]
loader = "net.py:load"
"""
BUDGET = """
[budget]
kept_parameters = 0.5
"""

BYTES = "[budget]\nsize_bytes = 99"
ROUNDED = "[precision]\nweights = ['int8', 'int4']"


def read(folder: Path, *parts: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text('name = "test"\n' + "\n".join(parts))
    return read_recipe(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_right_and_named_after_their_file(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert len(recipe.models) == 2
    assert recipe.export.formats == ("onnx", "tflite", "executorch")


def test_there_are_shipped_recipes() -> None:
    assert list(RECIPES.glob("*.toml"))


def test_a_recipe_has_defaults_for_all_but_models_data_and_budget(tmp_path: Path) -> None:
    recipe = read(tmp_path, MODEL, DATA, BUDGET)
    assert recipe.ranks.method == "knapsack"
    assert recipe.merge.method == "joint"
    assert recipe.factorise.whitening == "swift"


def test_a_whole_number_serves_as_a_share(tmp_path: Path) -> None:
    assert read(tmp_path, MODEL, DATA, "[budget]\nkept_parameters = 1").budget.kept_parameters == 1


def test_comments_and_order_do_not_change_a_recipes_hash(tmp_path: Path) -> None:
    first = read(tmp_path, MODEL, DATA, BUDGET)
    second = read(tmp_path, "# a comment", BUDGET, DATA, MODEL)
    assert digest(first) == digest(second)
    assert digest(first) != digest(read(tmp_path, MODEL, DATA, BUDGET, "[ranks]\nstep = 4"))


@pytest.mark.parametrize(
    ("given", "place", "meant"),
    [
        ("[budget]\nkept_parameter = 0.5", "budget.kept_parameter", "kept_parameters"),
        ("[rank]\nstep = 8", "rank", "ranks"),
        ("[factorise]\nwhitenning = 'eigen'", "factorise.whitenning", "whitening"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, given: str, place: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"unknown key '{place}', did you mean '{meant}'"):
        read(tmp_path, MODEL, DATA, given)


def test_an_unknown_key_like_no_other_gets_no_suggestion(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key 'ranks\.zzzz'\n→ correct"):
        read(tmp_path, MODEL, DATA, BUDGET, "[ranks]\nzzzz = 1")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (("models = []", DATA, BUDGET), "no \\[\\[models\\]\\]"),
        ((MODEL, MODEL, DATA, BUDGET), "two models are called 'a'"),
        (("[[models]]\nname = 'a'", DATA, BUDGET), "exactly one of `factory` and `huggingface`"),
        ((MODEL + "huggingface = 'x'", DATA, BUDGET), "exactly one of `factory` and `huggingface`"),
        (("[[models]]\nname = 'a'\nfactory = 'f.py:f'", DATA, BUDGET), "exactly one of `weights` and `train`"),
        (
            ("[[models]]\nname = 'a'\nhuggingface = 'x'\ntask = 'image-classification'\nweights = 'w'", DATA, BUDGET),
            "`weights` and `train` belong to a factory",
        ),
        ((MODEL + "train = 'f.py:t'", DATA, BUDGET), "exactly one of `weights` and `train`"),
        ((MODEL, "[data]", BUDGET), "\\[data\\] needs exactly one of loader, images, text, csv"),
        ((MODEL, DATA + "images = 'x'", BUDGET), "\\[data\\] needs exactly one of loader, images, text, csv"),
        ((MODEL, DATA + "size = 8", BUDGET), "data.size belongs to images, not to loader"),
        ((MODEL, DATA + "label = 'y'", BUDGET), "data.label belongs to csv and text, not to loader"),
        ((MODEL, "[data]\nimages = 'x'\ntokens = 8", BUDGET), "data.tokens belongs to csv and text, not to images"),
        ((MODEL, "[data]\nimages = 'x'\nsize = [8, 0]", BUDGET), "data.size must be at least 1, got 0"),
        ((MODEL, "[data]\ncsv = 'x'\ntest_samples = 0", BUDGET), "data.test_samples must be at least 1, got 0"),
        ((MODEL, "[data]\ntext = 'x'", BUDGET), "'a' comes from a factory: give it a loader"),
        ((MODEL, "[data]\ncsv = 'x'", BUDGET, "[merge]\nhead = 'h'"), "the data must come from data.loader"),
        ((MODEL, DATA, BUDGET, "[ranks]\nthreshold = 0.9"), "ranks.threshold belongs to method 'arp' only"),
        ((MODEL, DATA, BUDGET, "[ranks]\nmethod = 'arp'\nthreshold = 0.9"), "exactly one of .*none with ranks.thresh"),
        ((MODEL, DATA), "exactly one of kept_parameters, parameters, size_bytes"),
        ((MODEL, DATA, BUDGET + "parameters = 9"), "exactly one of kept_parameters, parameters, size_bytes"),
        ((MODEL, DATA, "[budget]\nparameters = 0"), "the budget must be above zero, got \\[0\\]"),
        ((MODEL, DATA, "[budget]\nsize_bytes = -4"), "the budget must be above zero, got \\[-4\\]"),
        ((MODEL, DATA, "[budget]\nkept_parameters = nan"), "the budget must be above zero"),
        ((MODEL, DATA, "[budget]\nkept_parameters = 40.0"), "the fraction kept, 0 to 1, got 40"),
        ((MODEL, DATA, "[budget]\nkept_flops = 1.5"), "budget.kept_flops is the fraction kept, 0 to 1, got 1.5"),
        ((MODEL, DATA, "[budget]\nlatency_us = 9"), "budget.costs, a table measured on the device"),
        ((MODEL, DATA, "[budget]\nlatency_ms = inf\non = 'pi4'"), "the budget must be above zero"),
        (
            (MODEL, DATA, "[budget]\nkept_parameters = 0.5\non = 'pi4'"),
            "budget.on belongs to latency_ms, latency_us",
        ),
        (
            (MODEL, DATA, "[budget]\nenergy_uj = 5\non = 'pi4'"),
            "budget.on belongs to latency_ms, latency_us",
        ),
        ((MODEL, DATA, "[budget]\nlatency_ms = 1e-7\non = 'pi4'"), "budget.latency_ms must be at least 0.001"),
        ((MODEL, DATA, "[budget]\ntoken_ms = 1e-7\non = 'pi4'"), "budget.token_ms must be at least 0.001"),
        ((MODEL, DATA, "[budget]\ntoken_ms = 4"), "budget.costs, a table measured on the device"),
        (
            (MODEL, DATA, "[budget]\ntoken_ms = 4\ntime_to_first_token_ms = 40\nlatency_ms = 9\non = 'pi4'"),
            "exactly one of .*, or both times of tokens",
        ),
        (
            (MODEL, DATA, "[budget]\ntoken_ms = 4\nlatency_ms = 9\non = 'pi4'"),
            "exactly one of .*, or both times of tokens",
        ),
        *(
            (
                (MODEL, DATA, f"[budget]\ntoken_ms = 4\ntime_to_first_token_ms = 40\n{where}"),
                "and token_ms need `on`, where both are measured, and no `costs`: a table is of one phase",
            )
            for where in ("", "costs = 'c.json'", "costs = 'c.json'\non = 'pi4'")
        ),
        ((MODEL, DATA, BUDGET + "prompt_tokens = 9"), "budget.prompt_tokens belongs to time_to_first_token_ms and"),
        (
            (MODEL, DATA, "[budget]\ntoken_ms = 4\nprompt_tokens = 0\non = 'pi4'"),
            "budget.prompt_tokens must be at least 1, got 0",
        ),
        ((MODEL, DATA, BUDGET + "format = 'onnx'"), "budget.format belongs to budget.on"),
        (
            (MODEL, DATA, "[budget]\nlatency_ms = 5\non = 'pi4'\nformat = 'tflite'", "[export]\nformats = ['onnx']"),
            "budget.format is tflite, export.formats onnx",
        ),
        ((MODEL, DATA, "[budget]\nlatency_ms = 5\non = 'pi4'", "[ranks]\nmethod = 'ara'"), "'ara' counts parameters"),
        ((MODEL, DATA, "[budget]\nflops = 9\ncosts = 'c.json'"), "budget.costs, a table measured on the device"),
        ((MODEL, DATA, "[budget]\nflops = 9", "[ranks]\nmethod = 'arp'"), "'arp' counts parameters, .* in flops"),
        ((MODEL, DATA, BYTES, "[ranks]\nmethod = 'arp'", ROUNDED), "'arp' counts parameters, .* in bytes"),
        ((MODEL, DATA, BYTES, "[ranks]\nmethod = 'strs'", ROUNDED), "'strs' takes one type .* int8, int4: take"),
        ((MODEL, DATA, BYTES, "[precision]\nweights = []"), "precision.weights is empty"),
        ((MODEL, DATA, BYTES, "[precision]\nweights = ['int8', 'int8']"), "names a type twice"),
        ((MODEL, DATA, BYTES, "[precision]\nweights = ['float16']"), "must be of float32, int8, int4"),
        (
            (MODEL, DATA, BYTES, "[precision]\nweights = ['int4']\nactivations = 'static'"),
            "int4 has no static activations",
        ),
        (
            (MODEL, DATA, BYTES, "[precision]\nweights = ['int8']\nactivations = 'float32'"),
            "leave it out of export.formats",
        ),
        ((MODEL, DATA, BUDGET, "[ranks]\nstep = 0"), "ranks.step must be at least 1, got 0"),
        ((MODEL, DATA, BUDGET, "[ranks]\nprobes = 0"), "ranks.probes must be at least 1, got 0"),
        ((MODEL, DATA, BUDGET, "[ranks]\npasses = -1"), "ranks: passes must not be negative, got -1"),
        ((MODEL, DATA, BUDGET, "[ranks]\npasses = 1"), "they need sensitivity = .kl"),
        ((MODEL, DATA, BUDGET, "[ranks]\nforms = []"), "ranks: forms is empty"),
        ((MODEL, DATA, BUDGET, '[ranks]\nforms = ["width"]'), 'the form "width" stands beside "svd"'),
        ((MODEL, DATA, BUDGET, '[ranks]\nmethod = "strs"\nforms = ["svd", "width"]'), 'with the method "knapsack"'),
        (
            (MODEL, DATA, BUDGET, "[ranks]\nsensitivity = 'gradient'", "[factorise]\ncurvature = false"),
            "needs curvature = true",
        ),
        ((MODEL, DATA, "[ranks]\nmethod = 'arp'\nthreshold = 0.0"), "ranks.threshold must lie in \\(0, 1\\], got 0"),
        ((MODEL, DATA, "[ranks]\nmethod = 'arp'\nthreshold = 1.5"), "ranks.threshold must lie in \\(0, 1\\], got 1.5"),
        (
            (
                "[ranks]\nmethod = 'arp'\nthreshold = 0.9",
                "[[compare]]\nname = 'c'\nmerge = 'joint'\nranks = 'uniform'\nwhitening = 'plain'",
                MODEL,
                DATA,
            ),
            "\\[\\[compare\\]\\] needs a \\[budget\\]",
        ),
        ((MODEL, DATA, BUDGET, "[merge]\noff_diagonal = 1.1"), "merge.off_diagonal must lie in \\[0, 1\\], got 1.1"),
        ((MODEL, DATA, BUDGET, "[parity]\nsamples = 0"), "parity.samples must be at least 1, got 0"),
        ((MODEL, DATA, BUDGET, "[export]\nformats = []"), "export.formats is empty"),
    ],
)
def test_every_rule_is_held_and_names_the_key(tmp_path: Path, parts: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=f"recipe.toml: .*{complaint}"):
        read(tmp_path, *parts)


@pytest.mark.parametrize("limit", ["max_relative_error", "min_cosine", "min_top1_agreement"])
@pytest.mark.parametrize("value", ["inf", "nan", "-0.1", "1.1"])
def test_a_parity_limit_must_mean_something(tmp_path: Path, limit: str, value: str) -> None:
    with pytest.raises(InputError, match=f"parity.{limit}"):
        read(tmp_path, MODEL, DATA, BUDGET, f"[parity]\n{limit} = {value}")


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", " a", "a:b"])
def test_a_name_must_do_for_a_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "{name}"\n{MODEL}{DATA}{BUDGET}')
    with pytest.raises(InputError, match=f"name '{name}' names folders"):
        read_recipe(path)


def test_a_threshold_stands_in_for_the_budget(tmp_path: Path) -> None:
    recipe = read(tmp_path, MODEL, DATA, "[ranks]\nmethod = 'arp'\nthreshold = 1.0")
    assert recipe.ranks.threshold == 1.0


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, MODEL, MODEL, DATA, "[ranks]\nstep = 0", "[parity]\nsamples = 0")
    for word in ("two models", "exactly one of kept_parameters", "ranks.step", "parity.samples"):
        assert word in str(caught.value)


def test_several_wrong_types_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, MODEL, DATA, "[budget]\nparameters = 'many'", "[ranks]\nstep = true\nmethod = 'best'")
    for word in ("budget.parameters", "'many'", "ranks.step", "True", "ranks.method", "'best'"):
        assert word in str(caught.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: field required"):
        read(tmp_path, MODEL, BUDGET)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"recipe\.toml is not valid TOML"):
        read_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe at .*absent\.toml"):
        read_recipe(tmp_path / "absent.toml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=tmp_path.name):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("[refine]\nsteps = 5\ncpu_seconds = 3", "exactly one of cpu_seconds and steps"),
        ("[refine]", "exactly one of cpu_seconds and steps"),
        ("[refine]\nsteps = 0", "above zero"),
        ("[refine]\ncpu_seconds = -1", "above zero"),
        ("[refine]\nsteps = 5\nstep_size = 0.0", r"refine.step_size must lie in \(0, 1\], got 0"),
        ('[refine]\nsteps = 5\naugment = "mixup"', "refine.augment: input should be 'none' or 'flip-and-shift'"),
        ("[quality]\nmax_loss_points = -1", r"quality\.max_loss_points must lie in \[0, 100\], got -1"),
        ("[quality]\nmax_merge_loss_points = 101", r"quality\.max_merge_loss_points must lie in"),
    ],
)
def test_refinement_and_gate_are_checked(tmp_path: Path, given: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, MODEL, DATA, BUDGET, given)


@pytest.mark.parametrize("given", ["mean = [0.5], std = [1, 1]", "mean = [0.5], std = [0]", "mean = [], std = []"])
def test_a_normalisation_needs_a_positive_std_per_mean(tmp_path: Path, given: str) -> None:
    line = f"normalise = {{ {given} }}\n"
    with pytest.raises(InputError, match="model 'a': normalise needs one positive std per mean"):
        read(tmp_path, MODEL + line, DATA, BUDGET)
    with pytest.raises(InputError, match="data: normalise needs one positive std per mean"):
        read(tmp_path, MODEL, DATA + line, BUDGET)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model 'a': two of its `labels` have the same name"):
        read(tmp_path, MODEL + 'labels = ["x", "x"]', DATA, BUDGET)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("regression", {"kind": "regression"}), ("own.py:score", {"function": "own.py:score"})],
)
def test_quality_may_be_a_word(tmp_path: Path, given: str, meant: dict[str, str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "test"\nquality = "{given}"\n{MODEL}\n{DATA}\n{BUDGET}')
    table = "\n".join(f'{key} = "{value}"' for key, value in meant.items())
    assert read_recipe(path) == read(tmp_path, MODEL, DATA, BUDGET, f"[quality]\n{table}")
    path.write_text(f'name = "test"\nquality = "regresion"\n{MODEL}\n{DATA}\n{BUDGET}')
    with pytest.raises(InputError, match=r"quality\.kind"):
        read_recipe(path)


def test_a_budget_of_bytes_counts_rounded_weights_as_such(tmp_path: Path) -> None:
    assert find_unit(read(tmp_path, MODEL, DATA, BYTES, ROUNDED)) == "bytes"
    assert find_unit(read(tmp_path, MODEL, DATA, BYTES, "[precision]\nweights = ['int8']")) == "bytes"
    assert find_unit(read(tmp_path, MODEL, DATA, BYTES)) == "parameters"
    assert find_unit(read(tmp_path, MODEL, DATA, BUDGET, ROUNDED)) == "parameters"
