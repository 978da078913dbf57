import io
import json

import pytest

from bitgrain.progress import JsonProgress, QuietProgress, RichProgress, make_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def json_events(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_say_what_is_done_and_what_is_left():
    stream, clock = io.StringIO(), Clock()
    progress = JsonProgress(stream, clock)
    progress.start(1000, "bytes", "quantize")
    clock.now += 2
    progress.advance(250, "layers.0")
    clock.now += 6
    progress.advance(750)
    progress.finish()
    first, second, third, last = json_events(stream)
    assert first == {
        "event": "progress",
        "title": "quantize",
        "done": 0,
        "total": 1000,
        "unit": "bytes",
        "eta_s": None,
        "note": "",
    }
    assert (second["done"], second["eta_s"], second["note"]) == (250, 6.0, "layers.0")
    assert (third["done"], third["eta_s"], third["note"]) == (1000, 0.0, "")
    assert (last["event"], last["elapsed_s"], last["complete"]) == ("finish", 8.0, True)


def test_resumed_work_is_estimated_from_the_work_done_here():
    stream, clock = io.StringIO(), Clock()
    progress = JsonProgress(stream, clock)
    progress.start(1000, "bytes", done=900)
    clock.now += 10
    progress.advance(50)
    # 50 left at 5 a second; counting the first 900 would promise half a second
    assert json_events(stream)[-1]["eta_s"] == 10.0


def test_fractional_work_that_adds_up_with_rounding_is_complete():
    stream = io.StringIO()
    progress = JsonProgress(stream)
    progress.start(1.0)
    for _ in range(10):
        progress.advance(0.1)
    progress.finish()
    assert json_events(stream)[-1]["complete"] is True


def test_nothing_to_do_is_complete_and_finish_is_harmless_twice():
    stream = io.StringIO()
    progress = JsonProgress(stream)
    progress.finish()
    progress.advance(3)
    assert stream.getvalue() == ""
    progress.start(0)
    progress.finish()
    progress.finish()
    assert [event["event"] for event in json_events(stream)] == ["progress", "finish"]
    assert json_events(stream)[-1]["complete"] is True


def test_a_second_start_ends_the_first_phase():
    stream = io.StringIO()
    progress = JsonProgress(stream)
    progress.start(10, title="a")
    progress.advance(4)
    progress.start(5, title="b")
    events = json_events(stream)
    assert [(event["event"], event["title"]) for event in events[-2:]] == [("finish", "a"), ("progress", "b")]
    assert events[-2]["complete"] is False


def test_plain_lines_are_few():
    stream, clock = io.StringIO(), Clock()
    progress = RichProgress(stream, clock)
    progress.start(1e9, "bytes", "quantize")
    for step in range(1000):
        clock.now += 0.03125
        progress.advance(1e6, f"layers.{step} [dim]")
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # start, 10 s, 20 s, 30 s, finish
    assert lines[0] == "quantize: 0%, 0 B of 1 GB"
    assert lines[1] == "quantize: 32%, 320 MB of 1 GB, 32 MB/s, 22 s left, layers.319 [dim]"
    assert lines[4] == "quantize: done after 32 s, 1 GB of 1 GB"


def test_plain_line_of_unfinished_work_says_so():
    stream, clock = io.StringIO(), Clock()
    progress = RichProgress(stream, clock)
    progress.start(20000, "tokens")
    clock.now += 3725
    progress.advance(12800)
    progress.finish()
    assert stream.getvalue().splitlines()[-1] == "stopped after 1 h 02 min, 12 800 of 20 000 tokens"


def test_terminal_gets_a_bar_with_rate_and_time_left():
    stream, clock = Terminal(), Clock()
    progress = RichProgress(stream, clock)
    progress.start(200, "bytes", "a [bold] title", done=100)
    clock.now += 10
    progress.advance(50, "layers.7")
    progress.finish()
    text = stream.getvalue()
    for part in ("a [bold] title", "75%", "150 B of 200 B", "5 B/s", "10 s left", "layers.7"):
        assert part in text


def test_modes(capsys: pytest.CaptureFixture[str]):
    assert isinstance(make_progress("rich"), RichProgress)
    assert isinstance(make_progress("quiet"), QuietProgress)
    progress = make_progress("json")
    progress.start(2)
    progress.finish()
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    with pytest.raises(ValueError, match="'loud' is unknown: choose rich, quiet or json"):
        make_progress("loud")  # type: ignore[arg-type]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]):
    progress = make_progress("quiet")
    progress.start(2)
    progress.advance()
    progress.finish()
    assert capsys.readouterr() == ("", "")
