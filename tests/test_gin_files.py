"""train/gin_files.py: what gin may bind, and the one line that every slip gets."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import pytest

from train.gin_files import Settings
from train.gin_names import Name


class Optimizer:
    pass


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    rate: object
    num_steps: int


def adam(
    rate: float | Callable[[int], float] = 0.1, *, num_steps: int, betas: tuple[float, float] = (0.9, 0.99)
) -> Adam:
    return Adam(rate, num_steps)


def ramp(peak: float) -> Callable[[int], float]:
    return lambda step: peak * step


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: str
    num_steps: int
    rate: float = 0.5
    optimizer: Optimizer | None = None
    verbose: bool = False
    sizes: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    secret: int = 3


NAMES = {
    "train": Name(Run, hidden=frozenset({"secret"})),
    "adam": Name(adam),
    "ramp": Name(ramp),
    "constant": Name(ramp),  # gin has a `constant` of its own
}
GOOD = "train.workdir = 'runs/x'\ntrain.num_steps = 7\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a file, reads it with flags, and requires the settings of `train`."""
    monkeypatch.chdir(tmp_path)

    def read(text, *params, **files):
        for name, content in {"x": text, **files}.items():
            (tmp_path / f"{name}.gin").write_text(content)
        settings = Settings(NAMES, ["x.gin"], params, linked={"num_steps": "train.num_steps"})
        settings.require("train")
        return settings

    return read


def test_bindings_macros_and_references(read):
    settings = read(
        "N = 7\ntrain:\n  workdir = 'runs/x'\n  num_steps = %N\n"
        "train.optimizer = @adam()\nadam.rate = @constant()\n"
        "constant.peak = 2\n"
    )
    bound = settings.bound("train")

    assert bound.pop("optimizer").rate(3) == 6
    assert bound == {"workdir": "runs/x", "num_steps": 7}
    assert settings.value("train.num_steps") == 7
    assert settings.value("train.rate") == 0.5
    assert settings.used(["train"]) == ["train", "adam", "constant"]


def test_later_files_and_flags_win(read):
    assert read(GOOD + "train.num_steps = 8\n").value("train.num_steps") == 8
    assert read(GOOD + "train.num_steps = 8\n", "train.num_steps=9").value("train.num_steps") == 9
    assert read("N = 1\ntrain.num_steps = %N\ntrain.workdir = 'x'", "N=2").value("train.num_steps") == 2


