"""A file that generates on a device: timed by phase under one key each, and a prompt that it continues."""

from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import DENSE, make_request, sign
from make.devices import make_local
from make.onnx_files import save_product
from make.token_files import GENERATION, PROMPT, TOKENS, continue_greedily, save_decoder
from rankship_pipeline.foundation.artifact_key import DECODE, prefill_of
from rankship_pipeline.foundation.errors import BuildError, CommandFailed
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.session.session import open_session
from rankship_targets.trials.request import GenerateRequest


def test_phases_are_timed_and_a_prompt_is_continued(tmp_path: Path) -> None:
    path = save_decoder(tmp_path / "decoder.onnx", TOKENS[:1])
    (tmp_path / "other").mkdir()
    other = save_product(tmp_path / "other/product.onnx")
    sha256 = hash_file(path)
    with open_session(make_local(tmp_path / "a device")) as session:
        remote, tokens = session.push(path, sign(path)), session.push_file(path.with_name("x.npy"))
        for part in (prefill_of(PROMPT), DECODE):
            key = replace(DENSE, part=part)
            trial = session.measure(make_request(remote, sha256, [tokens], key, generation=GENERATION))
            assert (trial.key, len(trial.samples_ns) >= 20) == (key, True)
        asked = GenerateRequest(
            key=DENSE,
            artifact=remote,
            artifact_sha256=sha256,
            prompt=tokens,
            threads=1,
            new_tokens=5,
            generation=replace(GENERATION, ends=()),
        )
        alone = session.push(other, sign(other))
        sweep = [make_request(alone, hash_file(other), [session.push_file(other.with_name("x.npy"))])]
        for part in (DECODE, prefill_of(PROMPT)):  # beside a file that does not generate
            key = replace(DENSE, part=part)
            sweep.append(make_request(remote, sha256, [tokens], key, generation=GENERATION))
        assert [one.key.part for one in session.sweep(sweep)] == ["whole", DECODE, prefill_of(PROMPT)]
        made = session.generate(asked)
        assert list(made.tokens) == continue_greedily(TOKENS[:1], 5)
        assert (len(made.ns), made.first_ns > 0) == (4, True)
        with pytest.raises(BuildError, match="not pushed as verified"):
            session.generate(replace(asked, artifact="/elsewhere"))
        with pytest.raises(CommandFailed, match="8 tokens do not fit the context of 7"):
            session.generate(replace(asked, generation=replace(GENERATION, context=7)))
