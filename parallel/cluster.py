"""Many processes as one program: finding the others, a roll call that names who is missing, and leaving together.

    parallel.initialize()        # before anything touches a device; alone, it does nothing
    mesh = parallel.make_mesh(...)   # over the devices of all processes

`jax.distributed` does the work. What it lacks is a start that explains itself: where a process never comes, the
others abort with a stack of C++ frames and no name. So process 0 first takes a roll call over plain sockets, on the
port that jax's coordinator will use right after.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import jax

_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_HELLO = "flaxtron"
_RETRY_SECONDS = 0.2
_NOTICE_SECONDS = 15.0  # after so long a wait, process 0 says whom it waits for
_MANNERS_SECONDS = 2.0  # what a connection has to say its name
_GRACE_SECONDS = 1.0  # process 0, which holds the coordinator, leaves last: what fails in all, all may say

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Cluster:
    """Where the processes meet, and which of them this is."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> None:
    """Joins the processes of a cluster, so that `jax.devices()` are the devices of all of them.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then from Open MPI,
    SLURM or the TPU pod that this process runs in. Without any of them, or as the only process, nothing happens; nor
    does a second call do anything.

    Args:
        coordinator_address: "host:port" of process 0, with a port that is free there.
        num_processes: how many there are; 1 runs alone, whatever the surroundings say.
        process_id: this one's number, from 0.
        timeout: seconds to wait for all of them.

    Raises:
        ValueError: values that do not go together, or a call after jax's first use of a device.
        OSError: some did not come, and every process that did names them; or process 0 cannot listen at its address.
    """
    if jax.distributed.is_initialized():
        return
    cluster = _find(coordinator_address, num_processes, process_id, timeout)
    if cluster is None or cluster.num_processes == 1:
        return
    if _backend_in_use():
        raise ValueError(
            f"parallel.initialize() comes too late to join {cluster.num_processes} processes: call it before the first "
            "use of a device, such as jax.devices()"
        )
    _roll_call(cluster, timeout)
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        cluster.coordinator_address,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(timeout)),
    )


@contextlib.contextmanager
def process_zero_first(name: str, timeout: float = 24 * 3600.0) -> Iterator[None]:
    """The others enter the block when process 0 has left it: for work whose result they find on a shared disk.

    Args:
        name: of the block, used once in a program.
        timeout: seconds that the others wait.
    """
    if jax.process_count() == 1:
        yield
        return
    from jax._src import distributed  # the coordinator's barrier: one over devices gives up too early

    def wait() -> None:
        client: Any = distributed.global_state.client
        client.wait_at_barrier(f"{_HELLO}/{name}", round(timeout * 1000))

    if jax.process_index() > 0:
        wait()
    try:
        yield
    finally:  # what fails here in process 0 will mostly fail in the others too: they shall say so
        if jax.process_index() == 0:
            wait()


