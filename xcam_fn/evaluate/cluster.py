"""Batches computed by the actors of a Ray cluster, their results streamed to this process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from xcam_fn.evaluate.batch import Plan, Row, Task, read, rows_of
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.items import Images, Items
from xcam_fn.evaluate.seen import reason
from xcam_fn.evaluate.shards import hardware
from xcam_fn.evaluate.store import ImageRow

Computed = Generator[tuple[Task, Iterable[Row]]]
Noted = Callable[[Sequence[Mapping[str, Any]]], None]

LOCAL = "local"
_LOOPBACK = "127.0.0.1"
_SECONDS = 10  # that a cluster has to answer in
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"  # of HTTP/2, with no settings
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_gcs_server_request_timeout_seconds": str(_SECONDS),
}
_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # without it, Ray puts loopback addresses aside


def prepared(
    plan: Plan, images: Images | Iterator[Photograph], address: str, versions: Mapping[str, str]
) -> Callable[[Iterable[Task], Noted], Computed]:
    """A function from batches to what is found of each; raises where actors cannot compute a run.

    Args:
        plan: how each batch is computed.
        images: all of them.
        address: of a cluster, or "local".
        versions: of the packages that numbers depend on, which each machine has to have.
    """
    host, _, port = address.rpartition(":")
    if address not in (LOCAL, "auto") and not (host and port.isdigit() and "/" not in host):
        raise ValueError(f"ray={address!r}: expected HOST:PORT of a cluster, 'auto', or 'local'")
    if not isinstance(images, Sequence):
        wanted = "a map-style data set, a folder or a CSV file"
        raise ValueError(f"ray: the data set can only be read in order; expected {wanted}, or use shards")
    with _environment(address):
        cloudpickle = _imported().cloudpickle
    data = images if isinstance(images, Items) else None
    for name, part in (("network", plan.network), ("methods", dict(plan.methods)), ("photographs", data)):
        try:
            cloudpickle.dumps(part)
        except Exception as error:
            words = " ".join(str(error).split())
            remedy = "Ray sends it to other processes; make it picklable"
            raise TypeError(f"{name} cannot be pickled ({words}); {remedy}") from None
    packed = cloudpickle.dumps((plan, data, dict(versions)))
    return functools.partial(_computed, plan, packed, address, data is None)


def _computed(
    plan: Plan, packed: bytes, address: str, whole: bool, tasks: Iterable[Task], noted: Noted
) -> Computed:
    """What is found of each batch, as it comes.

    A batch may be computed more than once, where an actor or a machine was lost, and is the same each time.

    Args:
        plan: how each batch is computed.
        packed: what each actor is made of.
        address: of a cluster, or "local".
        whole: whether batches are sent with their images, which the actors do not have.
        tasks: the batches.
        noted: called with each machine that computes.
    """
    pending = {task.start: task for task in tasks}
    if not pending:
        return
    machines: list[Mapping[str, Any]] = []
    with connected(address) as ray:
        for start, rows, machine, where in _streamed(ray, plan, ray.put(packed), pending, whole=whole):
            if isinstance(rows, Exception):
                raise rows
            _check_seen_here(plan, pending[start], rows, where)
            if machine not in machines:
                machines.append(machine)
                noted([machine])
            yield pending[start], rows


def _streamed(
    ray: Any, plan: Plan, packed: Any, pending: Mapping[int, Task], *, whole: bool
) -> Iterator[tuple[int, list[Row] | Exception, dict[str, Any], str]]:
    """What the actors return: the batch, its rows or the error that ends the run, the machine."""
    threads, is_cuda = torch.get_num_threads(), plan.network.device.type == "cuda"
    actors = _actors(ray, threads, is_cuda)
    rows = [{"task": pickle.dumps(task if whole else task._replace(images=()))} for task in pending.values()]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    with _silent("ray.data"), ray.data.DataContext.current(context):
        # A block a batch: actors take the next when they have done one, and each result comes at once.
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor,
            fn_constructor_args=(packed, threads),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=threads,
            num_gpus=int(is_cuda),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        )
        for batch in found.iter_batches(batch_size=1, batch_format="pyarrow"):
            yield pickle.loads(batch["found"][0].as_py())


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Leave out what a logger would print: this process has a progress bar and errors of its own."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class Actor:
    """Computes batches: the network is loaded once."""

    def __init__(self, packed: Any, threads: int) -> None:
        ray = importlib.import_module("ray")
        torch.set_num_threads(threads)
        self._plan, self._data, versions = ray.cloudpickle.loads(ray.get(packed))
        self._machine = hardware([self._plan.network.device])
        self._where = socket.gethostname()
        self._differing = _differing(versions)

    def __call__(self, batch: Any) -> Any:
        pyarrow = importlib.import_module("pyarrow")
        task = pickle.loads(batch["task"][0].as_py())
        if self._data is not None:
            task = task._replace(images=self._data[task.start :])
        rows: list[Row] | Exception
        try:
            if self._differing:
                raise ValueError(f"ray: machine {self._where} has {self._differing}")  # noqa: TRY301
            rows = list(rows_of(self._plan, task, read(self._plan, task)))
        except Exception as error:  # it ends the run, where it is read; raised here, Ray would try again
            kinds = (kind for kind in (ValueError, TypeError, OSError) if isinstance(error, kind))
            rows = next(kinds, RuntimeError)(reason(error))
        found = pickle.dumps((task.start, rows, self._machine, self._where))
        return pyarrow.table({"found": pyarrow.array([found], pyarrow.binary())})


def _differing(versions: Mapping[str, str]) -> str:
    """Which packages are other ones on this machine, in words."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    there = {package: installed(package) for package in versions}
    others = [package for package, wanted in versions.items() if there[package] != wanted]
    return "; ".join(f"{package} {there[package]}; expected {versions[package]}" for package in others)


