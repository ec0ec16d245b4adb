"""Every word of suites and recipes has one meaning, and every default keeps the key that files always had."""

from typing import get_args, get_type_hints

import pytest

from rankship_benchmarks.bundle.suite import DelegateChoice
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Delegate
from rankship_pipeline.foundation.delegates import DELEGATES, find_facts, find_word
from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format


@pytest.mark.parametrize("name", FORMATS)
def test_what_runtimes_do_by_themselves_comes_first_and_keeps_its_key(name: Format) -> None:
    first, *others = DELEGATES[name]
    assert first.delegate == "cpu"
    assert find_facts(ArtifactKey(variant="dense", format=name)) is first
    assert (
        len({one.delegate for one in DELEGATES[name]}) == len({one.word for one in DELEGATES[name]}) == 1 + len(others)
    )
    assert all(one.delegate in get_args(Delegate) for one in others)
    assert all((one.asked == "file") == FACTS[name].holds_delegate for one in DELEGATES[name])


@pytest.mark.parametrize("name", FORMATS)
def test_a_suite_takes_exactly_the_words_of_the_table(name: Format) -> None:
    hint = get_type_hints(DelegateChoice)[name]
    (words,) = [one for one in (hint, *get_args(hint)) if get_args(one)[-1:] == (...,)]
    assert get_args(get_args(words)[0]) == tuple(one.word for one in DELEGATES[name])
    assert find_word(name, DELEGATES[name][-1].word) is DELEGATES[name][-1]
