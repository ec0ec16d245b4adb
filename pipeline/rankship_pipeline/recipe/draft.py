"""A recipe written for the user: what the flags of `init` and `compress` say, with a comment at every key."""

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.toolchain import can_export
from rankship_pipeline.recipe.budget import AMOUNTS, TOKEN_TIMES
from rankship_pipeline.recipe.choices import DATA_KINDS, DataKind
from rankship_pipeline.recipe.precision import BLOCK

Tables = dict[str, Mapping[str, object] | Sequence[Mapping[str, object]]]
KEPT = 0.5  # of the parameters, where no budget is given
_DATA_KEYS = ("label", "columns", "size", "channels", "tokens", "calibration_samples", "test_samples")
_WHOLE = {"parameters", "size_bytes", "flops", "latency_us", "energy_uj"}
_COMMENTS = {
    "huggingface": "a folder, or an id of the Hugging Face hub; task and inputs are read from the model's own files",
    "factory": '"file.py:function", relative to this file; returns the untrained torch.nn.Module',
    "models.weights": "its state dict: safetensors.torch.save_file(model.state_dict(), …)",
    "train": "trains it in place, once; the result is kept",
    "images": "a subfolder for each class; half calibrates (at most 256), the rest tests (at most 1,000)",
    "text": "one text a line; or label, tab, text; or .csv, .jsonl; for a language model, one running text",
    "csv": "one row a sample; `label` and `columns` name its columns",
    "loader": '"file.py:function"; returns calibration, test_inputs and test_labels',
    "kept_parameters": "the share kept; or parameters, size_bytes, kept_flops, flops, a time and on",
    "merge.method": "how several models become one; docs/merging.md lists the ways",
    "ranks.method": "who gets how much of the budget",
    "ranks.step": f"ranks are multiples of this; int4 takes multiples of {BLOCK}",
    "ranks.forms": "a layer may become two factors, or lose neurons between linear layers",
    "precision.weights": "of float32, int8 and int4; with size_bytes chosen for each layer, else one file for each",
    "export.formats": "of onnx, tflite and executorch",
}
_OPTIONS: dict[DataKind, str] = {
    "images": "# size = 224                    # pixels, where the model does not say; channels = 1 for grey images",
    "text": "# tokens = 128                  # the length of texts, padded or cut; of a language model's windows",
    "csv": '# label = "label"               # and columns = ["…"]: all others unless named',
    "loader": "",
}


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """Every key of [budget] as a flag; `--kept` is short for `--kept-parameters`."""
    group = parser.add_argument_group("budget", f"one of these, or both times of tokens; default: --kept {KEPT}")
    for key in AMOUNTS:
        names = [f"--{key.replace('_', '-')}", *(["--kept"] if key == "kept_parameters" else [])]
        group.add_argument(*names[::-1], type=int if key in _WHOLE else float, metavar="N", dest=key)
    group.add_argument("--costs", type=Path, metavar="FILE", help="with time and energy: a table by `rankship costs`")
    group.add_argument("--on", metavar="DEVICE", help="with a time: measured and met there, no table needed")
    group.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="with --time-to-first-token-ms and --token-ms (default: 128)"
    )
    group.add_argument(
        "--precision",
        type=_parse_names,
        default=(),
        metavar="A,B",
        help="types of the weights, of float32, int8 and int4: with --size-bytes chosen for each layer, else one file"
        " for each (default: float32)",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the data are, and the keys of [data] that say how to read them."""
    group = parser.add_argument_group("data")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--images", type=Path, metavar="FOLDER", help="images, a subfolder for each class")
    which.add_argument("--text", type=Path, metavar="FILE", help="texts: .txt, .tsv, .csv or .jsonl")
    which.add_argument("--csv", type=Path, metavar="FILE", help="a table of features, or of texts")
    group.add_argument("--label", metavar="COLUMN", help='the column of labels (default: "label")')
    group.add_argument("--columns", type=_parse_names, metavar="A,B", help="the columns of features, or of the texts")
    group.add_argument("--size", type=int, metavar="PIXELS", help="of the images' sides, where the model does not say")
    group.add_argument("--channels", type=int, choices=(1, 3), help="of the images: 1 is grey")
    group.add_argument("--tokens", type=int, metavar="N", help="the length of texts (default: at most 128)")
    group.add_argument(
        "--calibration-samples", "--samples", type=int, metavar="N", help="default: half of them, at most 256"
    )
    group.add_argument("--test-samples", type=int, metavar="N", help="default: the rest, at most 1,000")


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def take_data(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The keys of [data] that were given; empty where no data were named. Paths become relative to `folder`."""
    kind = next((kind for kind in DATA_KINDS if getattr(arguments, kind, None) is not None), None)
    keys = {key: value for key in _DATA_KEYS if (value := getattr(arguments, key)) is not None}
    if kind is None:
        if keys:
            raise InputError(f"--{next(iter(keys)).replace('_', '-')} says how to read data", hint="name the data too")
        return {}
    return {kind: place(str(getattr(arguments, kind)), folder), **keys}


def take_budget(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The amount that was given, or both times of tokens, and where costs are known from, else half the parameters."""
    given = {key: value for key in AMOUNTS if (value := getattr(arguments, key)) is not None}
    if len(given) > 1 and given.keys() != set(TOKEN_TIMES):
        raise InputError(f"two budgets: {' and '.join(given)}", hint=f"give one, or {' and '.join(TOKEN_TIMES)}")
    costs = {} if arguments.costs is None else {"costs": place(str(arguments.costs), folder)}
    on = {} if arguments.on is None else {"on": arguments.on}
    prompt = {} if arguments.prompt_tokens is None else {"prompt_tokens": arguments.prompt_tokens}
    return {**(given or {"kept_parameters": KEPT}), **prompt, **costs, **on}


def take_precision(arguments: argparse.Namespace) -> Tables:
    """The table [precision], where types of weights were given."""
    return {"precision": {"weights": list(arguments.precision)}} if arguments.precision else {}


def place(written: str, folder: Path) -> str:
    """A path given on the command line, as a recipe in `folder` writes it; what is no path there stays as it is."""
    path, colon, function = written.partition(":")
    if Path(path).is_absolute() or not Path(path).exists():
        return written
    return Path(os.path.relpath(path, folder)).as_posix() + colon + function


def name_models(written: Sequence[str]) -> list[str]:
    """Short names for models: the last part of each path or id, numbered where two are alike."""
    names: list[str] = []
    for one in written:
        last = Path(one).resolve().name if Path(one).is_dir() else one.split("/")[-1]
        stem = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
        taken = sum(name == stem or name.startswith(f"{stem} ") for name in names)
        names.append(f"{stem} {taken + 1}" if taken else stem)
    return names


def choose_formats(wanted: Sequence[Format] | None) -> tuple[Format, ...]:
    """The formats that were asked for, else those whose toolchain is installed."""
    if wanted:
        return tuple(wanted)
    return tuple(one for one in FORMATS if can_export(one)) or FORMATS[:1]


def write_recipe(heading: Iterable[str], name: str, tables: Tables) -> str:
    """A recipe's text: comments, its name, and its tables in order (a sequence: an array of tables)."""
    lines = [*(f"# {line}".rstrip() for line in heading), f"name = {json.dumps(name, ensure_ascii=False)}"]
    for table, content in tables.items():
        if isinstance(content, Mapping):
            lines += ["", f"[{table}]", *_write_keys(table, content)]
        else:
            lines += [line for one in content for line in ("", f"[[{table}]]", *_write_keys(table, one))]
    return "\n".join(lines) + "\n"


def _write_keys(table: str, content: Mapping[str, object]) -> list[str]:
    lines = []
    for key, value in content.items():
        pair = f"{key} = {json.dumps(value, ensure_ascii=False)}"
        comment = _COMMENTS.get(key, _COMMENTS.get(f"{table}.{key}"))
        lines.append(f"{pair:<31} # {comment}" if comment else pair)
    hints = (_OPTIONS[kind] for kind in DATA_KINDS if kind in content)
    return [*lines, *(hint for hint in hints if hint)]


def write_new(files: Mapping[Path, str | bytes]) -> None:
    """Write files that must not be there yet: either all of them, or none."""
    for path in files:
        if path.exists():
            raise InputError(f"{path} is there already", hint="choose another name, or move it away")
    made: list[Path] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as stream:
                made.append(path)
                stream.write(content if isinstance(content, bytes) else content.encode())
    except BaseException as failure:
        for one in made:
            one.unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise InputError(f"cannot write {path}: {failure}", hint="choose another folder or name") from None
        raise