def _check_seen_here(plan: Plan, task: Task, rows: Sequence[Row], where: str) -> None:
    """Raise where a machine cannot read a photograph that this one can."""
    for row in rows:
        if isinstance(row, ImageRow) and row.error is not None:
            number = row.number // plan.cells
            (found,) = read(plan, task._replace(numbers=[number]))
            if found.x is not None:
                remedy = "put the data set at the same path on every machine"
                found = f"machine {where} cannot read {row.name!r} ({row.error}), but this one can"
                raise ValueError(f"ray: {found}; {remedy}")


def _actors(ray: Any, threads: int, is_cuda: bool) -> int:
    """How many actors the machines of the cluster have room for."""
    counts = []
    for node in (node["Resources"] for node in ray.nodes() if node["Alive"]):
        room = int(node.get("CPU", 0)) // threads
        counts.append(min(room, int(node.get("GPU", 0))) if is_cuda else room)
    if not sum(counts):
        wanted = f"{threads} CPUs{' and a GPU' if is_cuda else ''}"
        remedy = "set OMP_NUM_THREADS to the number of CPUs per actor"
        raise ValueError(f"ray: no machine of the cluster has {wanted}; {remedy}")
    return sum(counts)


# -- the cluster --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here is stopped.

    A connection that the process has already is used as it is.
    """
    with _environment(address), contextlib.ExitStack() as stack:
        ray = _imported()
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            _start(ray, address)
        yield ray


@contextlib.contextmanager
def _environment(address: str) -> Iterator[None]:
    """The variables that Ray reads when it is imported, and hands on to the processes that it starts."""
    wanted = _QUIET | (_ONE_MACHINE if address == LOCAL else {})
    kept = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _imported() -> Any:
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ValueError(f'ray is not installed ({error}); pip install "xcam-fn[ray]"') from None
    return ray


def _check_answers(address: str) -> None:
    """Raise where no gRPC server, as Ray's is, answers in time: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_SECONDS) as server:
        if os.environ.get("RAY_USE_TLS") != "1":
            server.sendall(_HELLO)
            if server.recv(9)[3:4] != b"\x04":  # a frame of settings comes first
                raise OSError("the server there is not Ray")


def _start(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        if (found := ray.util.get_node_ip_address()) != _LOOPBACK:
            remedy = "run it in a new process, before Ray is imported, or start a cluster"
            raise ValueError(f"ray: the cluster would listen at {found}, not on this machine alone; {remedy}")
        ray.init(include_dashboard=False, _node_ip_address=_LOOPBACK, **quiet)
        return
    try:
        if address != "auto":
            _check_answers(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())
        remedy = "start one with `ray start --head`, or use the address 'local'"
        raise ConnectionError(f"ray: there is no cluster at {address!r} ({words}); {remedy}") from None
