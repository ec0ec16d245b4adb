"""A folder of images, with a subfolder for each class, as tensors that the model takes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.model_config import load_image_processor, read_config, read_normalisation
from rankship_pipeline.models.samples import Samples, find_path
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recipe.normalisation import Normalisation

if TYPE_CHECKING:
    from PIL.Image import Image

_PLAIN = Normalisation(mean=(0.0,), std=(1.0,))
_MODES = {1: "L", 3: "RGB"}
_PIXELS = 255


def open_images(recipe: Recipe, folder: Path) -> Samples:
    """The images of `data.images`; without subfolders they have no labels."""
    root = find_path(str(recipe.data.images), folder)
    where = recipe.data.origin
    if not root.is_dir():
        raise InputError(f"{where}: no folder {root}", hint="give a folder with a subfolder of images for each class")
    suffixes = _list_suffixes()
    loose = _list_images(root, suffixes)
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {path.name: _list_images(path, suffixes, deep=True) for path in classes}
    if loose and any(found.values()):
        raise InputError(
            f"{where}: {len(loose)} images lie beside the classes' folders, among them {loose[0].name}",
            hint="move every image into the folder of its class",
        )
    empty = [name for name, images in found.items() if not images]
    if not loose and len(empty) == len(found):
        raise InputError(f"{where}: no image in {root}", hint=f"images end in {', '.join(suffixes)}")
    if empty and not loose:
        raise InputError(f"{where}: no image in the folder of class {empty[0]!r}", hint="fill it, or remove it")
    paths = loose or [path for images in found.values() for path in images]
    labels = None if loose else tuple(name for name, images in found.items() for _ in images)
    return Samples(len(paths), labels, partial(_read, recipe, folder, paths))


def _list_suffixes() -> tuple[str, ...]:
    """What pillow can read, by the ends of files' names, the usual ones first."""
    try:
        from PIL import Image
    except ImportError as failure:
        raise InputError(f"images are read by pillow: {failure}", hint="pip install 'rankship[images]'") from failure
    usual = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"]
    return tuple(suffix for suffix in usual if suffix in Image.registered_extensions())


def _list_images(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in found if path.suffix.lower() in suffixes and path.is_file())


def _read(recipe: Recipe, folder: Path, paths: Sequence[Path], chosen: Sequence[int]) -> tuple[Tensor, ...]:
    """The chosen images (samples, channels, height, width), prepared as the model's own files or [data] say."""
    data, source = recipe.data, recipe.models[0]
    channels = data.channels or (read_config(source, folder).get("num_channels", 3) if source.huggingface else 3)
    if channels not in _MODES:
        raise InputError(
            f"model {source.name!r} takes images of {channels} channels; files have 1 or 3", hint="give it a loader"
        )
    processor = load_image_processor(source, folder) if data.size is None else None
    wanted = data.normalise or _PLAIN
    rows: list[Tensor] = []
    for path in (paths[index] for index in chosen):
        image = _open(path, _MODES[channels])
        row = _prepare(image, data.size, wanted) if processor is None else _process(image, processor, wanted)
        if rows and row.shape != rows[0].shape:
            raise InputError(
                f"{recipe.data.origin}: {path} gives {list(row.shape)}, others {list(rows[0].shape)}",
                hint="state `size` in [data]: the height and width that the model takes",
            )
        rows.append(row)
    return (torch.stack(rows),)


def _open(path: Path, mode: str) -> "Image":
    """One image, upright, in `mode`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as failure:
        raise InputError(
            f"{path} cannot be read as an image: {failure}", hint="replace it, or take it out of the folder"
        ) from failure


def _prepare(image: "Image", size: int | tuple[int, int] | None, wanted: Normalisation) -> Tensor:
    """Resize as stated, bilinear; pixels in [0, 1], then normalised: (channels, height, width)."""
    import numpy as np
    from PIL.Image import Resampling

    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = image.resize((width, height), Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / _PIXELS
    return _normalise(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1), _PLAIN, wanted)  # noqa: PLR2004


def _process(image: "Image", processor: Any, wanted: Normalisation) -> Tensor:  # noqa: ANN401 - transformers has no types
    """What the model's own processor makes of an image, normalised otherwise where the recipe states that."""
    import numpy as np

    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array  # noqa: PLR2004 - grey: height, width
    pixels: Tensor = processor(images=[array], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    own = read_normalisation(processor.to_dict()) or _PLAIN
    return pixels[0] if wanted.is_like(own) else _normalise(pixels[0], own, wanted)


def _normalise(pixels: Tensor, own: Normalisation, wanted: Normalisation) -> Tensor:
    """Pixels (channels, height, width) that went through `own`, as if they had gone through `wanted`."""
    before_mean, before_std, mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (own.mean, own.std, wanted.mean, wanted.std)
    )
    return ((pixels * before_std + before_mean - mean) / std).contiguous()
