"""Accelerators as their makers publish them, and topologies of them: what a plan is held against.

A topology is written as CHIP:SHAPE, such as v5p:4x4x4 or h100:64; SLICES*CHIP:SHAPE is several of them joined by the
datacenter's network, such as 2*v5e:16x16.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

GIGA, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Bytes are per second unless said otherwise; links are counted in one direction.

    Attributes:
        name: as in a topology.
        flops: dense bfloat16 FLOP/s.
        int8_ops: dense int8 operations/s.
        hbm_bytes: memory that a program can have: of a TPU what the compiler allows, a little less than is sold.
        hbm_rate: the memory's bandwidth.
        link_rate: of one link (TPU), or of all links to the others of a node (GPU).
        num_dims: of the torus; 0: every chip of a node reaches every other at the full rate.
        wraps: the smallest size of a dimension that closes into a ring.
        node: chips that `link_rate` joins where there is no torus.
        dcn_rate: to other slices or nodes, each chip's share.
    """

    name: str
    flops: float
    int8_ops: float
    hbm_bytes: int
    hbm_rate: float
    link_rate: float
    num_dims: int
    wraps: int
    node: int
    dcn_rate: float

    @property
    def is_tpu(self) -> bool:
        return self.num_dims > 0


# TPU peaks, bandwidths and sizes: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Rates of one link and of the network
# between slices: Austin et al., "How to Scale Your Model", 2025, jax-ml.github.io/scaling-book/tpus. Memory: what
# libtpu 0.0.42 says is available when a program does not fit (v4: of 32 GiB, as much less). GPUs: NVIDIA's data sheets
# of A100-SXM-80GB, H100-SXM and H200-SXM; between nodes one adapter a GPU as in a DGX, of 200 (A100) or 400 Gb/s.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 275e12, int(30.75 * GIB), 1228 * GIGA, 45 * GIGA, 3, 4, 0, 6.25 * GIGA),
        Chip("v5e", 197e12, 394e12, int(15.75 * GIB), 819 * GIGA, 45 * GIGA, 2, 16, 0, 3.125 * GIGA),
        Chip("v5p", 459e12, 918e12, int(95.74 * GIB), 2765 * GIGA, 90 * GIGA, 3, 4, 0, 6.25 * GIGA),
        Chip("v6e", 918e12, 1836e12, int(31.25 * GIB), 1640 * GIGA, 90 * GIGA, 2, 16, 0, 12.5 * GIGA),
        Chip("a100", 312e12, 624e12, 80 * GIB, 2039 * GIGA, 300 * GIGA, 0, 0, 8, 25 * GIGA),
        Chip("h100", 989e12, 1979e12, 80 * GIB, 3350 * GIGA, 450 * GIGA, 0, 0, 8, 50 * GIGA),
        Chip("h200", 989e12, 1979e12, 141 * GIGA, 4800 * GIGA, 450 * GIGA, 0, 0, 8, 50 * GIGA),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are joined.

    Attributes:
        chip: of which kind.
        shape: of one slice, such as (4, 4, 4); of GPUs their number.
        slices: how many slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices}*{name}"

    @property
    def size(self) -> int:
        """Chips."""
        return self.slices * math.prod(self.shape)

    @property
    def crosses_at(self) -> int:
        """Chips that the fast network joins: a slice's, or a node's."""
        return math.prod(self.shape) if self.chip.is_tpu else min(self.chip.node, self.size)

    def hops(self, count: int) -> float:
        """Steps between neighbours that the farthest two of a ring of so many chips are apart."""
        if not self.chip.is_tpu:
            return 1.0 if count <= self.crosses_at else 2.0
        return count / 2 if any(dim >= self.chip.wraps for dim in self.shape) else count - 1.0

    def rates(self, mesh: Mapping[str, int]) -> dict[str, "Link"]:
        """What carries each axis of a mesh.

        The last axes lie on neighbours. On a torus an axis takes whole dimensions while they fit: every dimension that
        it spans adds two directions if it closes into a ring, one if it does not.

        Args:
            mesh: sizes of its axes, slowest first, as `parallel.MESH_AXES`.
        """
        found: dict[str, Link] = {}
        inside, free = 1, sorted(self.shape, reverse=True)
        for axis, size in reversed(list(mesh.items())):
            if size > 1 and inside * size > self.crosses_at:
                found[axis] = Link(self.chip.dcn_rate, "DCN" if self.chip.is_tpu else "network")
            elif size > 1 and self.chip.is_tpu:
                found[axis] = Link(self.chip.link_rate * self._directions(size, free), "ICI")
            elif size > 1:
                found[axis] = Link(self.chip.link_rate, "NVLink")
            inside *= size
        return found

    def _directions(self, size: int, free: list[int]) -> int:
        """Directions in which a ring over so many chips can send at once; what it takes is cut off `free`."""
        directions = 0
        while size > 1 and free:
            dim = next((dim for dim in free if size % dim == 0), None)
            free.sort(reverse=True)
            if dim is not None:  # a whole dimension, which may close
                free.remove(dim)
                directions += 2 if dim >= self.chip.wraps else 1
                size //= dim
                continue
            part = max(math.gcd(size, dim) for dim in free)
            if part == 1:
                break
            at = next(i for i, dim in enumerate(free) if math.gcd(size, dim) == part)
            free[at] //= part
            directions += 1
            size //= part
        return max(1, directions)


@dataclasses.dataclass(frozen=True)
class Link:
    """What carries the collectives of a mesh axis.

    Attributes:
        rate: bytes/s that a chip can send over it.
        kind: "ICI", "DCN", "NVLink" or "network".
    """

    rate: float
    kind: str


def parse_topology(text: str) -> Topology:
    """Reads "v5p:4x4x4", "2*v5e:16x16" or "h100:64".

    Raises:
        ValueError: no such chip, or a shape that it does not come in.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip())
    if not found:
        raise ValueError(
            f"topology {text!r}: write it as CHIP:SHAPE, such as v5p:4x4x4, v5e:16x16 or h100:64"
        )
    slices, name, shape = int(found[1] or 1), found[2].lower(), tuple(map(int, found[3].split("x")))
    if name not in CHIPS:
        raise ValueError(f"topology {text!r}: no chip {name!r} is known: choose from {', '.join(CHIPS)}")
    chip, want = CHIPS[name], CHIPS[name].num_dims or 1
    if len(shape) != want or min(*shape, slices) < 1:
        example = "x".join(["4"] * want) if chip.is_tpu else "64"
        raise ValueError(f"topology {text!r}: {name} comes in {want} dimensions, such as {name}:{example}")
    if slices > 1 and not chip.is_tpu:
        raise ValueError(
            f"topology {text!r}: only TPUs come in slices; write all GPUs as {name}:{slices * shape[0]}"
        )
    return Topology(chip, shape, slices)
