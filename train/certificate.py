"""What a run can be held to: a hash chain of the batches that it consumed, and digests of its state.

Both are of what the run computes, not of how: a batch's hash adds up hashes of its rows, each with its place in
the global batch, so it is the same however many processes read it; a tensor's digest adds up over its elements,
each mixed with its place in the canonical layout, so it is the same on any mesh. `train.saving` writes them into
every checkpoint and `python -m train.verify` holds a run to them.

The batches are hashed by SHA-256. The state is digested where it lies, at the speed of memory: two lanes of 32
bits for each tensor, which find any accident but are no defence against a forger.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_START = "00" * 32
_MODULUS = 2**256


class HashedBatches:
    """A source of batches that hashes what it gives.

    Args:
        source: has `__next__`, `get_state` and `set_state`; gives dicts of arrays [rows, ...], a process's part of
            the global batch.
        shard: (index, count): the part that this process reads, as `train.data.batches.batch_shard` gives it.
        start: steps taken before.
    """

    def __init__(self, source: Any, shard: tuple[int, int] = (0, 1), start: int = 0):
        self._source, self._shard = source, shard
        self._chain, self._first = _START, start + 1
        self._sums: list[int] = []

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._source)
        rows = len(next(iter(batch.values())))
        self._sums.append(sum_of_rows(batch, self._shard[0] * rows))
        return batch

    def get_state(self) -> Any:
        """The source's place, of what JSON can hold."""
        return self._source.get_state()

    def set_state(self, state: Any, step: int, certificate: Mapping[str, Any] | None = None) -> None:
        """Goes on from a place.

        Args:
            state: as `get_state` gave it.
            step: steps taken there.
            certificate: of the checkpoint there; of one that has none, a new chain begins.
        """
        self._source.set_state(state)
        self._chain = (certificate or {}).get("batches", {}).get("chain", _START)
        self._first, self._sums = step + 1, []

    def take_back(self, step: int) -> None:
        """Forgets batches after a step; the source stays where it is.

        Args:
            step: not before the last call of `certify`.
        """
        assert step >= self._first - 1, "that batch is in a certificate already"
        del self._sums[step + 1 - self._first :]

    def certify(self) -> dict[str, Any]:
        """The chain up to the last batch, and the hashes of the batches since the last call; all processes call it.

        Returns:
            {"chain": the hash of all batches in order, "first": the step of the first hash, "hashes": one for each
            step}, all hex.

        Raises:
            ValueError: two processes that should read the same rows do not.
        """
        sums = np.array([list(s.to_bytes(32, "big")) for s in self._sums], np.uint8).reshape(-1, 32)
        parts = {self._shard[0]: (0, sums)}
        if jax.process_count() > 1:
            indices = np.asarray(multihost_utils.process_allgather(np.int32(self._shard[0])))
            gathered = np.asarray(multihost_utils.process_allgather(sums))
            for process, (index, theirs) in enumerate(zip(indices.tolist(), gathered, strict=True)):
                first, same = parts.setdefault(index, (process, theirs))
                if not np.array_equal(same, theirs):
                    step = self._first + int(np.flatnonzero((same != theirs).any(axis=1))[0])
                    raise ValueError(
                        f"step {step}: processes {first} and {process} read part {index} of the batch and do not read "
                        "the same rows: give all processes the same files"
                    )
        hashes = []
        for i in range(len(sums)):
            total = sum(int.from_bytes(part[i].tobytes(), "big") for _, part in parts.values()) % _MODULUS
            hashes.append(f"{total:064x}")
            self._chain = hashlib.sha256(bytes.fromhex(self._chain + hashes[-1])).hexdigest()
        found = {"chain": self._chain, "first": self._first, "hashes": hashes}
        self._first, self._sums = self._first + len(hashes), []
        return found


