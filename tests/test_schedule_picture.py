"""parallel/schedule_picture.py: the text and the picture show the timetable, and nothing but it."""

import re
import struct
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from parallel import schedule_picture as entry
from parallel.schedule import make_schedule
from tests.house import ROOT


def test_text():
    lines = entry.as_text(make_schedule("1f1b", 2, 3)).splitlines()
    assert lines == [
        "1f1b: 2 stages, 3 microbatches: 5 ticks, bubble 25.0% by counting, 25.0% by (S-1)/(M+S-1); "
        "a stage keeps the inputs of at most 3 microbatches",
        "",
        "tick      0 1 2 3 4",
        "stage 0 F 0 1 2 . .",
        "        B . . 0 1 2",
        "stage 1 F . 0 1 2 .",
        "        B . 0 1 2 .",
    ]


def test_chunks_are_letters():
    text = entry.as_text(make_schedule("interleaved", 2, 4, 2))
    assert "2 chunks a stage" in text
    first = next(line for line in text.splitlines() if line.startswith("stage 0"))
    assert first.split()[3:] == ["0a", "1a", "0b", "1b", "2a", "3a", "2b", "3b", ".", ".", ".", "."]


@pytest.mark.parametrize(
    "arguments",
    [("1f1b", 4, 8), ("gpipe", 4, 8), ("1f1b", 4, 2), ("interleaved", 2, 4, 2), ("1f1b", 2, 4, 1, 2)],
)
def test_the_empty_area_of_the_picture_is_the_bubble(arguments):
    schedule = make_schedule(*arguments)
    spans = list(entry._spans(schedule))
    end = max(start + length for *_, start, length in spans)
    work = sum(length for *_, length in spans)
    assert 1 - work / (schedule.num_stages * end) == pytest.approx(schedule.bubble())
    each = {(stage, direction, number) for stage, direction, number, *_ in spans}
    count = schedule.num_microbatches * schedule.num_chunks
    assert len(each) == len(spans) == 2 * schedule.num_stages * count
    for stage in range(schedule.num_stages):  # one thing at a time
        times = [t for s, _, _, start, length in spans if s == stage for t in range(start, start + length)]
        assert len(times) == len(set(times))


def test_the_command_prints_and_draws(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    entry.main(
        ["--schedule", "interleaved", "--stages", "2", "--microbatches", "4", "--picture", str(picture)]
    )
    assert capsys.readouterr().out.endswith(f"picture: {picture}\n")
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:24])
    assert width > height > 100


def test_a_schedule_is_drawn_among_other_pictures():
    above, below = Figure().subplots(2)
    entry.draw_schedule(above, make_schedule("1f1b", 2, 3))
    assert above.get_title(loc="left") == "1f1b: 3 microbatches, bubble 25.0%"
    assert len(above.texts) == len(above.collections) == 2 * 2 * 3
    assert above.get_xlim()[1] == 3 * (3 + 2 - 1)
    assert not below.has_data()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--schedule", "zigzag"], "schedule 'zigzag' is unknown"),
        (["--stages", "0"], "--stages 0: it is at least 1"),
        (["--virtual-stages", "2"], "the schedule '1f1b' has 1"),
        (["--schedule", "interleaved", "--microbatches", "6"], "no multiple of stage = 4"),
        (["--microbatches", "1000000"], "more than the 100,000 that a picture holds"),
        (["--picture", "/nowhere/at/all.png"], "No such file or directory: '/nowhere/at/all.png'"),
        (["--picture", "plan.movie"], "its ending is one of .*png"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, flags, error):
    with pytest.raises(SystemExit) as stop:
        entry.main(flags)
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{error}[^\n]*\n", captured.err)


def test_help_teaches():
    program = [sys.executable, "-m", "parallel.schedule_picture", "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("examples:", "--virtual-stages", "(default: 4)", "bubble"):
        assert word in done.stdout
