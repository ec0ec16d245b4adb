"""The budget of a recipe: its amount, its unit, and the device for measured units."""

from dataclasses import replace

from rankship_pipeline.foundation.artifact_key import DECODE, WHOLE, prefill_of
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import CostUnit

TOKEN_TIMES = ("time_to_first_token_ms", "token_ms")
TIMES = ("latency_ms", "latency_us", *TOKEN_TIMES)
PROMPT_TOKENS = 128


AMOUNTS = ("kept_parameters", "parameters", "size_bytes", "kept_flops", "flops", *TIMES, "energy_uj")


@record
class Budget:
    """Exactly one amount: of size, operations, time or energy; or both times of tokens, on a device.

    Operations, time and energy are those of one sample. Time and energy need a cost table measured on a device: `costs`
    names its file, or `on` names a device to measure. The time of a "causal-lm" is that of one of its phases.

    Keys:
        kept_parameters: share of the merged model's parameters to keep
        parameters: number of parameters
        size_bytes: bytes of all parameters in their types (precision.weights), with the scales of rounded weights; a
            file's graph and buffers add some kilobytes, which are reported
        kept_flops: share of the merged model's operations to keep
        flops: number of operations
        latency_ms: milliseconds
        latency_us: microseconds
        time_to_first_token_ms: milliseconds from a prompt to its first token, of a "causal-lm"
        token_ms: milliseconds for each further token, of a "causal-lm"; both together need `on` and take no `costs`
        energy_uj: microjoules
        prompt_tokens: the length of the prompt for these two; left out, 128
        costs: the path of a cost table, relative to the recipe
        on: a device of the inventory; the whole model is measured there too, and the allocation corrected until the
            time is met
        format: the format to time on that device; left out, the first of export.formats
    """

    kept_parameters: float | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    kept_flops: float | None = None
    flops: int | None = None
    latency_ms: float | None = None
    latency_us: int | None = None
    time_to_first_token_ms: float | None = None
    token_ms: float | None = None
    energy_uj: int | None = None
    prompt_tokens: int | None = None
    costs: str | None = None
    on: str | None = None
    format: Format | None = None

    @property
    def amounts(self) -> dict[str, float]:
        """The amounts given, by key; a valid budget has one, or both times of tokens."""
        return {key: value for key in AMOUNTS if (value := getattr(self, key)) is not None}

    @property
    def unit(self) -> CostUnit:
        """The unit that the budget is counted in."""
        if any(key in self.amounts for key in TIMES):
            return "ns"
        if self.energy_uj is not None:
            return "uj"
        return "parameters" if self.flops is None and self.kept_flops is None else "flops"

    @property
    def prompt(self) -> int:
        """The length of the prompt of a budget for tokens."""
        return PROMPT_TOKENS if self.prompt_tokens is None else self.prompt_tokens

    @property
    def limits(self) -> "tuple[Budget, ...]":
        """A budget for each amount: itself, or that of the prompt and that of a token where both are given."""
        if self.time_to_first_token_ms is None or self.token_ms is None:
            return (self,)
        return replace(self, token_ms=None), replace(self, time_to_first_token_ms=None)

    @property
    def part(self) -> str:
        """What a budget of one amount times, as a key's part: the whole model, or a phase of one that generates."""
        if self.token_ms is not None:
            return DECODE
        return WHOLE if self.time_to_first_token_ms is None else prefill_of(self.prompt)
