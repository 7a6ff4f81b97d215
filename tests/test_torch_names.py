"""What stands in for the names in PyTorch's pickles does nothing, and outlives no file."""

import pytest

from modelzoo import torch_names
from modelzoo.torch_names import Record, record_class

SHAPE = (2, 3)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "Namespace"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("numpy", "dtype"),
        ("megatron.model.enums", "AttnMaskType"),
        ("megatron.core.enums", "ModelType.encoder"),
        ("apex.amp", "Anything"),
    ],
)
def test_records_keep_and_do_nothing(module, name):
    cls = record_class(module, name)
    assert cls is not None
    record = cls(1, "two", three=3)
    record.__setstate__({"a": 1, 5: "no name"})
    record.__setstate__(({"b": 2}, None))
    record.extend([1])
    record.add(1)
    record["x"] = 1
    assert (record.name, record.args, record.fields) == (f"{module}.{name}", (1, "two"), {"a": 1, "b": 2})
    with pytest.raises(AttributeError):
        record.anything = 1
    assert cls is not record_class(module, name)  # what one file sets on a class, no other sees


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("megatronx", "run"),
        ("argparse", "_sys.modules"),
        ("functools", "reduce"),
        ("subprocess", "Popen"),
        ("runpy", "run_path"),
    ],
)
def test_other_names_have_no_record(module, name):
    assert record_class(module, name) is None
    assert (module, name) not in torch_names.CALLS


def call(module, name, *arguments):
    return torch_names.CALLS[module, name](*arguments)


def test_numbers_and_bytes():
    dtype = record_class("numpy", "dtype")
    assert dtype is not None
    data = call("_codecs", "encode", "\x00\x00\x00\x00\x00\x00\x04@", "latin1")
    assert call("numpy.core.multiarray", "scalar", dtype("f8", False, True), data) == 2.5
    assert call("numpy._core.multiarray", "scalar", dtype("O8"), data) is None
    with pytest.raises(ValueError, match="has 8 bytes"):
        call("numpy.core.multiarray", "scalar", dtype("f4"), data)
    with pytest.raises(ValueError, match="rot13"):
        call("_codecs", "encode", "a", "rot13")


def test_tensors_in_wrappers():
    storage = torch_names.Storage(torch_names.STORAGES["FloatStorage"], "0", 0, 6)
    rebuild = torch_names.CALLS["torch._utils", "_rebuild_tensor_v2"]
    tensor = rebuild(storage, 0, SHAPE, (3, 1), False, None)
    size = record_class("torch", "Size")
    assert size is not None
    assert rebuild(storage, 0, size(SHAPE), (3, 1)) == tensor
    assert call("torch._utils", "_rebuild_parameter_with_state", tensor, True, {}, {"a": 1}) == tensor
    arguments = (storage, 0, SHAPE, (3, 1))
    assert call("torch._tensor", "_rebuild_from_type_v2", rebuild, Record, arguments, {}) == tensor
    with pytest.raises(ValueError, match="not made of a tensor"):
        call("torch._tensor", "_rebuild_from_type_v2", print, Record, ("x",), {})


def test_old_protocols_make_records():
    namespace = record_class("argparse", "Namespace")
    assert isinstance(call("copyreg", "_reconstructor", namespace, object, None), Record)
    with pytest.raises(ValueError, match="no class"):
        call("copyreg", "_reconstructor", print, object, None)
