import json

import pytest

from inference import plan as entry


def test_a_page(capsys):
    entry.main(["bloom-176b", "--topology", "v5p:2x2x2", "--mesh", "tensor=8", "--rows", "8", "--analytic"])
    out = capsys.readouterr().out
    assert "176,247,271,424 parameters in bfloat16: 8 rows" in out
    assert "by arithmetic alone" in out
    assert "prefill, predicted" in out


def test_the_smallest_slice_that_fits(capsys):
    found = {}
    for quantize in ("none", "int8"):
        entry.main(["bloom-176b", "--topology", "v5p", "--quantize", quantize, "--analytic", "--json"])
        found[quantize] = json.loads(capsys.readouterr().out)
    assert found["none"]["topology"] == "v5p:2x2x1"
    assert found["int8"]["held_bytes"] < found["none"]["held_bytes"]


def test_the_exit_code_says_that_it_does_not_fit(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(["bloom-176b", "--topology", "v5e:2x2", "--mesh", "tensor=4", "--analytic"])
    assert stopped.value.code == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["gpt-j-6b", "--topology", "v9"], "no such chip is known"),
        (["gpt-j-6b", "--topology", "v5e:2x2", "--rows", "0"], "it is at least 1"),
        (["gpt-j-6b", "--topology", "v5e:2x2", "--mesh", "tensor=3"], "needs 3 devices, but there are 4"),
        (["gpt-j-6b", "--topology", "v5e:2x2", "--picture", "x.gif"], "ends in .svg or .png"),
        (["gpt-9", "--topology", "v5e:2x2"], "gpt-9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
