"""Says how a file of torch.save becomes a safetensors file: a command for the shell that fits what the file holds.

Rankship itself never loads such a file: a pickle can run code. What the file holds is looked at by torch's loader for
plain tensors (weights_only), with every tensor on the meta device; no class that the file names is called.
"""

import json
import shlex
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import IO, Any

import torch

PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip and its older bare pickle
# where training loops keep the weights of a checkpoint with more in it
_PLACES = ("state_dict", "model_state_dict", "model", "net", "module", "weights", "params", "model_ema", "ema")
_PICKLES = 4  # of a bare file: a magic number, the protocol, the machine, the object
_SAVE = (
    "safetensors.torch.save_file({name: one.detach().clone().contiguous() for name, one in found.items()"
    " if torch.is_tensor(one)}, TARGET)"
)
# what torch's own loaders call for plain tensors
_PLAIN = ("torch._utils.", "torch.serialization.", "collections.")


def describe_pickle(path: Path, target: Path | None = None) -> tuple[str, str]:
    """What is wrong with a pickled file, and a hint with the shell command that writes it as safetensors.

    The command writes `target`, by default the same name with the suffix .safetensors.
    """
    target = path.with_suffix(".safetensors") if target is None else target
    target = target.with_name(f"{target.stem}-converted.safetensors") if target.exists() else target
    reason, load, warning = _choose_load(path)
    code = f"import torch, safetensors.torch; {load}; {_SAVE.replace('TARGET', json.dumps(str(target)))}"
    return (
        f"is a pickle (torch.save), which can run code when it is read{reason}",
        f"convert it once{warning}, and name {target.name} instead: python -c {shlex.quote(code)}",
    )


def _choose_load(path: Path) -> tuple[str, str, str]:
    """What else to say of the file, the Python that loads its state dict as `found`, and a warning."""
    given = f'open({json.dumps(str(path))}, "rb"), map_location="cpu"'  # torch.load goes by the name's suffix
    if _is_script(path):
        return " (TorchScript)", f"found = torch.jit.load({given}).state_dict()", ""
    try:
        with path.open("rb") as stream:
            found = torch.load(stream, map_location="meta", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError, AttributeError, TypeError, KeyError):
        load = (
            f"found = torch.load({given}, weights_only={False});"
            ' found = found.state_dict() if hasattr(found, "state_dict") else found;'
            f" places = {json.dumps(_PLACES)};"
            " found = next((found[one] for one in places if isinstance(found.get(one), dict)), found)"
        )
        classes = ", ".join(list_classes(path)[:3])
        return (
            f"; it holds more than tensors ({classes or 'unknown classes'})",
            load,
            " (this runs code that it may hold: only if you trust its origin)",
        )
    load, keys = f"found = torch.load({given}, weights_only=True)", _find_weights(found)
    if keys is None:
        return "; no state dict was found in it", f"{load}[...]", ", with the place of its weights for [...]"
    place = "".join(f"[{json.dumps(key)}]" for key in keys)
    return f"; its weights lie under {'.'.join(keys)}" if keys else "", f"{load}{place}", ""


def _find_weights(found: Any) -> tuple[str, ...] | None:  # noqa: ANN401 - what a pickle holds
    """The keys under which a state dict lies: none for the file itself; None if there is none."""
    if not isinstance(found, Mapping):
        return None
    nested = [str(key) for key, value in found.items() if isinstance(value, Mapping) and _count_tensors(value)]
    if _count_tensors(found) and not any(key in nested for key in _PLACES):
        return ()
    ordered = [key for key in _PLACES if key in nested] or sorted(nested, key=lambda key: -_count_tensors(found[key]))
    if ordered:
        return (ordered[0],)
    for key, value in found.items():
        inner = _find_weights(value)
        if inner is not None:
            return (str(key), *inner)
    return None


def _count_tensors(table: Mapping[str, object]) -> int:
    return sum(isinstance(one, torch.Tensor) for one in table.values())


def _is_script(path: Path) -> bool:
    """Whether the file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def list_classes(path: Path) -> list[str]:
    """The classes of a torch.save file beyond plain tensors, from its opcodes: nothing is built or called."""
    found, strings = [], [""]
    with warnings.catch_warnings(), suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        warnings.simplefilter("ignore")  # of odd strings in a damaged file
        for pickled in _open_pickles(path):
            for operation, argument, _ in genops(pickled):
                if operation.name == "GLOBAL":
                    found.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return [name for name in dict.fromkeys(found) if not name.startswith(_PLAIN) and not name.endswith("Storage")]


def _open_pickles(path: Path) -> Iterator[IO[bytes]]:
    """The pickles of a torch.save file: one in a zip, or the last of four in a row."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield archive.open(next((one for one in archive.namelist() if one.endswith("/data.pkl")), ""))
        return
    with path.open("rb") as stream:
        for _ in range(_PICKLES):
            yield stream
