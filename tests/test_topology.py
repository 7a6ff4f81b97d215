import importlib.metadata
import importlib.util

import pytest

from parallel import topology as places
from parallel.chips import parse_topology


def test_a_mesh_of_chips_that_are_not_here():
    mesh = places.abstract_mesh(parse_topology("v5p:4x4x4"), {"fsdp": -1, "tensor": 4})
    assert dict(mesh.shape) == {"stage": 1, "data": 1, "fsdp": 16, "context": 1, "tensor": 4}


def test_a_mesh_that_does_not_fit_names_the_nearest():
    with pytest.raises(ValueError, match="fsdp=16 needs 16 devices, but there are 64: the nearest mesh"):
        places.abstract_mesh(parse_topology("v5p:4x4x4"), {"fsdp": 16})


def test_why_nothing_is_compiled(monkeypatch):
    assert "Only TPUs" in places.why_not_compiled(parse_topology("h100:8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "flaxtron[tpu]" in places.why_not_compiled(parse_topology("v5e:2x2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert places.why_not_compiled(parse_topology("v5e:2x2")) == ""


def test_jax_stays_on_the_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    places.stay_on_cpu()
    assert places.os.environ["JAX_PLATFORMS"] == "tpu"  # who sets it, knows why
    assert places.os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_the_compiler_says_its_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"libtpu": "0.0.42"}.__getitem__)
    assert places.compiler() == "libtpu 0.0.42"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert places.compiler() == "libtpu"


def test_divisors():
    assert places.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
