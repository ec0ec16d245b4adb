import sys
import threading

import pytest

from rankship_pipeline.foundation.console import Steps


@pytest.mark.parametrize("name", ["merge by joint", "merge " * 40])
def test_a_finished_step_is_one_line_on_stderr(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.step(name):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"✓ {name}" in err
    assert steps.seconds[name] >= 0


def test_a_failed_step_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with pytest.raises(KeyboardInterrupt), steps.step("merge"):
        raise KeyboardInterrupt
    assert "✓" not in capsys.readouterr().err
    assert steps.seconds == {}


def test_tracked_parts_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.track("measure", total=3) as advance:
        for part in ("a", "b", "c"):
            advance(part)
    assert "✓ measure" in capsys.readouterr().err
    assert list(steps.seconds) == ["measure"]


def test_a_transfer_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.transfer("push to [pi]") as told:
        for sent in (1, 2, 3, 3):
            told(sent, 3)
        told(1, 5)
    assert "✓ push to [pi]" in capsys.readouterr().err
    assert list(steps.seconds) == ["push to [pi]"]


def test_a_note_belongs_to_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    steps.note("the device is warm")
    assert "· the device is warm" in capsys.readouterr().err
    assert steps.seconds == {}


def test_quiet_steps_say_nothing_and_keep_their_times(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(quiet=True)
    with steps.step("merge"):
        steps.note("nothing")
    assert capsys.readouterr() == ("", "")
    assert list(steps.seconds) == ["merge"]


@pytest.mark.parametrize("name", ["compress: [joint]", "path [/tmp/x]", "[red]alarm"])
def test_brackets_in_a_name_are_shown_not_read_as_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.step(name):
        steps.note(name)
    assert capsys.readouterr().err.count(name) == 2


def test_workers_side_by_side_name_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.side_by_side() as start:
        workers = [start(name) for name in ("pi4", "pixel6")]

        def work(worker: Steps) -> None:
            with worker.step("push"):
                pass
            with worker.track("measure", total=2) as advance:
                advance("round 1")
            with worker.transfer("copy") as told:
                told(1, 2)
            worker.note("[cool]")

        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told = capsys.readouterr().err
    for name in ("pi4", "pixel6"):
        assert all(f"✓ {name}: {what}" in told for what in ("push", "measure", "copy"))
        assert f"· {name}: [cool]" in told
    assert all(list(worker.seconds) == ["push", "measure", "copy"] for worker in workers)


def test_a_notebook_without_widgets_gets_its_lines_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown: list[str] = []
    monkeypatch.setattr("rich.jupyter.display", lambda _, text: shown.append(text))
    steps = Steps()
    with steps.step("merge"), steps.follow("refine") as on_progress:
        on_progress(0.5)
    assert [text.split()[1] for text in shown] == ["refine", "merge"]
    assert capsys.readouterr() == ("", "")