def sum_of_rows(batch: Mapping[str, Any], first_row: int) -> int:
    """The sum, modulo 2**256, of the SHA-256 of every row of a batch, which knows its place and what it holds.

    Args:
        batch: arrays [rows, ...] by name.
        first_row: the place of the first one in the global batch.
    """
    arrays = {name: np.ascontiguousarray(batch[name]) for name in sorted(batch)}
    kinds = [f"{name} {array.dtype.str} {array.shape[1:]}" for name, array in arrays.items()]
    header = hashlib.sha256("\n".join(kinds).encode())
    total = 0
    for row in range(len(next(iter(arrays.values())))):
        digest = header.copy()
        digest.update((first_row + row).to_bytes(8, "big"))
        for array in arrays.values():
            digest.update(array[row].tobytes())
        total += int.from_bytes(digest.digest(), "big")
    return total % _MODULUS


class Digest(NamedTuple):
    """A tensor's digest, still on the device."""

    value: jax.Array  # uint32 [2]
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        low, high = np.asarray(self.value).tolist()
        return f"{low:08x}{high:08x}"


def digest_of(leaves: Mapping[str, tuple[Any, tuple[int, ...]]]) -> dict[str, Digest]:
    """Digests of arrays, computed where they lie; returns before they are.

    Args:
        leaves: {name: (array, its canonical shape)}; what an array has past that shape is padding and does not count.
    """
    return {
        name: Digest(
            _lanes_of(tuple(shape), _replicated(array.sharding))(array), tuple(shape), str(array.dtype)
        )
        for name, (array, shape) in leaves.items()
    }


def as_texts(digests: Mapping[str, Digest]) -> dict[str, str]:
    """{name: hex}; waits for the devices."""
    return {name: str(digest) for name, digest in digests.items()}


def whole(digests: Mapping[str, str]) -> str:
    """One hash of all digests."""
    return hashlib.sha256("".join(f"{name} {text}\n" for name, text in digests.items()).encode()).hexdigest()


def differing(found: Mapping[str, str], wanted: Mapping[str, str] | None) -> list[str]:
    """Names whose digests differ, in order; none if nothing is wanted."""
    return [name for name in {**found, **(wanted or {})} if wanted and found.get(name) != wanted.get(name)]


def circumstances(mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """What bits may depend on though the results do not: where they differ, runs are compared within a tolerance.

    Args:
        mesh_shape: sizes of the mesh's axes by name; empty is one device.
    """
    device = jax.devices()[0]
    return {
        "mesh": {axis: size for axis, size in mesh_shape.items() if size > 1},
        "processes": jax.process_count(),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _replicated(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.lru_cache(maxsize=1024)
def _lanes_of(shape: tuple[int, ...], out_sharding: Any) -> Any:
    """A compiled function: array, of this shape or padded -> uint32 [2]."""

    def lanes(x: jax.Array) -> jax.Array:
        bits = _bits(x)
        true = (*shape, *bits.shape[x.ndim :])
        if bits.ndim == 0:
            bits, true = bits[None], (1,)
        place, inside, stride = jnp.uint32(0), None, 1
        for dim in reversed(range(bits.ndim)):
            index = lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
            place += index * jnp.uint32(stride * _SPREAD % 2**32)
            stride *= true[dim]
            if bits.shape[dim] > true[dim]:
                within = index < true[dim]
                inside = within if inside is None else inside & within
        # Bijective on the bits for each place: a change to one element always changes the first lane.
        mixed = (bits ^ place) * jnp.uint32(0x85EBCA6B)
        mixed ^= mixed >> 15
        second = mixed * jnp.uint32(0xC2B2AE35)
        second ^= second >> 13
        pair = (second, mixed * second)
        if inside is not None:
            pair = tuple(jnp.where(inside, lane, jnp.uint32(0)) for lane in pair)
        # Both lanes in one reduction, rows first: XLA on a CPU then reads once, with vectors and threads; two
        # plain sums over everything run at a twentieth of the speed.
        zeros = (jnp.uint32(0), jnp.uint32(0))
        rows = lax.reduce(pair, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), (bits.ndim - 1,))
        return jnp.stack([jnp.sum(row, dtype=jnp.uint32) for row in rows])

    return jax.jit(lanes, out_shardings=out_sharding)


_SPREAD = 0x9E3779B1  # odd: places below 2**32 stay apart


def _bits(x: jax.Array) -> jax.Array:
    """uint32, the same shape or, of eight-byte types, with one more dimension."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