def leave(exit_code: int) -> NoReturn:
    """Ends a process that failed, with what it has printed.

    As one of several it ends at once: the interpreter's own end would wait minutes for the others, and they wait for
    this one. They learn of it from the coordinator.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_GRACE_SECONDS)
        os._exit(exit_code)
    raise SystemExit(exit_code)


# --- finding the cluster


def _find(
    address: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> _Cluster | None:
    """The cluster that arguments, variables and launchers describe, checked; None runs alone."""
    address = address or os.environ.get(_ADDRESS) or None
    num_processes = _from_environment(_COUNT) if num_processes is None else num_processes
    process_id = _from_environment(_ID) if process_id is None else process_id
    local: list[int] | None = None
    if num_processes != 1 and None in (address, num_processes, process_id) and (launcher := _launcher()):
        num_processes = launcher.get_process_count() if num_processes is None else num_processes
        process_id = launcher.get_process_id() if process_id is None else process_id
        if address is None and num_processes != 1:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = launcher.get_coordinator_address(round(timeout), override_coordinator_port=port)
        # As jax does: where the launcher counts the processes of a host, each gets one GPU of it.
        index = None if "tpu" in launcher.name else launcher.get_local_process_id()
        local = None if index is None or os.environ.get("JAX_LOCAL_DEVICE_IDS") else [index]
    if num_processes == 1 and not process_id:
        return None
    given = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
    known = [f"{name}={value}" for name, value in given.items() if value is not None]
    if not known:
        return None
    if address is None or num_processes is None or process_id is None:
        unknown = [name for name, value in given.items() if value is None]
        raise ValueError(
            f"{', '.join(known)} without {' and '.join(unknown)}: outside of Open MPI, SLURM and TPU pods all three "
            f"are needed, as arguments or as {_ADDRESS}, {_COUNT} and {_ID}"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id} with num_processes={num_processes}: processes count from 0 to one below"
        )
    _host_and_port(address)
    return _Cluster(address, num_processes, process_id, local)


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: it is a whole number") from None


def _launcher() -> Any:
    """jax's own account of what started this process, or None.

    Kubernetes is left out: a pod need not be one of several, and whoever starts several can set the variables.
    """
    from jax._src import clusters

    kinds = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def _backend_in_use() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator_address={address!r}: write it as HOST:PORT, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


# --- the roll call: each process says its number to process 0, which answers all of them when it knows


def _roll_call(cluster: _Cluster, timeout: float) -> None:
    """Returns when all processes are there.

    Raises:
        ConnectionError: some are not, two say the same number, or they count differently.
    """
    part = _call if cluster.process_id == 0 else _answer
    if wrong := part(cluster, time.monotonic() + timeout, timeout):
        raise ConnectionError(wrong)


def _call(cluster: _Cluster, deadline: float, timeout: float) -> str:
    """Process 0's part: what is wrong, or "" if all have come."""
    came: dict[int, socket.socket] = {}
    wrong, notice = "", time.monotonic() + _NOTICE_SECONDS
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(_listen(cluster))
        while not wrong and len(came) < cluster.num_processes - 1:
            missing = [i for i in range(1, cluster.num_processes) if i not in came]
            now = time.monotonic()
            if now >= deadline:
                wrong = _missing(missing, cluster, timeout)
                break
            if now >= notice:
                notice = float("inf")
                _log.warning("waiting for %s of %d", _processes(missing), cluster.num_processes)
            door.settimeout(min(deadline, notice) - now)
            try:
                guest = stack.enter_context(door.accept()[0])
                guest.settimeout(_MANNERS_SECONDS)
                hello, number, count = guest.makefile().readline(64).split()
                number, count = int(number), int(count)
            except (OSError, ValueError):  # nobody came yet, or somebody who is none of us
                continue
            if hello != _HELLO:
                continue
            if count != cluster.num_processes:
                wrong = (
                    f"process {number} counts num_processes={count}, process 0 counts {cluster.num_processes}"
                )
            elif not 0 < number < count or (number in came and not _hung_up(came[number])):
                wrong = f"process_id={number} is taken: two processes say that they are process {number}"
            came[-1 if wrong else number] = guest
        for guest in came.values():
            with contextlib.suppress(OSError):  # gone again: jax's own start will notice
                guest.sendall(f"{wrong}\n".encode())
    return wrong


def _answer(cluster: _Cluster, deadline: float, timeout: float) -> str:
    """The others' part: what process 0 says is wrong."""
    host, port = _host_and_port(cluster.coordinator_address)
    while True:
        try:
            with socket.create_connection(
                (host, port), timeout=max(deadline - time.monotonic(), _RETRY_SECONDS)
            ) as line:
                line.sendall(f"{_HELLO} {cluster.process_id} {cluster.num_processes}\n".encode())
                # Process 0 may have begun to wait later than this one, by no more than this one would have waited.
                line.settimeout(timeout + max(deadline - time.monotonic(), 0))
                verdict = line.makefile().readline()
            if verdict:
                return verdict.strip()
        except OSError:
            pass
        # Nobody listens yet, or process 0 went away before it had seen all: another may be started in its place.
        if time.monotonic() >= deadline:
            return _missing([0], cluster, timeout)
        time.sleep(_RETRY_SECONDS)


def _hung_up(line: socket.socket) -> bool:
    """Whether the other end is gone, as that of a process which was started anew."""
    line.setblocking(False)
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        line.settimeout(_MANNERS_SECONDS)


def _listen(cluster: _Cluster) -> socket.socket:
    _, port = _host_and_port(cluster.coordinator_address)
    host, port = _host_and_port(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{port}")
    both = host == "::" and socket.has_dualstack_ipv6()
    host = "" if host == "::" else host
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, dualstack_ipv6=both, backlog=max(128, cluster.num_processes)
        )
    except OSError as error:
        raise OSError(
            f"coordinator_address={cluster.coordinator_address}: process 0 cannot listen on port {port}: "
            f"{error.strerror}: choose another port"
        ) from None


def _missing(numbers: list[int], cluster: _Cluster, timeout: float) -> str:
    verb = "is" if len(numbers) == 1 else "are"
    return (
        f"{_processes(numbers)} of {cluster.num_processes} {verb} missing: not at {cluster.coordinator_address} within "
        f"{timeout:g} s (num_processes=1 runs alone)"
    )


def _processes(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
