"""Writes the files of `rankship init`: a recipe, and the model or data that the user did not name."""

import argparse
import io
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe import templates
from rankship_pipeline.recipe.choices import Source
from rankship_pipeline.recipe.draft import (
    choose_formats,
    place,
    take_budget,
    take_data,
    take_precision,
    write_new,
    write_recipe,
)
from rankship_pipeline.recipe.precision import BLOCK

_NOISES = 32
_NOISE_PIXELS = 64


def start_recipe(arguments: argparse.Namespace) -> list[str]:
    """Write the files; returns lines on what was written, what is still to do, and the next command."""
    recipe = arguments.name.with_name(arguments.name.name.removesuffix(".toml") + ".toml")
    name, folder = recipe.stem, recipe.parent
    model = _describe_model(arguments, name, folder)
    data, files, todo = take_data(arguments, folder), dict[Path, str | bytes](), list[str]()
    if not data:
        data, files, todo = _make_data(arguments, name, str(model["name"]))
    if "weights" in model and arguments.weights is None:
        todo.append(f"save your model's state dict to {name}.safetensors, or name another file with --weights")
    file = shlex.quote(recipe.name)
    text = write_recipe(
        [f"Build it: rankship build {file}", f"Measure it: rankship run {file} --on this-machine"],
        name,
        {
            "models": [model],
            "data": data,
            "budget": take_budget(arguments, folder),
            "ranks": {
                "method": "knapsack",
                "step": 8,
                **suit_ranks([arguments.huggingface], arguments.precision),
            },
            **take_precision(arguments),
            "export": {"formats": list(choose_formats(arguments.formats))},
        },
    )
    write_new({recipe: text, **{folder / file: content for file, content in files.items()}})
    beside = dict.fromkeys(file if file.parent == Path() else file.parent for file in files)
    return [
        *(f"wrote {path}" for path in (recipe, *(folder / one for one in beside))),
        *(f"to do: {one}" for one in todo),
        f"next: rankship build {shlex.quote(str(recipe))}",
    ]


def suit_ranks(models: Sequence[str | None], weights: Sequence[str]) -> dict[str, object]:
    """The keys of [ranks] that suit models of Hugging Face and types of weights; {} where the defaults do.

    int4 has blocks of columns. Language models in folders here have MLPs that may lose neurons.
    """
    from rankship_pipeline.models.model_config import read_task

    step: dict[str, object] = {"step": BLOCK} if "int4" in weights and any(models) else {}
    folders = [one for one in models if one is not None and Path(one).is_dir()]
    with suppress(InputError):  # what is wrong with a model is told when it is opened
        tasks = {read_task(Source(name=one, huggingface=one), Path()) for one in folders}
        return {**step, "forms": ["svd", "width"]} if tasks == {"causal-lm"} else step
    return step


def _describe_model(arguments: argparse.Namespace, name: str, folder: Path) -> dict[str, object]:
    """The keys of the one [[models]]."""
    trained = {key: place(str(value), folder) for key in ("weights", "train") if (value := getattr(arguments, key))}
    if trained and arguments.factory is None:
        raise InputError(f"--{next(iter(trained))} needs --factory", hint="name the factory too")
    if arguments.huggingface is not None:
        return {"name": name, "huggingface": place(arguments.huggingface, folder)}
    if arguments.factory is not None:
        if arguments.text is not None:
            raise InputError("--text is for Hugging Face models, which have a tokenizer", hint="leave --text out")
        trained = trained or {"weights": f"{name}.safetensors"}
        return {"name": name, "factory": place(arguments.factory, folder), **trained}
    if any((arguments.images, arguments.text, arguments.csv)):
        raise InputError("the data need a model", hint="name one with --huggingface or --factory")
    return {"name": "digits", "factory": f"{name}.py:make", "train": f"{name}.py:train"}


def _make_data(
    arguments: argparse.Namespace, name: str, model: str
) -> tuple[dict[str, object], dict[Path, str | bytes], list[str]]:
    """Stand-in data so that the recipe can run: its [data] table, the files, and what the user has to do."""
    if arguments.factory is not None:
        file = f"{name}_data.py"
        todo = f"{file} makes random numbers: set SHAPE to the shape of your model's input, then load your own data"
        return {"loader": f"{file}:load"}, {Path(file): templates.LOADER.format(name=model)}, [todo]
    if arguments.huggingface is None:
        file = f"{name}.py"
        todo = f"{file} has a small network, trained on scikit-learn's digits: replace it with your own model and data"
        return {"loader": f"{file}:load"}, {Path(file): templates.DIGITS}, [todo]
    from rankship_pipeline.models.model_config import read_task

    if read_task(Source(name=name, huggingface=arguments.huggingface), Path()) == "image-classification":
        images = f"{name}-images"
        todo = f"{images} holds random noise: replace it with your own images, in a subfolder for each class"
        return {"images": images}, _make_noise(Path(images)), [todo]
    file = f"{name}.txt"
    todo = f"{file} holds invented sentences: replace them with your own, one per line, or label, tab, text"
    return {"text": file}, {Path(file): templates.SENTENCES + "\n"}, [todo]


def _make_noise(folder: Path) -> dict[Path, str | bytes]:
    """Random images as PNG, without classes, so that no accuracy is claimed for them."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as failure:
        raise InputError(f"writing images needs pillow: {failure}", hint="pip install 'rankship[images]'") from failure
    generator, files = np.random.default_rng(0), dict[Path, str | bytes]()
    for number in range(_NOISES):
        stream = io.BytesIO()
        pixels = generator.integers(0, 256, (_NOISE_PIXELS, _NOISE_PIXELS, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        files[folder / f"noise-{number:02}.png"] = stream.getvalue()
    return files
