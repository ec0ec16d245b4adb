"""A model that runs once: its outputs on a set of inputs are known, and given back for every part of them."""

from torch import Tensor, nn

from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs


class Remembered(nn.Module):
    """A model with its outputs, samples first, on inputs of which batches are slices; the model runs on others."""

    def __init__(self, module: nn.Module, known: Inputs, outputs: Outputs) -> None:
        super().__init__()
        self.module, self._known, self._outputs = module, known, outputs

    @property
    def held_bytes(self) -> int:
        """The memory of the known outputs."""
        return sum(one.nbytes for one in self._outputs.values())

    def forward(self, *batch: Tensor) -> object:
        """Return the known outputs of a slice of the known inputs, else the model's."""
        place = self._find(batch)
        if place is None:
            return self.module(*batch)
        return {name: one[place : place + len(batch[0])] for name, one in self._outputs.items()}

    def _find(self, batch: Inputs) -> int | None:
        """The sample at which a batch that is a slice of the known inputs begins; None for any other."""
        places = set()
        for part, whole in zip(batch, self._known, strict=True):
            is_slice = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            if not is_slice or part.stride() != whole.stride() or part.shape[1:] != whole.shape[1:]:
                return None
            place, rest = divmod(int(part.storage_offset() - whole.storage_offset()), max(1, whole.stride(0)))
            places.add(place if rest == 0 and 0 <= place <= len(whole) - len(part) else -1)
        return places.pop() if len(places) == 1 and -1 not in places else None


class Elsewhere(nn.Module):
    """A model that ran elsewhere, of which only the names of its inputs are here."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inputs = names

    def forward(self, *_batch: Tensor) -> dict[str, Tensor]:
        """Refuse: only the outputs of known inputs are here."""
        message = "outputs were asked for of other inputs than theirs"
        raise RuntimeError(message)
