"""Hashes of batches do not know how many processes read them, and digests of a state not where it lies."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import parallel
from train import certificate
from train.certificate import HashedBatches, sum_of_rows


class Counting:
    """A source whose batch of step n holds rows 10 n, 10 n + 1, ..."""

    def __init__(self, rows=slice(None)):
        self.step, self.rows = 0, rows

    def __next__(self):
        ids = (10 * self.step + np.arange(8, dtype=np.int32))[:, None] + np.zeros((8, 3), np.int32)
        self.step += 1
        return {"labels": ids[self.rows] * 2, "input_ids": ids[self.rows]}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def take(batches, count):
    for _ in range(count):
        next(batches)
    return batches.certify()


def test_a_hash_is_the_sum_of_its_rows():
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    header = b"input_ids <i4 (3,)"
    rows = [hashlib.sha256(hashlib.sha256(header).digest()) for _ in ids]
    whole = sum_of_rows({"input_ids": ids}, 0)
    parts = sum_of_rows({"input_ids": ids[:1]}, 0) + sum_of_rows({"input_ids": ids[1:]}, 1)
    direct = sum(
        int.from_bytes(hashlib.sha256(header + i.to_bytes(8, "big") + ids[i].tobytes()).digest(), "big")
        for i in range(len(rows))
    )
    assert whole == parts % 2**256 == direct % 2**256


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[::-1],
        lambda ids: ids + np.eye(8, 3, dtype=np.int32),
        lambda ids: ids.astype(np.int64),
        lambda ids: ids[:, :2],
    ],
)
def test_every_change_shows(change):
    ids = np.arange(24, dtype=np.int32).reshape(8, 3)
    assert sum_of_rows({"input_ids": ids}, 0) != sum_of_rows({"input_ids": change(ids)}, 0)
    assert sum_of_rows({"input_ids": ids}, 0) != sum_of_rows({"labels": ids}, 0)


def test_the_chain_goes_on_where_it_was():
    batches = HashedBatches(Counting())
    first, state = take(batches, 3), batches.get_state()
    last = take(batches, 2)
    assert (first["first"], len(first["hashes"]), last["first"], len(last["hashes"])) == (1, 3, 4, 2)

    resumed = HashedBatches(Counting())
    resumed.set_state(state, 3, {"batches": first})
    assert take(resumed, 2) == last
    assert take(HashedBatches(Counting()), 5)["chain"] == last["chain"]


def test_what_was_taken_back_was_never_there():
    batches = HashedBatches(Counting())
    for _ in range(5):
        next(batches)
    batches.take_back(3)
    assert batches.certify() == take(HashedBatches(Counting()), 3)


@pytest.fixture
def two_processes(monkeypatch):
    """Makes certify() believe that `other` is the second process's share."""

    def pretend(mine, other):
        answers = iter([np.array([mine._shard[0], other._shard[0]]), None])

        def gather(value):
            answer = next(answers)
            sums = np.array([list(s.to_bytes(32, "big")) for s in other._sums], np.uint8).reshape(-1, 32)
            return np.stack([value, sums]) if answer is None else answer

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(certificate.multihost_utils, "process_allgather", gather)
        return mine

    return pretend


def test_two_processes_certify_what_one_does(two_processes):
    low, high = HashedBatches(Counting(slice(0, 4)), (0, 2)), HashedBatches(Counting(slice(4, 8)), (1, 2))
    alone = take(HashedBatches(Counting()), 3)
    for _ in range(3):
        next(high)
    assert take(two_processes(low, high), 3) == alone


def test_processes_that_share_rows_have_to_agree(two_processes):
    mine, other = HashedBatches(Counting()), HashedBatches(Counting())
    other.set_state({"step": 1}, 0)
    for _ in range(2):
        next(other)
    with pytest.raises(
        ValueError, match="step 1: processes 0 and 1 read part 0 of the batch and do not read"
    ):
        take(two_processes(mine, other), 2)


def digest(array, shape=None):
    return str(certificate.digest_of({"x": (array, shape or array.shape)})["x"])


def test_a_digest_does_not_know_the_mesh():
    values = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    alone = digest(jnp.asarray(values))
    mesh = parallel.make_mesh(data=2, fsdp=4)
    axes = mesh.axis_names
    for spec in (PartitionSpec(None, axes[1:3]), PartitionSpec(axes[1], axes[2])):
        assert digest(jax.device_put(values, NamedSharding(mesh, spec))) == alone
    padded = jnp.pad(jnp.asarray(values), ((0, 2), (0, 0)), constant_values=7.0)
    assert digest(padded, (6, 16)) == alone


@pytest.mark.parametrize(
    "values",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(5, dtype=np.int32),
        np.float32(3.0),
        jnp.arange(6, dtype=jnp.bfloat16),
        np.array([True, False, True]),
    ],
    ids=lambda value: str(value.dtype),
)
def test_one_bit_shows_in_a_digest(values):
    before = np.asarray(values)
    raw = bytearray(before.tobytes())
    raw[-before.dtype.itemsize] ^= 1
    after = np.frombuffer(bytes(raw), before.dtype).reshape(before.shape)
    assert digest(jnp.asarray(before)) != digest(jnp.asarray(after))


def test_an_order_shows_in_a_digest():
    values = jnp.arange(12.0).reshape(3, 4)
    assert len({digest(values), digest(values[::-1]), digest(values[:, ::-1])}) == 3
    assert digest(jnp.array([0.0])) != digest(jnp.array([-0.0]))


def test_differing_names_are_listed_in_order():
    found = {"a": "1", "b": "2", "c": "3"}
    assert certificate.differing(found, {"a": "1", "b": "0", "d": "4"}) == ["b", "c", "d"]
    assert certificate.differing(found, None) == []
    assert certificate.whole(found) != certificate.whole({**found, "c": "4"})


def test_circumstances_leave_out_axes_of_one():
    found = certificate.circumstances({"data": 2, "fsdp": 1})
    assert found["mesh"] == {"data": 2}
    assert found["processes"] == 1
    assert found["jax"] == jax.__version__
