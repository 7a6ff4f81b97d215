"""What a program should take on chips that nobody has at hand: time by the roofline, and what limits it.

Every phase of a step has three times: its FLOPs at the chip's published peak, its bytes at the memory's published
bandwidth, its messages at the links' published rate. The roofline (Williams et al., 2009) takes the largest of the
three and adds up the phases. So it is a bound that a real step comes near, not a measurement.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from parallel.chips import Topology

LIMITS = ("compute", "HBM", "network")
HOP_SECONDS = 1e-6
"""From chip to chip, however short the message (Austin et al., 2025, jax-ml.github.io/scaling-book/sharding)."""
ASSUMPTIONS = (
    "products run at the chip's published peak, memory and links at their published rates",
    "inside a phase computing, memory and network overlap fully; phases follow one another",
    "of each pair of axes the inner one lies on nearer chips; a ring sends both ways where the torus closes",
    "no stragglers, no input wait, no checkpoint",
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step, on one chip.

    Attributes:
        name: of it.
        flops: executed.
        hbm: bytes read from and written to memory.
        network: mesh axis -> bytes sent.
        int8: its products are of int8.
        stretch: what waiting for other stages makes of its time.
        hops: between neighbouring chips that its messages make one after another.
    """

    name: str
    flops: float = 0.0
    hbm: float = 0.0
    network: Mapping[str, float] = dataclasses.field(default_factory=dict)
    int8: bool = False
    stretch: float = 1.0
    hops: float = 0.0

    def times(self, topology: Topology, mesh: Mapping[str, int]) -> tuple[float, float, float]:
        """Seconds of computing, memory and network, as in LIMITS."""
        chip, rates = topology.chip, topology.rates(mesh)
        peak = chip.int8_ops if self.int8 else chip.flops
        network = sum(
            sent / rates[axis].rate for axis, sent in self.network.items() if sent and axis in rates
        )
        return self.flops / peak, self.hbm / chip.hbm_rate, network + self.hops * HOP_SECONDS


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a step takes; seconds are predicted, never measured.

    Attributes:
        topology, mesh: where it runs.
        phases: of the step.
        model_flops: of the step on all chips together, without recomputation.
        tokens: that the step works on.
    """

    topology: Topology
    mesh: Mapping[str, int]
    phases: Sequence[Phase]
    model_flops: float
    tokens: int

    @property
    def times(self) -> list[tuple[float, float, float]]:
        """Of each phase, waiting included."""
        return [
            tuple(one * phase.stretch for one in phase.times(self.topology, self.mesh))
            for phase in self.phases
        ]  # pyright: ignore[reportReturnType]

    @property
    def seconds(self) -> float:
        """Of a step, if inside a phase everything overlaps."""
        return sum(map(max, self.times))

    @property
    def seconds_apart(self) -> float:
        """Of a step, if the network waits for the computing and the computing for the network."""
        return sum(max(compute, hbm) + network for compute, hbm, network in self.times)

    @property
    def hardware_flops(self) -> float:
        """Executed by one chip in a step, those of stages on nothing while they wait included."""
        return sum(phase.flops * phase.stretch for phase in self.phases)

    def utilisation(self, seconds: float | None = None) -> float:
        """Model FLOPs utilisation: the share of the chips' published peak."""
        return self.model_flops / (seconds or self.seconds) / self.topology.size / self.topology.chip.flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_chip_hour(self) -> float:
        return 3600 * self.tokens_per_second / self.topology.size

    def shares(self) -> dict[str, float]:
        """Seconds by what limits them."""
        found: dict[str, float] = dict.fromkeys(LIMITS, 0.0)
        for times in self.times:
            found[LIMITS[times.index(max(times))]] += max(times)
        return found

    def limit(self) -> str:
        """What limits the step, in a sentence."""
        shares, total = self.shares(), self.seconds
        worst = max(shares, key=shares.__getitem__)
        times = [(max(times), phase) for times, phase in zip(self.times, self.phases, strict=True)]
        in_worst = [
            (time, phase.name)
            for (time, phase), each in zip(times, self.times, strict=True)
            if LIMITS[each.index(max(each))] == worst
        ]
        what = {
            "compute": "the matrix units",
            "HBM": "the memory's bandwidth",
            "network": "the links between chips",
        }[worst]
        sentence = (
            f"Limited by {what} for {shares[worst] / total:.0%} of the step, most of it in {max(in_worst)[1]}"
        )
        waiting = sum(
            max(times) * (1 - 1 / phase.stretch) for times, phase in zip(self.times, self.phases, strict=True)
        )
        if waiting > 0.02 * total:
            sentence += f"; stages wait for one another {waiting / total:.0%} of it"
        return sentence + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "predicted_step_seconds": self.seconds,
            "predicted_step_seconds_without_overlap": self.seconds_apart,
            "predicted_mfu": self.utilisation(),
            "predicted_mfu_without_overlap": self.utilisation(self.seconds_apart),
            "predicted_tokens_per_second": self.tokens_per_second,
            "predicted_tokens_per_chip_hour": self.tokens_per_chip_hour,
            "model_flops": self.model_flops,
            "hardware_flops_per_chip": self.hardware_flops,
            "limit": self.limit(),
            "phases": [
                {
                    "name": phase.name,
                    "flops": phase.flops,
                    "hbm_bytes": phase.hbm,
                    "sent_bytes": dict(phase.network),
                }
                | dict(zip(("compute_seconds", "hbm_seconds", "network_seconds"), times, strict=True))
                for phase, times in zip(self.phases, self.times, strict=True)
            ],
            "assumptions": list(ASSUMPTIONS),
        }
