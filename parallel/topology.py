"""Meshes of chips that are not here: abstract ones to count on, and the TPU compiler's to compile for.

The compiler is libtpu, which the extra `tpu` installs; it needs no TPU, and takes none that is there.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from parallel.chips import Topology
from parallel.mesh import MESH_AXES, mesh_sizes

INSTALL = "pip install 'flaxtron[tpu]'"
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks a metadata server that is not there
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles alone: others may as well
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def stay_on_cpu() -> None:
    """Keeps JAX off accelerators that are here: to be called by entry points, before anything asks for devices."""
    for name, value in {"JAX_PLATFORMS": "cpu", **_QUIET}.items():
        os.environ.setdefault(name, value)


def abstract_mesh(topology: Topology, sizes: Mapping[str, int]) -> AbstractMesh:
    """The mesh of a topology, without devices.

    Args:
        topology: of the chips.
        sizes: as of `parallel.make_mesh`; one may be -1.

    Raises:
        ValueError: they do not multiply to the chips.
    """
    full = mesh_sizes({axis: sizes.get(axis, 1) for axis in MESH_AXES}, topology.size)
    return AbstractMesh(tuple(full.values()), tuple(full), axis_types=(AxisType.Auto,) * len(full))


def why_not_compiled(topology: Topology) -> str:
    """Why nothing can be compiled for a topology here, in a sentence; empty if it can."""
    if not topology.chip.is_tpu:
        return (
            f"Only TPUs can be compiled for from afar: for {topology.chip.name} this is the arithmetic alone."
        )
    if importlib.util.find_spec("libtpu") is None:
        return f"The TPU compiler is not installed ({INSTALL}): this is the arithmetic alone."
    return ""


def compiler() -> str:
    """The TPU compiler's name and version, as a plan's page says them; of a nightly build its name alone."""
    try:
        return f"libtpu {importlib.metadata.version('libtpu')}"
    except importlib.metadata.PackageNotFoundError:
        return "libtpu"


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for.

    Args:
        topology: of TPUs; libtpu is installed.

    Raises:
        ValueError: the compiler knows no such topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    if math.prod(topology.shape) < 4:  # hosts have four chips or more, unless told
        options["chips_per_host_bounds"] = [*topology.shape, 1][:3]
    if topology.chip.name == "v4":  # whose two cores make one device, as on a host that has them
        options["chip_config_name"] = "megacore"
    try:
        with _noise_held():
            devices = list(
                topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
            )
    except Exception as error:  # jaxlib raises several types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"topology {topology}: the TPU compiler refuses it: {reason}") from None
    if len(devices) != topology.size:
        raise ValueError(
            f"topology {topology}: the TPU compiler makes it {len(devices)} devices, not {topology.size}"
        )
    return devices


@contextlib.contextmanager
def _noise_held() -> Iterator[None]:
    """Holds back what libtpu writes on a machine without a TPU; shown if something goes wrong."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def divisors(count: int) -> list[int]:
    """Of a number, rising."""
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})
