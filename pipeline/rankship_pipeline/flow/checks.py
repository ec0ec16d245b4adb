"""The checks of a recipe, one function each, in the tables that preflight.py runs."""

import fnmatch
from collections.abc import Callable, Mapping

from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.align.match_neurons import find_groups
from rankship_pipeline.export import check_size
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.toolchain import can_export
from rankship_pipeline.models.foreign_files import is_graph
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.recipe.budget import PROMPT_TOKENS, TOKEN_TIMES
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recover.refine.by_blocks import find_blocks


def check_toolchains(recipe: Recipe) -> None:
    """Check that every format's exporter and runtime are installed."""
    for name in recipe.export.formats:
        if not can_export(name):
            facts = FACTS[name]
            needs = f"{facts.exporter} needs {facts.exporter_import}"
            raise InputError(
                f"export.formats names {name}, whose toolchain is not installed ({needs})",
                hint=f"pip install '{facts.extra}', or leave {name} out",
            )

    if "vulkan" in recipe.export.executorch and "executorch" in recipe.export.formats:
        from rankship_pipeline.export.delegation import runs_vulkan

        if not runs_vulkan():
            message = "export.executorch names vulkan: this machine's ExecuTorch makes such files and cannot run them"
            hint = (
                "leave it out: no file is pushed that was not proven here; or install an ExecuTorch built with Vulkan"
            )
            raise InputError(message, hint=hint)


def check_weights(_recipe: Recipe, sources: Mapping[str, OpenedSource]) -> None:
    """Check that checkpoints and adapters fit their models and hold finite numbers."""
    for opened in sources.values():
        opened.check()


def check_writers(recipe: Recipe, _sources: Mapping[str, OpenedSource]) -> None:
    """Check that what goes on with texts is asked for nothing that its files cannot do, and nothing else for that."""
    tasks, export, amounts = {source.task for source in recipe.models}, recipe.export, recipe.budget.amounts
    if "causal-lm" not in tasks:
        asked = ["export.context"] if export.context is not None else []
        asked += [f"budget.{key}" for key in TOKEN_TIMES if key in amounts]
        if asked:
            raise InputError(
                f'{asked[0]} belongs to models of the task "causal-lm"', hint="leave it out, or state their `task`"
            )
        return
    complaints = {
        "models of other tasks beside them": len(tasks) > 1,
        "merge.head": recipe.merge.head is not None,
        "export.batch and export.axes: their files take one text of any length": bool(export.batch or export.axes),
        'activations = "static"': recipe.precision.activations == "static",
    }
    whole = [key for key in ("latency_ms", "latency_us", "energy_uj") if key in amounts]
    if whole:
        raise InputError(
            f'models of the task "causal-lm" run in phases, budget.{whole[0]} names none',
            hint=f"give {' or '.join(TOKEN_TIMES)}, with prompt_tokens",
        )
    for what, is_asked in complaints.items():
        if is_asked:
            raise InputError(
                f'models of the task "causal-lm" go without {what}',
                hint='leave it out; or state task = "text-generation", whose files give the logits of whole texts',
            )


def check_mends(prepared: Prepared) -> None:
    """Check on the untrained modules that the models can be made alike, before any training."""
    data = prepared.data
    for name, mend in prepared.mends.items():
        if mend != Mend():
            mend_model(prepared.sources[name].make(), mend, data.strip(data.test_inputs), name=name)


def check_alignment(prepared: Prepared) -> None:
    """Check that something in the model can be permuted, where its neurons are to be aligned."""
    if prepared.recipe.merge.align is not None:
        sample = tuple(tensor[:2] for tensor in prepared.data.strip(prepared.data.test_inputs))
        find_groups(prepared.model, sample, name=prepared.recipe.models[0].name)


def check_context(prepared: Prepared) -> None:
    """Check that a language model takes as many tokens as its files are to, and those the prompt of its budget."""
    generation, budget = prepared.generation, prepared.recipe.budget
    if generation is None or not budget.amounts.keys() & TOKEN_TIMES:
        return
    check_prompt(generation, budget.prompt, "budget.prompt_tokens", further=budget.token_ms is not None)


def check_prompt(generation: Generation, prompt_tokens: int, where: str, *, further: bool) -> None:
    """Check that the files' context holds a prompt, and a further token; InputError names the key in `where`."""
    most = generation.context - 1 if further else generation.context
    if not 1 <= prompt_tokens <= most:
        more = " and a token after them" if further else ""
        raise InputError(
            f"{where} is {prompt_tokens}: so many tokens{more} do not fit the files' context of {generation.context}",
            hint=f"state {where} of 1 to {most} (left out, it is {PROMPT_TOKENS}), or a longer export.context",
        )


def check_sizes(prepared: Prepared) -> None:
    """Check that every format's file can hold the dense model."""
    for name in prepared.recipe.export.formats:
        check_size([*prepared.model.parameters(), *prepared.model.buffers()], name)


def check_excluded(prepared: Prepared) -> None:
    """Check that every pattern of ranks.exclude matches a layer."""
    names = [use.name for layer in find_layers(prepared.model) for use in layer.uses]
    for pattern in prepared.recipe.ranks.exclude:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"ranks.exclude: {pattern!r} matches no layer that could be factored",
                hint=f"the layers are {', '.join(names)}",
            )


def check_layers(prepared: Prepared) -> None:
    """Check that there is a layer to factor."""
    if not prepared.layers and is_graph(prepared.model):
        raise InputError(
            f"the model is a graph of operators ({type(prepared.model).__name__}, of torch.export, torch.fx or"
            " TorchScript), which has no layers",
            hint="give the module that it was made from; load the graph's state_dict() into it, the names are the same",
        )
    if not prepared.layers:
        raise InputError("the model has no linear or convolutional layer to factor", hint="see ranks.exclude")


def check_compared(prepared: Prepared) -> None:
    """Alternatives are compared by their scores, which need labels, or one dense model whose outputs stand for them."""
    if prepared.recipe.compare and not prepared.is_scored:
        raise InputError(
            "[[compare]] shows each way's score, and there are no test labels for a merge of several models",
            hint="give test_labels, or leave [[compare]] out",
        )


def check_blocks(prepared: Prepared) -> None:
    """Check that a model to be refined block by block has blocks."""
    refine = prepared.recipe.refine
    if refine is not None and refine.by == "blocks" and not find_blocks(prepared.model, prepared.data.test_inputs):
        raise InputError(
            'refine.by = "blocks": the model has no list of modules of one class that run one after the other',
            hint='give by = "outputs", which trains the whole network',
        )


# In running order; the first that fails raises. Checks that need no data run before the loader is called.
BEFORE_DATA: tuple[Callable[[Recipe, Mapping[str, OpenedSource]], None], ...] = (
    check_writers,
    check_weights,
)
WITH_DATA: tuple[Callable[[Prepared], None], ...] = (
    check_context,
    check_sizes,
    check_mends,
    check_alignment,
    check_excluded,
    check_layers,
    check_compared,
    check_blocks,
)
