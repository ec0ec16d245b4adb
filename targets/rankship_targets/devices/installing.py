"""Shows how to install what a device lacks: a kit, pip, or a virtual environment where pip is locked (PEP 668)."""

from rankship_pipeline.foundation.commands import quote_words, show_command
from rankship_targets.devices.device import Device


def show_kit_install(name: str) -> str:
    """Return the command that installs a built kit on a device."""
    return show_command("rankship", "kit", "install", name)


def show_kit(name: str) -> str:
    """Return the two commands that build a kit for a device and install it."""
    commands = (quote_words(["rankship", "kit", verb, name]) for verb in ("build", "install"))
    return f"`{' && '.join(commands)}`"


def show_pip_install(device: Device, packages: str, *, managed: bool | None = None) -> str:
    """Return the command, run on the device, that installs packages ("numpy", "onnxruntime (a note)").

    `managed`: whether its Python is the system's own and takes no packages, as Debian 12's; None: not known.
    """
    names, _, note = packages.partition(" (")
    note = f" ({note}" if note else ""
    python = quote_words([device.python])
    plain = f"`{python} -m pip install {names}`{note}"
    if managed is False:
        return plain
    env = "~/rankship-env"
    command = f"`{python} -m venv {env} && {env}/bin/python -m pip install {names}`{note}"
    inside = f"{command}, and then its whole path as python in the inventory's [{device.name}]"
    if managed:
        return f"its system's Python takes no packages from pip, so in an environment of its own: {inside}"
    return f"{plain}; where pip calls the environment externally managed: {inside}"
