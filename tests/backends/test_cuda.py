# SPDX-License-Identifier: MIT
"""Buffers, streams, events and graphs of `cmfast.backends.cuda.runtime`, with copies as the work, without a library.

Each test runs on `host_cuda`, and with `pytest -m gpu` on an NVIDIA GPU with cuda-bindings.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cmfast.backends import DeviceTimes
from cmfast.backends.cuda import runtime as cuda
from cmfast.errors import BackendError, OutOfMemory, backend_error
from helpers.host_cuda import HostCuda

MIB = 2**20
Work = Callable[[], object]


def copying(runtime: Any, stream: cuda.Stream, source: cuda.Buffer, target: cuda.Buffer) -> Work:
    """Return work for the device: a copy from one buffer's device side to another's."""
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def work() -> None:
        cuda.call(runtime.cudaMemcpyAsync, target.device, source.device, source.size, kind, stream.handle)

    return work


def some(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def free_bytes(runtime: Any) -> int:
    free, _ = runtime.cudaMemGetInfo()[1:]
    return int(free)


def test_the_gpu_says_what_it_is(runtime: Any) -> None:
    gpu = cuda.open_gpu()
    major, minor = gpu.compute_capability.split(".")
    assert gpu.name
    assert int(major) > 0 <= int(minor)


def test_values_go_in_through_the_work_and_out(runtime: Any) -> None:
    stream, x, y = cuda.Stream(), cuda.Buffer((3, 5), np.float32), cuda.Buffer((3, 5), np.float32)
    work = copying(runtime, stream, x, y)
    results = [stream.run({"x": some(seed, 3, 5)}, {"x": x}, y, work) for seed in range(3)]
    for seed, result in enumerate(results):  # each is its own: the next call does not write into it
        np.testing.assert_array_equal(result, some(seed, 3, 5))
        assert result.flags.owndata


def test_several_inputs_of_other_types_arrive_each_at_its_place(runtime: Any) -> None:
    stream, y = cuda.Stream(), cuda.Buffer((4,), np.int64)
    inputs = {"noise": cuda.Buffer((2, 4), np.float32), "label": cuda.Buffer((4,), np.int64)}
    values = {"noise": some(0, 2, 4), "label": np.array([7, -1, 2**40, 0])}
    result: Any = stream.run(values, inputs, y, copying(runtime, stream, inputs["label"], y))
    np.testing.assert_array_equal(result, values["label"])
    other = cuda.Buffer((2, 4), np.float32)
    result = stream.run(values, inputs, other, copying(runtime, stream, inputs["noise"], other))
    np.testing.assert_array_equal(result, values["noise"])


def test_a_graph_replays_its_work_on_the_values_of_each_call(runtime: Any) -> None:
    stream = cuda.Stream()
    x, middle, y = (cuda.Buffer((16, 16), np.float32) for _ in range(3))
    first, second = copying(runtime, stream, x, middle), copying(runtime, stream, middle, y)

    def both() -> None:
        first()
        second()

    graph = stream.capture(both)
    y.host[...] = 0
    stream.to_device(y)
    stream.to_host(y)
    stream.wait()
    assert not y.host.any(), "the capture ran its work"
    for seed in (1, 2, 1):
        values = some(seed, 16, 16)
        result = stream.run({"x": values}, {"x": x}, y, lambda: stream.launch(graph))
        np.testing.assert_array_equal(result, values)
    graph.close()


def test_two_graphs_over_other_buffers_do_not_disturb_each_other(runtime: Any) -> None:
    stream, made = cuda.Stream(), {}
    for batch in (1, 3):
        x, y = cuda.Buffer((batch, 8), np.float32), cuda.Buffer((batch, 8), np.float32)
        made[batch] = x, y, stream.capture(copying(runtime, stream, x, y))
    for seed, batch in enumerate((1, 3, 1, 3)):
        x, y, graph = made[batch]
        values = some(seed, batch, 8)
        np.testing.assert_array_equal(stream.run({"x": values}, {"x": x}, y, lambda g=graph: stream.launch(g)), values)


def test_a_capture_that_is_broken_off_leaves_a_stream_that_works(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, x, y = cuda.Stream(), cuda.Buffer((4,), np.float32), cuda.Buffer((4,), np.float32)

    def breaks() -> None:
        copying(runtime, stream, x, y)()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream.capture(breaks)
    for place in ("cudaStreamBeginCapture", "cudaStreamEndCapture"):  # a Ctrl-C right after it began, or before its end
        real = getattr(runtime, place)

        def interrupted(*arguments: Any, real: Any = real, place: str = place) -> Any:
            monkeypatch.setattr(runtime, place, real)
            if place == "cudaStreamBeginCapture":
                real(*arguments)
            raise KeyboardInterrupt

        interrupted.__name__ = place
        monkeypatch.setattr(runtime, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.capture(copying(runtime, stream, x, y))
    if isinstance(runtime, HostCuda):
        assert not runtime.graphs
    work = copying(runtime, stream, x, y)
    np.testing.assert_array_equal(stream.run({"x": some(5, 4)}, {"x": x}, y, work), some(5, 4))


def test_garbage_is_not_collected_within_a_capture(runtime: Any) -> None:
    if not isinstance(runtime, HostCuda):
        pytest.skip("a GPU would end the capture")
    stream, box = cuda.Stream(), [cuda.Memory(8)]

    def work() -> None:
        cycle: list[Any] = [box.pop()]
        cycle.append(cycle)
        del cycle
        assert [[i] for i in range(1000)]

    before, threshold = gc.isenabled(), gc.get_threshold()
    gc.enable()
    gc.set_threshold(1)
    try:
        graph = stream.capture(work)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        (gc.enable if before else gc.disable)()
    graph.close()
    gc.collect()
    assert not runtime.memory


def test_the_times_of_a_call_are_those_of_its_three_parts(runtime: Any) -> None:
    numbers = 16 * MIB if not isinstance(runtime, HostCuda) else 1024
    stream, x, y = cuda.Stream(), cuda.Buffer((numbers,), np.float32), cuda.Buffer((numbers,), np.float32)
    work, values, times = copying(runtime, stream, x, y), {"x": some(0, numbers)}, list[DeviceTimes]()
    stream.run(values, {"x": x}, y, work)
    for _ in range(2):
        stream.run(values, {"x": x}, y, work, times)
    assert len(times) == 2
    for each in times:
        assert min(each.copy_in_ms, each.compute_ms, each.copy_out_ms) > 0
        assert 0 < each.enqueue_ms <= each.host_ms
        if not isinstance(runtime, HostCuda):  # whose events have another clock
            assert each.compute_ms < each.copy_in_ms, "a copy on the device is faster than one over the bus"
            assert each.copy_in_ms + each.compute_ms + each.copy_out_ms < 1.1 * each.host_ms + 0.1


def test_events_are_in_the_order_of_the_work(runtime: Any) -> None:
    stream, x = cuda.Stream(), cuda.Buffer((MIB,), np.float32)
    events = [stream.mark()]
    for _ in range(3):
        stream.to_device(x)
        events.append(stream.mark())
    stream.wait()
    found = stream.times_ms(events)
    assert len(found) == 3
    assert min(found) > 0


def test_memory_of_buffers_is_freed_by_close_and_with_the_last_reference(runtime: Any) -> None:
    cuda.Buffer((1,), np.float32).close()  # what CUDA allocates for itself, it has now
    size = 64 * MIB

    def close(buffers: list[cuda.Buffer]) -> None:
        buffers[0].close()

    def forget(buffers: list[cuda.Buffer]) -> None:
        buffers.clear()
        gc.collect()

    def taken_and_freed(free: Callable[[list[cuda.Buffer]], None]) -> bool:
        before = free_bytes(runtime)
        buffers = [cuda.Buffer((size // 4,), np.float32)]
        taken = before - free_bytes(runtime)
        free(buffers)
        return taken >= size and free_bytes(runtime) == before

    # The numbers are the card's, and other processes, such as other tests, may use it too: one of many tries is quiet.
    for free in (close, forget):
        assert any(taken_and_freed(free) for _ in range(200))


def test_what_cuda_refuses_is_one_line_and_the_stream_works_afterwards(runtime: Any) -> None:
    stream, x, y = cuda.Stream(), cuda.Buffer((4,), np.float32), cuda.Buffer((4,), np.float32)

    def nowhere() -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        cuda.call(runtime.cudaMemcpyAsync, 0, x.device, x.size, kind, stream.handle)

    with pytest.raises(BackendError, match="CUDA failed in cudaMemcpyAsync: invalid argument"):
        stream.run({"x": some(0, 4)}, {"x": x}, y, nowhere, [])
    work = copying(runtime, stream, x, y)
    np.testing.assert_array_equal(stream.run({"x": some(1, 4)}, {"x": x}, y, work), some(1, 4))


def test_more_memory_than_there_is_is_an_error_and_less_is_had_afterwards(runtime: Any) -> None:
    with pytest.raises(OutOfMemory, match="CUDA failed in cudaMalloc: out of memory"):
        cuda.Buffer((2**46,), np.float32)
    cuda.Buffer((4,), np.float32).close()


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("Failed to allocate memory for requested buffer of size 83886080", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("it failed; if memory is short, try a smaller batch: an illegal memory access was encountered", False),
    ],
)
def test_a_librarys_words_decide_whether_memory_was_short(said: str, short: bool) -> None:
    assert isinstance(backend_error(said), OutOfMemory) == short


def test_another_process_is_told_that_cuda_does_not_survive_a_fork() -> None:
    cuda.check_process(os.getpid(), "it")
    with pytest.raises(BackendError, match="it was opened before this process was forked"):
        cuda.check_process(os.getpid() + 1, "it")
