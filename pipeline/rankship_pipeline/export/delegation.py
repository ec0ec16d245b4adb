"""Reads from an ExecuTorch file what was lowered to a delegate, and what is left to its own kernels."""

from collections import Counter
from pathlib import Path

from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import KernelCall

from rankship_pipeline.export.executorch import read_delegates

_XNNPACK, _VULKAN = "XnnpackBackend", "VulkanBackend"


def count_delegated(path: Path) -> tuple[int, int | None, dict[str, int]]:
    """Return the partitions, the operators in them (None if not all are XNNPACK's), and what is left by its kind."""
    program = deserialize_pte_binary(path.read_bytes()).program
    plans = program.execution_plan
    names = [one.id for plan in plans for one in plan.delegates]
    left = Counter(
        plan.operators[one.instr_args.op_index].name
        for plan in plans
        for chain in plan.chains
        for one in chain.instructions
        if isinstance(one.instr_args, KernelCall)
    )
    known = all(name == _XNNPACK for name in names)
    operators = sum(len(graph["xnodes"]) for graph in read_delegates(program, path.name)) if known else None
    return len(names), operators, dict(left)


def runs_vulkan() -> bool:
    """Return whether the installed ExecuTorch can run a file that was lowered to Vulkan, which a proof needs."""
    from executorch.extension.pybindings import _C as binding  # noqa: N811 - a module

    return bool(binding._is_available(_VULKAN))  # noqa: SLF001 - there is no other way
