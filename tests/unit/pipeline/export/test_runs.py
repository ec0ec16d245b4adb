"""A prompt's runs through a file are those that the agent makes of it."""

import numpy as np
import pytest

from rankship_pipeline.export.decoders.runs import list_prefills, list_runs
from rankship_targets.agent.decoders import Signed


class Recorded(Signed):
    """The agent's way through a TFLite file's signatures, without a runtime."""

    def __init__(self, context: int) -> None:
        self.context, self.position = context, 0
        self.lengths: list[int] = []
        self._numpy, self._decode = np, None
        self._prefills = [(one, one) for one in list_prefills(context)]

    def _run(self, _runner: object, tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
        self.lengths.append(length)
        self.position += len(tokens)
        return {"logits": np.zeros((1, 1, 2), np.float32)}


@pytest.mark.parametrize("context", [12, 40, 140, 600])
@pytest.mark.parametrize("prompt", [1, 2, 12, 17, 18, 40, 129, 140, 300, 600])
def test_a_tflite_file_takes_a_prompt_in_the_runs_that_the_agent_makes(context: int, prompt: int) -> None:
    if prompt > context:
        return
    decoder = Recorded(context)
    decoder.step(np.arange(prompt))
    assert list_runs("tflite", prompt, context) == decoder.lengths


def test_other_files_take_a_prompt_at_once() -> None:
    assert list_runs("onnx", 128, 512) == list_runs("executorch", 128, 512) == [128]
