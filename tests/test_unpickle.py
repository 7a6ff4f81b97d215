import argparse
import pickle
import re
import signal
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modelzoo.tensor_files import Reader, read_blocks
from modelzoo.unpickle import read_torch_header, read_torch_tree
from tests import torch_files
from tests.torch_files import Call, Global, Storage

FORMATS = {"archive": torch_files.save_archive, "stream": torch_files.save_stream}


def load(file):
    arrays = {}
    for name, ref in read_torch_header(file).items():
        with Reader() as reader:
            reader.open(ref.file)
            out = np.zeros(ref.shape, ref.dtype)
            for box, block in read_blocks(reader, ref, ref.strides, [(0, n) for n in ref.shape]):
                out[tuple(slice(*bounds) for bounds in box)] = block
        arrays[name] = out
    return arrays


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", torch_files.STORAGE_NAMES, ids=str)
def test_reads_every_dtype(tmp_path, save, dtype):
    array = (np.arange(24) % 7).astype(dtype).reshape(2, 3, 4)
    save(tmp_path / "a.bin", {"x": array, "y": array[:1].copy()})
    loaded = load(tmp_path / "a.bin")
    assert loaded["x"].dtype == dtype
    np.testing.assert_array_equal(loaded["x"], array)
    np.testing.assert_array_equal(loaded["y"], array[:1])


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_reads_views_that_share_a_storage(tmp_path, save):
    base = np.arange(60, dtype=np.float32)
    grid = base.reshape(6, 10)
    views = {
        "whole": grid,
        "transposed": grid.T,
        "part": grid[2:5, 3:7],
        "every_other": grid[::2, ::3],
        "expanded": np.broadcast_to(base[5:6], (4, 1))[:, 0],
        "scalar": base[7:8].reshape(()),
        "empty": grid[:0],
    }
    save(tmp_path / "a.bin", views)
    refs = read_torch_header(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").stat().st_size < 3000  # one storage
    assert refs["transposed"].strides == (1, 10)
    loaded = load(tmp_path / "a.bin")
    for name, view in views.items():
        np.testing.assert_array_equal(loaded[name], view, err_msg=name)


def test_reads_parameters(tmp_path):
    storage = Storage(Global("torch.cuda", "BFloat16Storage"), "0", "cuda:0", 4)
    state = {"w": torch_files.parameter(torch_files.tensor(storage, 0, (2, 2), (2, 1)))}
    data = np.arange(4).astype(ml_dtypes.bfloat16)
    torch_files.write_archive(tmp_path / "a.bin", state, {"0": data})
    np.testing.assert_array_equal(load(tmp_path / "a.bin")["w"], data.reshape(2, 2))


def test_reads_the_attributes_that_state_dicts_carry(tmp_path):
    class Metadata:
        """Pickles as an OrderedDict with an attribute, as Module.state_dict() makes them."""

        def __reduce__(self):
            ordered = Global("collections", "OrderedDict")
            return ordered, (), {"_metadata": Call(ordered)}, None, iter(state.items())

    storage = Storage(Global("torch", "FloatStorage"), "0", "cpu", 1)
    state = {"w": torch_files.tensor(storage, 0, (1,), (1,))}
    torch_files.write_archive(tmp_path / "a.bin", Metadata(), {"0": np.ones(1, np.float32)})
    assert list(read_torch_header(tmp_path / "a.bin")) == ["w"]


WICKED = {
    "os.system": ("posix.system", Call(Global("posix", "system"), "touch PWNED")),
    "eval": ("builtins.eval", Call(Global("__builtin__", "eval"), "open('PWNED', 'w')")),
    "getattr": (
        "builtins.getattr",
        Call(Global("builtins", "getattr"), Global("torch", "FloatStorage"), "x"),
    ),
    "dotted": (
        "collections.OrderedDict.fromkeys",
        Call(Global("collections", "OrderedDict.fromkeys"), (1, 2)),
    ),
    "numpy scalar": (
        "numpy.core.multiarray.scalar",
        Call(Global("numpy.core.multiarray", "scalar"), 1, b"\0" * 8),
    ),
    "torch.load": ("torch.load", Call(Global("torch", "load"), "other.bin")),
    "a name alone": ("os.environ", Global("os", "environ")),
}


@pytest.mark.parametrize("save", ["archive", "stream"])
@pytest.mark.parametrize(("asked", "obj"), WICKED.values(), ids=WICKED)
def test_refuses_code_and_runs_none_of_it(tmp_path, monkeypatch, save, asked, obj):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if save == "archive":
        torch_files.write_archive(file, {"w": obj}, {})
    else:
        with open(file, "wb") as stream:
            torch_files.pickled(obj, stream)
    with pytest.raises(ValueError, match=re.escape(asked)) as error:
        read_torch_header(file)
    assert str(file) in str(error.value).splitlines()[0]
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_a_pickle_cannot_change_what_later_ones_see(tmp_path):
    """BUILD sets attributes on whatever is on the stack, so what a pickle can name must have none."""

    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        # The name, a state tuple (None, {"__defaults__": (1,)}), BUILD, STOP.
        code = b"\x80\x02ctorch._utils\n" + name.encode() + b"\n(N}X\x0c\x00\x00\x00__defaults__K\x01\x85stb."
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            archive.writestr("archive/data.pkl", code)
        with pytest.raises(ValueError, match="attribute"):
            read_torch_header(tmp_path / "a.bin")


def test_refuses_opcodes_that_tables_do_not_need(tmp_path):
    for code, what in [(b"\x80\x02\x82\x01.", "EXT1"), (b"\x80\x02}r\xff\xff\xff\x7f.", "LONG_BINPUT")]:
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            archive.writestr("archive/data.pkl", code)
        with pytest.raises(ValueError, match=what):
            read_torch_header(tmp_path / "a.bin")


def storage(numel=4, key="0", kind="FloatStorage"):
    return Storage(Global("torch", kind), key, "cpu", numel)


UNSOUND = {
    "past the storage": (
        torch_files.tensor(storage(), 1, (2, 2), (2, 1)),
        "reaches element 4 of a storage of 4",
    ),
    "negative stride": (torch_files.tensor(storage(), 3, (2,), (-1,)), "strides"),
    "not integers": (torch_files.tensor(storage(), 0, ("2",), (1,)), "shape"),
    "storage lacking": (torch_files.tensor(storage(key="7"), 0, (2,), (1,)), "storage '7'"),
    "storage too short": (torch_files.tensor(storage(5), 0, (2,), (1,)), "16 bytes where 20"),
    "no storage": (Call(Global("torch._utils", "_rebuild_tensor_v2"), 1, 0, (1,), (1,)), "storage"),
    "parameter of nothing": (torch_files.parameter(Call(Global("collections", "OrderedDict"))), "parameter"),
    "a number": (3, "entry 'w' is a int"),
    "called storage": (Call(Global("torch", "FloatStorage"), 3), "not callable"),
}


@pytest.mark.parametrize(("value", "what"), UNSOUND.values(), ids=UNSOUND)
def test_names_what_is_unsound(tmp_path, value, what):
    torch_files.write_archive(tmp_path / "a.bin", {"w": value}, {"0": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=what) as error:
        read_torch_header(tmp_path / "a.bin")
    assert "a.bin" in str(error.value)


def test_a_huge_claimed_shape_allocates_nothing(tmp_path):
    value = torch_files.tensor(storage(), 0, (10**12, 10**12), (0, 0))
    torch_files.write_archive(tmp_path / "a.bin", {"w": value}, {"0": np.zeros(4, np.float32)})
    assert read_torch_header(tmp_path / "a.bin")["w"].shape == (10**12, 10**12)


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_truncated_anywhere(tmp_path, save):
    save(tmp_path / "a.bin", {"w": np.arange(64, dtype=np.float32), "v": np.ones((3, 3), np.float16)})
    whole = (tmp_path / "a.bin").read_bytes()
    for length in range(0, len(whole) - 1, 7):
        (tmp_path / "a.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.bin"):
            read_torch_header(tmp_path / "a.bin")


def test_other_files(tmp_path):
    file = tmp_path / "a.bin"
    for content in (
        b"",
        b"<!doctype html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        pickle.dumps([1]),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.bin"):
            read_torch_header(file)
    with pytest.raises(OSError, match=r"b\.bin"):
        read_torch_header(tmp_path / "b.bin")


def test_other_archives(tmp_path):
    file = tmp_path / "a.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        read_torch_header(file)
    torch_files.write_archive(file, {}, {}, byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_torch_header(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1000)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_header(file)
    torch_files.write_archive(file, [1, 2], {})
    with pytest.raises(ValueError, match="holds a list"):
        read_torch_header(file)


def run_file(path, legacy=False, **more):
    """A training run's file: options, random states, an optimizer, and tensors in nested dicts."""
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {
        "args": argparse.Namespace(hidden_size=12, kind=Call(Global("megatron.model.enums", "Kind"), 1)),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "lr": np.float64(0.5),
        "where": Path("/data"),
        "seen": {1, 2},
        "signal": signal.SIGTERM,
        "model": {"language_model": {"embedding": {"weight": weights}}},
    }
    torch_files.save_tree(path, content | more, legacy)


@pytest.mark.parametrize("legacy", [False, True], ids=FORMATS)
def test_reads_what_a_run_saves(tmp_path, legacy):
    run_file(tmp_path / "a.pt", legacy)
    tree = read_torch_tree(tmp_path / "a.pt")
    assert (tree["args"].name, tree["args"].fields["hidden_size"]) == ("argparse.Namespace", 12)
    assert tree["args"].fields["kind"].name == "megatron.model.enums.Kind"
    assert tree["args"].fields["kind"].args == (1,)
    assert (tree["np_rng_state"][0], tree["lr"]) == ("MT19937", 0.5)
    ref = tree["model"]["language_model"]["embedding"]["weight"]
    with Reader() as reader:
        reader.open(ref.file)
        data = reader.read(ref.file, ref.offset, 6, ref.dtype)
    np.testing.assert_array_equal(data, np.arange(6))


@pytest.mark.parametrize("legacy", [False, True], ids=FORMATS)
@pytest.mark.parametrize("asked", [wicked for wicked in WICKED if wicked != "numpy scalar"])
def test_a_run_may_not_run_code_either(tmp_path, monkeypatch, legacy, asked):
    monkeypatch.chdir(tmp_path)
    name, obj = WICKED[asked]
    run_file(tmp_path / "a.pt", legacy, extra=obj)
    with pytest.raises(ValueError, match=re.escape(name)):
        read_torch_tree(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_state_dict_needs_no_records(tmp_path):
    run_file(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"argparse\.Namespace"):
        read_torch_header(tmp_path / "a.pt")


def test_a_run_is_a_dict(tmp_path):
    torch_files.write_archive(tmp_path / "a.pt", [1], {})
    with pytest.raises(ValueError, match="holds a list"):
        read_torch_tree(tmp_path / "a.pt")
    nested = {"a": {}}
    nested["a"]["b"] = nested
    torch_files.write_archive(tmp_path / "a.pt", nested, {})
    with pytest.raises(ValueError, match="recursion"):
        read_torch_tree(tmp_path / "a.pt")
