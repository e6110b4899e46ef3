# SPDX-License-Identifier: MIT
"""Shards drawn on a Ray cluster: an actor a device, each with the model open; Ray schedules, restarts and retries.

    files = read_model(path)
    draw_shards(described(files, path), files_sha256(files), request, folder, OnRay("local", files, how))

The model travels as bytes through Ray's object store, so workers need no shared disk; samples come back the same way,
and the process that asked for them writes the shards. Ray is imported here and nowhere else.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmfast
from cmfast.checks import shown
from cmfast.errors import BackendError, CmfastError, MissingDependency, one_line
from cmfast.model import Model
from cmfast.shards.drawing import Part, ShardRequest
from cmfast.shards.files import Array
from cmfast.shards.sent import Files, How, open_model

Reference = list[Any]  # of one: to `Files` in Ray's object store; in a list Ray passes it on instead of the bytes
LOCAL = "local"
_HOST = re.compile(r"(?:ray://)?\[?([^\[\]/]+)\]?:([0-9]{1,5})")
RESTARTS = 10  # of one worker, by Ray; then the run ends: a shard may kill whatever draws it. Those that are there stay
RETRIES = -1  # of one call, by Ray, while there are restarts: those to a lost machine fail by the second for a while
ANSWER_S = 5.0  # an address that does not answer by then is refused; Ray itself tries for minutes


class OnRay:
    """What draws shards on a Ray cluster, a `cmfast.shards.drawing.Drawer`: the cluster is needed while it draws.

    This process must not use Ray for anything else meanwhile. Ray prints what it says about lost workers to stdout.
    """

    def __init__(self, address: str, files: Files, how: How) -> None:
        """Remember what is needed; nothing is started before shards are missing.

        Args:
            address: "local": a cluster of this machine's cores while it draws; else that of a cluster which is there:
                "auto", HOST:PORT or ray://HOST:PORT.
            files: Of the model, from `read_model`.
            how: How a worker opens it: with `device` cuda a GPU each, else so many cores as `threads`.

        Raises:
            MissingDependency: Ray is not installed.
            BackendError: Nothing answers at the address.
        """
        _need_answer(address)
        _import_ray()
        self._address, self._files, self._how = address, files, how
        self.name = f"Ray at {address}"

    def draw(self, request: ShardRequest, parts: Sequence[Part]) -> Generator[tuple[range, Array]]:
        """Yield the samples of each part when they are drawn.

        Args:
            request: What is drawn, without its conditions.
            parts: Indices of samples, and the conditions of these.

        Yields:
            The indices of a part, and its samples: uint8 [n, H, W, C] or float32 [n, *shape].
        """
        with workers_on(self._address, self._files, self._how) as workers:
            workers.wait()
            self.name = workers.name
            yield from workers.draw(request, parts)


@contextmanager
def workers_on(address: str, files: Files, how: How) -> Iterator[Workers]:
    """Give a worker on each device of a cluster while the block runs.

    Args:
        address: "local": a cluster of this machine's cores, for the block only; else that of a cluster which is there,
            as Ray takes it: "auto", HOST:PORT or ray://HOST:PORT.
        files: Of the model, `cmfast.shards.sent.read_model`.
        how: How a worker opens it: with `device` cuda a GPU each, else so many cores as `threads`.

    Raises:
        MissingDependency: Ray is not installed.
        BackendError: there is no cluster at the address, it has no such devices, or this process uses Ray already.
    """
    _need_answer(address)
    ray = _import_ray()
    if ray.is_initialized():  # a process has one session, and that one is not ours to end
        raise BackendError("this process uses Ray already; call ray.shutdown() first, or draw in a process of its own")
    more = {"include_dashboard": False} if address == LOCAL else {}
    try:
        with _in_one_line(ray):
            try:
                ray.init(address, log_to_driver=False, logging_level="error", **more)
            except (ConnectionError, RuntimeError, ValueError) as err:  # none there, another version, no address
                hint = "" if address == LOCAL else "; one that wants a token: RAY_AUTH_MODE=token"
                raise BackendError(f"no Ray cluster at {shown(address)}: {one_line(err)}{hint}") from None
            yield Workers(ray, _actors(ray, address, how), [ray.put(dict(files))])
    finally:
        ray.shutdown()


class Worker:
    """What runs in an actor: the model, opened when it is first needed, also after a restart, by one version of cmfast.

    The version is checked here: each worker may be on a machine of its own, and a restarted one on another.
    """

    def __init__(self, how: How, version: str) -> None:
        self._how, self._version = how, version
        self._model: Model | None = None

    def about(self, model: Reference) -> str:
        """Return the backend in words."""
        return self._open(model).backend.name

    def draw(
        self, model: Reference, request: ShardRequest, start: int, stop: int, conditions: Mapping[str, Any]
    ) -> tuple[int, int, Array]:
        """Return `start`, `stop` and the samples from one to before the other."""
        return start, stop, request.draw(self._open(model), range(start, stop), conditions)

    def _open(self, model: Reference) -> Model:
        if self._version != cmfast.__version__:
            raise BackendError(
                f"a worker on {socket.gethostname()} has cmfast {cmfast.__version__}, and the machine that asks "
                f"{self._version}: install one version on all machines"
            )
        if self._model is None:
            files: Files = _import_ray().get(model[0])
            self._model = open_model(files, self._how)
        return self._model


class Workers:
    """The workers of a cluster that is there: a `cmfast.shards.drawing.Drawer` for one draw."""

    def __init__(self, ray: Any, actors: list[Any], model: Reference) -> None:
        self._ray, self.actors, self._model = ray, actors, model
        self.name = f"{len(actors)} Ray worker(s)"

    def wait(self, number: int = 1) -> None:
        """Wait until so many workers have opened the model.

        Raises:
            CmfastError: the model cannot be opened there, or a worker has another version of cmfast.
        """
        ready, _ = self._ray.wait([actor.about.remote(self._model) for actor in self.actors], num_returns=number)
        about: list[str] = self._ray.get(ready)
        self.name = f"{about[0]} on {len(self.actors)} Ray worker(s)"

    def draw(self, request: ShardRequest, parts: Sequence[Part]) -> Generator[tuple[range, Array]]:
        """Yield the samples of each part when they are drawn."""
        from ray.util import ActorPool

        pool, common = ActorPool(self.actors), self._ray.put(replace(request, conditions={}))
        self.actors = []  # the pool alone keeps them

        def submit(worker: Any, part: Part) -> Any:
            samples, conditions = part
            return worker.draw.remote(self._model, common, samples.start, samples.stop, conditions)

        for part in parts:
            pool.submit(submit, part)
        while pool.has_next():
            start, stop, drawn = pool.get_next_unordered()
            yield range(start, stop), drawn
            # A worker without work gives its device back: one whose machine is gone is started again there.
            while pool.pop_idle() is not None:
                pass


def _actors(ray: Any, address: str, how: How) -> list[Any]:
    """Return an actor for each device of the cluster."""
    of_gpu, cores = how.device == "cuda", how.threads or 1
    there = ray.cluster_resources()
    number = int(there.get("GPU", 0)) if of_gpu else int(there.get("CPU", 0)) // cores
    if number < 1:
        need = "a GPU" if of_gpu else f"{cores} core(s)"
        have = f"{there.get('CPU', 0):g} core(s) and {there.get('GPU', 0):g} GPU(s)"
        where = "this machine" if address == LOCAL else f"the Ray cluster at {address}"
        raise BackendError(f"{where} has {have}, and a worker needs {need}")
    device = {"num_cpus": 0, "num_gpus": 1} if of_gpu else {"num_cpus": cores, "num_gpus": 0}
    actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RETRIES, **device)(Worker)
    return [actor.remote(how, cmfast.__version__) for _ in range(number)]


@contextmanager
def _in_one_line(ray: Any) -> Iterator[None]:
    """Let errors of ours that a worker raised be what they were, and errors of Ray one line."""
    try:
        yield
    except ray.exceptions.RayTaskError as err:
        if isinstance(err.cause, CmfastError):
            raise err.cause from None
        raise
    except ray.exceptions.RayError as err:
        said = str(err)
        if "No module named 'cmfast" in said:
            raise BackendError("a worker has no cmfast; install it on all machines of the Ray cluster") from None
        lines = [line for line in said.splitlines() if line.strip()]
        why = lines[0] if len(lines) < 2 else f"{lines[0]} .. {lines[-1]}"
        raise BackendError(
            f"a worker on the Ray cluster failed too often: {one_line(why)}; the shards that are there are whole, and "
            "the same command draws the others"
        ) from None


def _import_ray() -> Any:
    # Nothing is sent without being asked for. Ray reads it when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingDependency("--ray", "ray", "ray") from None
    return ray


def _need_answer(address: str) -> None:
    """Raise BackendError unless something listens at HOST:PORT or ray://HOST:PORT, also where "auto" finds that."""
    found = _HOST.fullmatch(_current_cluster() if address == "auto" else address)
    if not found:
        if address not in (LOCAL, "auto"):
            raise CmfastError(f"--ray takes local, auto, HOST:PORT or ray://HOST:PORT, got {shown(address)}")
        return
    try:
        socket.create_connection((found[1], int(found[2])), ANSWER_S).close()
    except (OSError, OverflowError, UnicodeError) as err:
        why = getattr(err, "strerror", None) or one_line(err)
        raise BackendError(f"no Ray cluster answers at {found[0]}: {why}; start one: ray start --head") from None


def _current_cluster() -> str:
    """Return what Ray takes "auto" for: RAY_ADDRESS, else what `ray start` wrote on this machine; "": unknown."""
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    try:
        return Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster").read_text().strip()
    except (OSError, ValueError):
        return ""
