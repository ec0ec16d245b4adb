"""Finds the layers whose inputs are neurons: numbers that other layers make one by one, and that nothing else reads."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rankship_pipeline.align.interchange import Interchange, find_interchange
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, get_layer, stores_inputs_first


def mark_neurons(model: nn.Module, layers: Sequence[Layer], sample: Inputs) -> tuple[Layer, ...]:
    """The layers with `fed_by` and `feeds` set; as they are where the model cannot be traced.

    Neurons are an atom that may be permuted (see interchange.py) and that is all outputs of some linear layers, all
    inputs of another one, and part of no other tensor but the former's biases.
    """
    try:
        known = find_interchange(model, tuple(one[:1] for one in sample))
    except Exception:  # noqa: BLE001 - torch.export raises whatever it meets in a model's code
        return tuple(layers)
    linear = {layer.name: layer for layer in layers if layer.kind == "linear" and not layer.is_widest}
    marked = {layer.name: layer for layer in layers}
    for leaf in known.free:
        found = _find_sides(model, known, linear, leaf)
        if found is None or any(marked[one].fed_by or marked[one].feeds for one in (*found[0], found[1])):
            continue  # of neurons on both sides of a layer, those before it
        writers, reader = found
        marked[reader] = replace(marked[reader], fed_by=writers)
        for name in writers:
            marked[name] = replace(marked[name], feeds=reader)
    return tuple(marked.values())


def _find_sides(
    model: nn.Module, known: Interchange, linear: dict[str, Layer], leaf: int
) -> tuple[tuple[str, ...], str] | None:
    """The layers that make neurons and the one that reads them; None where the atom is anything else."""
    writers, readers, biases = [], [], []
    for tensor, (atoms, _) in known.views.items():
        if leaf not in atoms:
            continue
        name, _, kind = tensor.rpartition(".")
        if name not in linear or atoms.count(leaf) > 1:
            return None
        if kind == "bias" and len(atoms) == 1:
            biases.append(name)
            continue
        size, module = known.free[leaf], get_layer(model, name)
        outwards, inwards = (atoms[-1], atoms[0]) if stores_inputs_first(module) else (atoms[0], atoms[-1])
        if kind == "weight" and outwards == leaf and linear[name].rows == size:
            writers.append(name)
        elif kind == "weight" and inwards == leaf and linear[name].columns == size:
            readers.append(name)
        else:
            return None
    if len(readers) != 1 or not writers or not set(biases) <= set(writers):
        return None
    return tuple(writers), readers[0]
