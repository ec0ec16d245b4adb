"""Which tests stay in one process where processes share the work, and which come first."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

BUILDING = ("flow/test_first_minutes.py", "flow/test_huggingface.py", "flow/test_bad_input.py")  # they measure nothing
# What files of one group have in their paths. As a device this machine is leased: whoever measured on it beside others
# would find it busy, and what the flow builds is built once. A virtual machine and a phone are booted once.
GROUPS = {
    "this machine": ("/flow/", "test_runner"),
    "virtual machines": ("twin/test_machine",),
    "an emulated phone": ("twin/test_pixel", "contract/test_transport"),
}
# The longest first, so that none of them ends alone. The first waits minutes, for boards that hang, beside the others.
FIRST = ("tests/system/test_fault_matrix.py", *GROUPS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling":  # noqa: ANN401 - xdist's
    """Keep a file's tests in one process, for what they share, and a group's files too."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):  # type: ignore[misc]  # it ships no type information
        def _split_scope(self, nodeid: str) -> str:
            return name_group(super()._split_scope(nodeid))

    return Together(config, log)


def name_group(file: str) -> str:
    """Name the group of a test file; most are groups of their own."""
    if file.endswith(BUILDING):
        return file
    return next((group for group, parts in GROUPS.items() if any(part in file for part in parts)), file)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest groups, then the files that have slow tests, where processes share the work."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if "slow" in item.keywords}
        places = {group: place for place, group in enumerate(FIRST)}

        def order(item: pytest.Item) -> tuple[int, bool]:
            return places.get(name_group(item.nodeid.partition("::")[0]), len(FIRST)), item.path not in slow

        items.sort(key=order)