def test_includes_are_found_beside_the_file_and_in_the_search_folders(tmp_path, monkeypatch):
    for name, text in {
        "far/base.gin": GOOD,
        "mine/x.gin": "include 'y.gin'",
        "mine/y.gin": "include 'base.gin'",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    settings = Settings(NAMES, [str(tmp_path / "mine" / "x.gin")], search=[tmp_path / "far"])

    assert settings.value("train.num_steps") == 7
    assert settings.where("train.num_steps") == f" ({tmp_path / 'far' / 'base.gin'}:2)"


def test_nothing_is_left_of_an_earlier_reading(read):
    read(GOOD + "train.rate = 9.0\n")
    assert read(GOOD).bound("train") == {"workdir": "runs/x", "num_steps": 7}


def test_two_readings_do_not_disturb_each_other(read):
    text = GOOD + "train.optimizer = @adam()\n"
    first = read(text + "adam.rate = 0.25\n")
    second = read(text + "adam.rate = 0.75\ntrain.num_steps = 9\n")

    assert [s.bound("train")["optimizer"].rate for s in (first, second, first)] == [0.25, 0.75, 0.25]
    assert [s.bound("train")["optimizer"].num_steps for s in (first, second)] == [7, 9]


def test_a_linked_parameter_follows_unless_bound(read):
    text = GOOD + "train.optimizer = @adam()\n"
    assert read(text).bound("train")["optimizer"].num_steps == 7
    assert read(text + "adam.num_steps = 3\n").bound("train")["optimizer"].num_steps == 3


def test_the_whole_text_reads_back_the_same(read, tmp_path):
    settings = read(
        GOOD + "A = 2\ntrain.sizes = (1, %A)\ntrain.optimizer = @adam()\nadam.rate = @ramp()\nramp.peak = 1\n"
    )
    flat = settings.flat(["train"])

    assert flat["train.sizes"] == "(1, 2)"
    assert flat["train.rate"] == "0.5"
    assert flat["train.optimizer"] == "@adam()"
    assert flat["adam.num_steps"] == "7"
    assert "constant.peak" not in flat
    assert "train.secret" not in flat

    text = "".join(f"{key} = {value}\n" for key, value in flat.items())
    assert read(text).flat(["train"]) == flat


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n\ntrain.num_step = 1\n",
            r"unknown setting train\.num_step \(x\.gin:3\): did you mean num_steps\?",
        ),
        ("trian.num_steps = 1\n", r"unknown name trian \(x\.gin:1\): did you mean train\?"),
        ("trian:\n  num_steps = 1\n", r"unknown name trian \(x\.gin:1\)"),
        ("train.secret = 1\n", r"unknown setting train\.secret \(x\.gin:1\)"),
        ("\ntrain.optimizer = @adm()\n", r"unknown name adm \(x\.gin:2\): did you mean adam\?"),
        (
            "train.optimizer = @adam\n",
            r"train\.optimizer = @adam \(x\.gin:1\): write it with parentheses, @adam\(\)",
        ),
        (
            "train.optimizer = @ramp()\n",
            r"train\.optimizer = @ramp\(\) \(x\.gin:1\).* takes .*Optimizer \| None",
        ),
        ("train.workdir = @ramp()\n", r"train\.workdir = @ramp\(\) \(x\.gin:1\): .* it takes str"),
        ("train.num_steps = '1'\n", r"train\.num_steps = '1' \(x\.gin:1\): str does not fit; it takes int"),
        (
            "train.num_steps = 1.0\n",
            r"train\.num_steps = 1\.0 \(x\.gin:1\): float does not fit; it takes int",
        ),
        (
            "train.num_steps = True\n",
            r"train\.num_steps = True \(x\.gin:1\): bool does not fit; it takes int",
        ),
        ("train.rate = False\n", r"train\.rate = False \(x\.gin:1\): bool does not fit; it takes float"),
        ("train.verbose = 1\n", r"train\.verbose = 1 \(x\.gin:1\): int does not fit; it takes bool"),
        (
            "train.sizes = (1, 'a')\n",
            r"train\.sizes = \(1, 'a'\) \(x\.gin:1\): .* it takes tuple\[int, \.\.\.\]",
        ),
        ("train.dtype = 'float16'\n", r"train\.dtype = 'float16' .* it takes 'float32' or 'bfloat16'"),
        ("N = 'a'\ntrain.num_steps = %N\n", r"train\.num_steps = 'a' \(x\.gin:2\)"),
        ("train.num_steps = %N\n", r"%N \(x\.gin:1\): no line gives N a value"),
        (
            "train.num_steps = %gin.REQUIRED\n",
            r"train\.num_steps is required \(x\.gin:1\): set it, or pass --gin_param",
        ),
        ("train.num_steps = 1\n", r'train\.workdir is not set: .*--gin_param="train\.workdir=\.\.\."'),
        (
            GOOD + "train.optimizer = @adam()\nadam.rate = @ramp()",
            r"ramp\.peak is not set, needed by adam\.rate = @ramp\(\)",
        ),
        ("train.num_steps = \n", r"x\.gin:1: cannot be read"),
        ("train.workdir = 'a\n", r"x\.gin:1: cannot be read"),
        ("\n\ntrain.sizes = (1,\n", r"x\.gin:\d: cannot be read"),
        ("train.workdir = a/b\n", r"x\.gin:1: cannot be read"),
        ("train.num_steps 7\n", r"x\.gin:1: cannot be read"),
        ("import os\n", r"import \(x\.gin:1\)"),
        ("eval/train.num_steps = 1\n", r"eval/train\.num_steps \(x\.gin:1\): scopes are not used"),
        ("include 'x.gin'\n", r"x\.gin includes itself \(x\.gin:1\)"),
    ],
)
def test_every_slip_is_one_line_that_says_where(read, text, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        read(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (
            "train.num_steps='x'",
            r"""train\.num_steps = 'x' \(--gin_param="train\.num_steps='x'"\): str does not fit""",
        ),
        ("train.nope=1", r'unknown setting train\.nope \(--gin_param="train\.nope=1"\)'),
        (
            "train.workdir=runs/y",
            r"""cannot be read: .*; if runs/y is a text, quote it: --gin_param="train.workdir='runs/y'""",
        ),
        ("train.num_steps", r'write it as --gin_param="name\.parameter=value"'),
    ],
)
def test_a_slip_in_a_flag_shows_the_flag(read, param, message):
    with pytest.raises(ValueError, match=message) as error:
        read(GOOD, param)
    assert "\n" not in str(error.value)


def test_a_missing_file_says_who_wanted_it(read):
    with pytest.raises(FileNotFoundError, match=r"y\.gin: no such gin file \(x\.gin:2\); looked in"):
        read("\ninclude 'y.gin'\n")
    with pytest.raises(FileNotFoundError, match=r"nothing\.gin: no such gin file \(--gin_file\)"):
        Settings(NAMES, ["nothing.gin"])


def test_integers_are_floats_and_none_is_optional(read):
    settings = read(GOOD + "train.rate = 1\ntrain.optimizer = None\nadam.betas = (0, 0.5)\n")
    assert settings.bound("train")["rate"] == 1
