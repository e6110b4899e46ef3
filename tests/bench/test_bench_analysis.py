# SPDX-License-Identifier: MIT
"""Why a contender of cmfast-bench takes its time: costs, the roofline, times on a GPU, and the words for them.

The GPU here is a backend with made-up times: what is tested is what the command makes of them.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import cmfast.backends
from cmfast.backends import DeviceTimes, TimedBackend
from cmfast.bench import diagnosis as analysis
from cmfast.bench import probe, starts, timing
from cmfast.bench.contenders import Contender, Job
from cmfast.bench.diagnosis import DEVICE_CALLS, DEVICE_FEW, DeviceMedians, costs, device_times, diagnose
from cmfast.bench.record import Start
from cmfast.bench.roofline import Ceilings, Floor
from cmfast.cli import bench
from cmfast.errors import BackendError, backend_error
from cmfast.formats.manifest import Manifest
from cmfast.model import Model
from helpers.specs import image_spec

Factory = Callable[..., Path]
QUICK = ("--seconds", 0.05)
COST = {"flops": 3_000_000, "weight_bytes": 40_000, "activation_bytes": 10_000}
H100 = Ceilings(device="cuda", dtype="float16", flops_per_s=660e12, bytes_per_s=3e12, how="by hand")
TIMES = DeviceTimes(host_ms=10, enqueue_ms=1, copy_in_ms=0.5, compute_ms=8, copy_out_ms=0.25)


class FakeGpu:
    """The denoiser 0.01 x, whose times were made up: the first runs are slow, and every third after them."""

    def __init__(self, manifest: Manifest, name: str = "Fake cuda", times: DeviceTimes = TIMES) -> None:
        self.manifest, self.name, self.batch = manifest, name, None
        self._base, self._times, self._runs = times, None, 0

    def run(self, inputs: Any) -> Any:
        self._runs += 1
        if self._times is not None:
            slow = 100 if self._runs % 3 == 0 else 1
            self._times.append(DeviceTimes(**{name: slow * ms for name, ms in asdict(self._base).items()}))
        return np.float32(0.01) * inputs["x"]

    @contextmanager
    def timed(self) -> Iterator[list[DeviceTimes]]:
        self._times = []
        try:
            yield self._times
        finally:
            self._times = None


def manifest(kind: str = "denoiser", dtype: str = "float32", sha256: str = "", **values: Any) -> Manifest:
    spec = image_spec(image=(1, 8, 8))
    spec = spec if kind == "denoiser" else replace(spec, sigmas={2: (80.0, 0.8)})
    return Manifest(kind=kind, spec=spec, dtype=dtype, source={"sha256": sha256} if sha256 else {}, **values)


# Words.


def floor(bound: str, flops: float = 0, moved: float = 0) -> Floor:
    return Floor(ms=1, bound=bound, flops=flops, bytes=moved)


@pytest.mark.parametrize(
    ("times", "work", "words"),
    [
        (replace(TIMES, enqueue_ms=7.3), floor("compute", 1e12),
         "launch-bound: the host needs 7.3 ms to launch 8 ms of work; a CUDA graph would help"),
        (replace(TIMES, enqueue_ms=6.4), floor("compute", 3.296e12),  # 0.8 of the work is allowed
         "compute-bound: 62 % of the measured matrix rate (412 of 660 TFLOP/s)"),
        (replace(TIMES, enqueue_ms=9, copy_in_ms=7, copy_out_ms=2), floor("compute", 1e12),
         "transfer-bound: 9 ms of copies for 8 ms of work on the GPU"),
        (TIMES, floor("memory", 1e9, 12e9), "memory-bound: 50 % of the measured bandwidth (1.5 of 3 TB/s)"),
        (TIMES, floor("memory", 1e9, 36e9),
         "memory-bound: above the measured bandwidth (4.5 of 3 TB/s): caches hold part of it"),
        (TIMES, floor("compute", 6e12), "compute-bound: above the measured matrix rate (750 of 660 TFLOP/s): fewer "
         "multiplications than counted (Winograd), or the ceiling was measured on a busy machine"),
        (TIMES, floor("compute", 0.264e12), "far from the roofline: 5.0 % of the measured matrix rate (33 of 660 "
         "TFLOP/s); small or slow kernels and overhead take the time"),
        (TIMES, None, "bound by the GPU, at work for 8 of 10 ms; no roofline is known"),
        (None, None, ""),
        (None, floor("compute", 4.12e12), "compute-bound: 62 % of the measured matrix rate (412 of 660 TFLOP/s)"),
    ],
)  # fmt: skip
def test_the_diagnosis_names_what_takes_the_time_and_its_numbers(
    times: DeviceTimes | None, work: Floor | None, words: str
) -> None:
    assert diagnose(10, times, work, H100) == words


def test_a_graph_that_is_replayed_is_not_advised_to_become_one() -> None:
    times = replace(TIMES, enqueue_ms=9)
    found = diagnose(10, times, floor("compute", 3.296e12), H100, replayed=True)
    assert found == "compute-bound: 62 % of the measured matrix rate (412 of 660 TFLOP/s)"


def test_without_a_measured_ceiling_there_is_no_fraction() -> None:
    unknown = replace(H100, flops_per_s=None)
    assert diagnose(10, None, None, unknown) == ""
    assert diagnose(10, TIMES, floor("compute", 1), unknown).endswith("no roofline is known")


def test_machines_are_described_in_units_of_their_size() -> None:
    large = replace(H100, flops_per_s=2e15)
    words = "compute-bound: 62 % of the measured matrix rate (1.24 of 2 PFLOP/s)"
    assert diagnose(1, None, floor("compute", 1.24e12), large) == words
    slow = Ceilings(device="cpu", dtype="float32", flops_per_s=155e9, bytes_per_s=20e9, how="")
    words = "compute-bound: 62 % of the measured matrix rate (96 of 155 GFLOP/s)"
    assert diagnose(100, None, floor("compute", 9.6e9), slow) == words


# Times on the device.


def test_device_times_are_medians_of_twenty_calls_and_a_call_is_all_its_runs() -> None:
    backend = FakeGpu(manifest())
    assert isinstance(backend, TimedBackend)
    x = np.ones((1, 1, 8, 8), np.float32)
    calls = 0

    def two_steps() -> None:
        nonlocal calls
        calls += 1
        for _ in range(2):
            backend.run({"x": x})

    # Of three calls, two hold a run that is a hundred times slower: the median is 101 runs' time.
    found = device_times(backend, two_steps)
    assert calls == DEVICE_CALLS + 1 >= 21
    assert found.calls == DEVICE_CALLS
    assert asdict(found) == pytest.approx(
        {name: 101 * ms for name, ms in asdict(TIMES).items()} | {"calls": DEVICE_CALLS}
    )
    one = device_times(backend, lambda: backend.run({"x": x}))
    assert one == DeviceMedians(**asdict(TIMES), calls=DEVICE_CALLS), "a rare slow run does not move the median"


def test_slow_calls_are_asked_a_few_times_only() -> None:
    backend, x = FakeGpu(manifest()), np.ones((1, 1, 8, 8), np.float32)
    assert device_times(backend, lambda: backend.run({"x": x}), seconds=0).calls == DEVICE_FEW


def test_a_backend_that_keeps_its_times_to_itself_is_an_error() -> None:
    with pytest.raises(BackendError, match="promised the times of its calls and gave none"):
        device_times(FakeGpu(manifest()), lambda: None)


# Costs.


def contenders(*manifests: Manifest) -> list[Contender]:
    return [
        Contender(name=str(i), file=Path(f"{i}.onnx"), variant="", precision="", model=Model(FakeGpu(each)))
        for i, each in enumerate(manifests)
    ]


def test_a_file_without_a_cost_has_that_of_another_of_the_same_weights() -> None:
    plain, other = manifest(sha256="a", cost=COST), manifest(sha256="b")
    assert costs(contenders(manifest(sha256="a"), plain, other, manifest())) == [COST, COST, None, None]
    assert costs(contenders(manifest(), manifest())) == [None, None], "files that do not say what they are made from"


def test_bytes_go_by_the_size_of_the_type_and_operations_do_not() -> None:
    halved = {"flops": 3_000_000, "weight_bytes": 20_000, "activation_bytes": 5_000}
    single = manifest(sha256="a", cost=COST)
    for dtype, want in {"float16": halved, "bfloat16": halved, "tf32": COST, "int4": None}.items():
        assert costs(contenders(manifest(sha256="a", dtype=dtype), single)) == [want, COST]


def test_a_cost_of_its_own_type_comes_before_one_that_is_converted() -> None:
    own = {"flops": 1, "weight_bytes": 2, "activation_bytes": 3}
    files = [manifest(sha256="a", dtype="float16"), manifest(sha256="a", cost=COST),
             manifest(sha256="a", dtype="float16", cost=own)]  # fmt: skip
    assert costs(contenders(*files)) == [own, COST, own]


def test_a_sampler_costs_its_calls_and_a_denoiser_knows_more() -> None:
    sampler = manifest("sampler", sha256="a", cost={name: 2 * value for name, value in COST.items()})
    assert costs(contenders(sampler, manifest(sha256="a"))) == [COST, COST]
    denoiser = manifest(sha256="a", cost={name: value + 2 for name, value in COST.items()})
    assert costs(contenders(sampler, manifest(sha256="a"), denoiser)) == [COST, denoiser.cost, denoiser.cost]


@pytest.mark.parametrize("cost", [{"flops": 1}, COST | {"flops": "many"}, COST | {"weight_bytes": None}])
def test_a_cost_that_is_none_is_nobodys(cost: Any) -> None:
    assert costs(contenders(manifest(cost=cost))) == [None]


# The whole command.


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int | None]]:
    """Make every machine one of 1 GFLOP/s and 1 GB/s; return what was requested."""
    asked: list[tuple[str, str, int | None]] = []

    def measure(device: str, dtype: str, threads: int | None) -> Ceilings:
        asked.append((device, dtype, threads))
        return Ceilings(device=device, dtype=dtype, flops_per_s=1e9, bytes_per_s=1e9, how="by hand")

    monkeypatch.setattr(analysis, "measure_machine", measure)
    return asked


def costly(handmade: Path, path: Path, **values: Any) -> Path:
    """Write the denoiser 0.01 x with another manifest."""
    model = onnx.load(handmade)
    helper.set_model_props(model, {"cmfast": manifest(**values).to_json()})
    onnx.save(model, path)
    return path


def test_the_distance_from_the_roofline_is_recorded_and_shown(
    measured: list[Any], handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    files = [
        costly(handmade_onnx(8), tmp_path / "old.onnx", sha256="a"),
        costly(handmade_onnx(8), tmp_path / "new.onnx", sha256="a", cost=COST),
        costly(handmade_onnx(8), tmp_path / "half.onnx", sha256="a", dtype="float16"),
        costly(handmade_onnx(8), tmp_path / "stranger.onnx", sha256="b"),
    ]
    options = ("--steps", 2, "--batch", 8, "--threads", 1, *QUICK, "--json", tmp_path / "bench.json")
    result = call(bench.main, *files, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert measured == [("cpu", "float16", 1), ("cpu", "float32", 1)]
    assert "measuring what cpu reaches in float16\n" in result.stderr
    assert [(each["dtype"], each["flops_per_s"], each["how"]) for each in record["ceilings"]] == [
        ("float16", 1e9, "by hand"), ("float32", 1e9, "by hand")]  # fmt: skip
    old, new, half, stranger = record["rows"]
    for row in (old, new, half):
        assert row["flops"] == 2 * 8 * 3_000_000
        assert (row["floor_ms"], row["floor_bound"]) == (48, "compute")  # bytes: 2 (40,000 + 8 x 10,000)
        assert row["of_roofline"] == pytest.approx(48 / row["median_ms"])
        assert row["device_times"] is None
        assert row["diagnosis"].startswith("compute-bound: ")
        assert " ".join(row["diagnosis"].split()[:5]) in result.stdout, "the line is broken further on"
    assert {stranger[name] for name in ("flops", "floor_ms", "floor_bound", "of_roofline", "diagnosis")} == {None}
    assert " roofline " in result.stdout
    assert "What takes the time" in result.stdout
    assert "On the GPU" not in result.stdout


def test_what_is_far_from_the_roofline_is_explained_once(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fast(device: str, dtype: str, threads: int | None) -> Ceilings:
        return Ceilings(device=device, dtype=dtype, flops_per_s=1e15, bytes_per_s=1e15, how="by hand")

    monkeypatch.setattr(analysis, "measure_machine", fast)
    files = [costly(handmade_onnx(8), tmp_path / f"{name}.onnx", sha256="a", cost=COST) for name in "ab"]
    options = ("--steps", 2, "--batch", "1,8", "--threads", 1, *QUICK, "--json", tmp_path / "bench.json")
    result = call(bench.main, *files, *options)
    assert result.returncode == 0, result.stderr
    found = [row["diagnosis"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]]
    assert len(found) == 4
    for diagnosis in found:
        assert diagnosis.startswith("far from the roofline: 0.")
    shown = " ".join(result.stdout.split())
    assert shown.count("% of the measured matrix rate") == 4
    once = "below 25% is far from the roofline: small or slow kernels and overhead take the time"
    assert shown.count(once) == shown.count("far from") == shown.count("overhead") == 1


def test_this_machine_itself_can_be_measured(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SIDES": (64,), "NUMBERS": 2**12}.items():
        monkeypatch.setattr(cmfast.bench.roofline, name, {"cpu": value})
    model = costly(handmade_onnx(8), tmp_path / "model.onnx", cost=COST)
    options = ("--steps", 1, "--batch", 1, *QUICK, "--json", tmp_path / "bench.json")
    assert call(bench.main, model, *options).returncode == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    (ceilings,), (row,) = record["ceilings"], record["rows"]
    assert ceilings["how"].startswith("the fastest of ")
    want = 1000 * max(3e6 / ceilings["flops_per_s"], 50_000 / ceilings["bytes_per_s"])
    assert row["floor_ms"] == pytest.approx(want)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, handmade_onnx: Factory) -> Callable[..., list[Any]]:
    """Let a GPU be simulated: files of a folder are opened by backends with made-up times."""
    opened: list[Any] = []

    def install(backends: dict[str, FakeGpu]) -> list[Any]:
        def open_backend(file: Path, device: str, threads: int | None, *, variant: str, precision: str) -> FakeGpu:
            opened.append((file.name, device, threads, variant, precision))
            return backends[f"{file.name} {variant}".rstrip()]

        def start(job: Any, _: object) -> Start:
            return Start(
                contender=job.contender.name, file="model.onnx", file_mib=1.0, kind="denoiser", dtype="float32",
                image=[1, 8, 8], source={}, backend="Fake cuda", variant="", steps=len(job.sigmas), batch=job.batch,
                load_s=1.0, first_call_ms=1.0, peak_mib=None, peak_gpu_mib=512.0,
            )  # fmt: skip

        monkeypatch.setattr(cmfast.backends, "open_backend", open_backend)
        monkeypatch.setattr(starts, "start", start)
        monkeypatch.chdir(tmp_path)
        shutil.copy(handmade_onnx(8), "model.onnx")
        return opened

    return install


def test_the_times_of_a_gpu_are_recorded_shown_and_explained(
    gpu: Callable[..., list[Any]], measured: list[Any], call: Callable[..., Any], tmp_path: Path
) -> None:
    busy = FakeGpu(manifest(cost=COST), times=replace(TIMES, enqueue_ms=7.5))
    graph = FakeGpu(manifest(cost=COST), "Fake cuda cuda_graph", times=replace(TIMES, enqueue_ms=7.5))
    opened = gpu({"model.onnx": busy, "model.onnx cuda_graph": graph})
    options = ("--device", "cuda", "--variants", "cuda_graph", "--steps", 1, "--batch", 8, *QUICK)
    result = call(bench.main, "model.onnx", *options, "--json", "bench.json")
    assert result.returncode == 0, result.stderr
    assert opened == [("model.onnx", "cuda", None, variant, "") for variant in ("", "cuda_graph")]
    record = json.loads((tmp_path / "bench.json").read_text())
    plain, replayed = record["rows"]
    assert (plain["contender"], replayed["contender"]) == ("model.onnx", "model.onnx cuda_graph")
    want = asdict(TIMES) | {"enqueue_ms": 7.5, "calls": DEVICE_CALLS}
    assert plain["device_times"] == replayed["device_times"] == want
    assert plain["diagnosis"].startswith("launch-bound: the host needs 7.5 ms to launch 8 ms of work")
    assert replayed["diagnosis"].startswith("compute-bound: above the measured matrix rate (3 of 1 GFLOP/s)")
    assert plain["calls"] >= timing.FEW, "the timing itself is without them"
    shown = " ".join(result.stdout.split())
    assert "On the GPU: times of a batch, ms" in shown
    assert "1 8 model.onnx cuda_graph 10.000 7.500 0.500 8.000 0.250" in shown
    assert "launch-bound: the host needs 7.5 ms" in shown
    assert "512" in shown
    assert " --device cuda" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(("variant", "launches"), [("", True), ("channels_last", True), ("tensorrt", True),
    ("cuda_graph", False), ("compiled", False)])  # fmt: skip
def test_what_replays_graphs_itself_is_not_advised_to(variant: str, launches: bool) -> None:
    (contender,) = contenders(manifest())
    job = Job(contender=replace(contender, variant=variant), sigmas=(80.0,), batch=1, draw=lambda: np.zeros(1))
    times = DeviceMedians(**asdict(replace(TIMES, enqueue_ms=9)), calls=20)
    found = analysis.explain(job, 10, times, None, None).diagnosis
    assert found is not None
    assert found.startswith("launch-bound" if launches else "bound by the GPU")


def test_that_there_is_no_roofline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    unknown = replace(H100, flops_per_s=None, how="not measured: no CUDA here")
    monkeypatch.setattr(analysis, "measure_machine", lambda *_: unknown)
    assert analysis.measure_ceilings({"float16", "int4"}, "cuda", None, said.append) == {"float16": unknown}
    assert said[1:] == ["no roofline in float16: not measured: no CUDA here"]


def test_on_a_cpu_nobody_is_requested_times_of_a_gpu(
    gpu: Callable[..., list[Any]], call: Callable[..., Any], tmp_path: Path
) -> None:
    gpu({"model.onnx": FakeGpu(manifest())})
    options = ("--steps", 1, "--batch", 1, *QUICK, "--json", "bench.json")
    assert call(bench.main, "model.onnx", *options).returncode == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (row["device_times"], row["diagnosis"]) == (None, None)


@pytest.mark.parametrize(("fast", "how"), [("", "--device cuda"), ("tensorrt", "--device cuda --variant tensorrt")])
def test_the_next_command_runs_the_fastest_in_the_way_that_was_fastest(
    fast: str, how: str, gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    class Slow(FakeGpu):
        def run(self, inputs: Any) -> Any:
            for _ in range(300):
                np.ones(1000).sum()
            return super().run(inputs)

    backends = {variant: (FakeGpu if variant == fast else Slow)(manifest()) for variant in ("", "tensorrt")}
    gpu({f"model.onnx {variant}".rstrip(): backend for variant, backend in backends.items()})
    options = ("--device", "cuda", "--variants", "tensorrt", "--steps", 1, "--batch", 1, *QUICK)
    last = call(bench.main, "model.onnx", *options).stdout.splitlines()[-1]
    assert last == f"next: cmfast-sample model.onnx --steps 1 {how} -n 64 -o samples.png"


# What fails on a GPU.


class Failing(FakeGpu):
    """One that fails from a run on, as GPUs do: late, and with an error that nobody foresaw."""

    def __init__(self, after: int, error: Exception, **values: Any) -> None:
        super().__init__(manifest(), **values)
        self._after, self._error = after, error

    def run(self, inputs: Any) -> Any:
        if self._runs >= self._after:
            raise self._error
        return super().run(inputs)


SHORT = BackendError("PyTorch is short of memory")
CRASH = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\nCompile with TORCH_USE_CUDA_DSA")
ON_GPU = ("--device", "cuda", "--steps", 1, "--batch", 1, *QUICK, "--json", "bench.json")


def bench_two(
    gpu: Callable[..., list[Any]], call: Callable[..., Any], one: FakeGpu, two: FakeGpu, *options: object
) -> Any:
    gpu({"model.onnx": one, "model.onnx tensorrt": two})
    return call(bench.main, "model.onnx", *ON_GPU, "--variants", "tensorrt", *options)


@pytest.mark.parametrize("after", [0, 1, 10])  # while images are compared, in the warm-up, in the timing
@pytest.mark.parametrize(("error", "why"), [(SHORT, "PyTorch is short of memory"), (CRASH,
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED Compile with TORCH_USE_CUDA_DSA")])  # fmt: skip
@pytest.mark.parametrize("reference", [True, False])
def test_who_runs_short_of_memory_does_not_lose_the_others(
    reference: bool, error: Exception, why: str, after: int, gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    good, bad = FakeGpu(manifest()), Failing(after, error)
    result = bench_two(gpu, call, *((bad, good) if reference else (good, bad)), "--keep-going")
    assert result.returncode == 0, result.stderr
    names = ["model.onnx", "model.onnx tensorrt"]
    lost, kept = names if reference else reversed(names)
    record = json.loads(Path("bench.json").read_text())
    (row,) = record["rows"]
    assert (row["contender"], row["reference"], row["times_as_fast"], row["max_abs_diff"]) == (kept, kept, 1, 0)
    want = {"contender": lost, "what": "run", "why": why, "steps": 1, "batch": 1, "threads": None}
    assert record["left_out"] == [want]


@pytest.mark.parametrize("after", [0, 1, 10])
def test_it_is_named_where_it_stops_the_command(
    after: int, gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    result = bench_two(gpu, call, FakeGpu(manifest()), Failing(after, SHORT))
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == "cmfast-bench: model.onnx tensorrt at 1 step(s), batch 1: PyTorch is short of memory"


def test_what_nobody_foresaw_keeps_its_traceback_which_says_who_it_was(
    gpu: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu({"model.onnx": Failing(0, RuntimeError("CUDA error"))})
    monkeypatch.setattr("sys.argv", ["cmfast-bench", "model.onnx", *map(str, ON_GPU)])
    with pytest.raises(RuntimeError, match="CUDA error") as raised:
        bench.main()
    assert raised.value.__notes__ == ["cmfast-bench was running model.onnx at 1 step(s), batch 1"]


@pytest.mark.parametrize("silent", [True, False])
def test_times_on_the_gpu_that_cannot_be_had_cost_the_row_nothing_else(
    silent: bool, gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    class Shy(FakeGpu):
        def run(self, inputs: Any) -> Any:
            if self._times is not None and not silent:
                raise SHORT
            self._times = None
            return super().run(inputs)

    failed = bench_two(gpu, call, FakeGpu(manifest()), Shy(manifest()))
    words = "the backend promised the times of its calls and gave none" if silent else str(SHORT)
    last = failed.stderr.splitlines()[-1]
    assert (failed.returncode, last) == (2, f"cmfast-bench: model.onnx tensorrt at 1 step(s), batch 1: {words}")
    assert bench_two(gpu, call, FakeGpu(manifest()), Shy(manifest()), "--keep-going").returncode == 0
    record = json.loads(Path("bench.json").read_text())
    assert [bool(row["device_times"]) for row in record["rows"]] == [True, False]
    want = {"contender": "model.onnx tensorrt", "what": "device_times", "why": words, "steps": 1, "batch": 1}
    want["threads"] = None
    assert record["left_out"] == [want]


def test_a_start_that_fails_beside_the_others_costs_the_row_nothing_else(
    gpu: Callable[..., list[Any]], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu({"model.onnx": FakeGpu(manifest())})

    def start(*_: object) -> Any:
        raise BackendError("no memory is left for a second process")

    monkeypatch.setattr(starts, "start", start)
    assert call(bench.main, "model.onnx", *ON_GPU).returncode == 2
    assert call(bench.main, "model.onnx", *ON_GPU, "--keep-going").returncode == 0
    record = json.loads(Path("bench.json").read_text())
    assert (len(record["rows"]), record["starts"]) == (1, [])
    assert [(left["what"], left["why"]) for left in record["left_out"]] == [
        ("start", "no memory is left for a second process")]  # fmt: skip


def test_the_memory_of_who_runs_nowhere_is_given_back_before_the_timing(
    gpu: Callable[..., list[Any]], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = {"model.onnx": FakeGpu(manifest()), "model.onnx tensorrt": Failing(0, RuntimeError("CUDA error"))}
    gone = weakref.ref(backends["model.onnx tensorrt"])
    seen: list[Any] = []
    gpu(backends)
    monkeypatch.setattr(cmfast.backends, "open_backend", lambda file, *_, variant, precision: backends.pop(
        f"{file.name} {variant}".rstrip()))  # fmt: skip
    usual = timing.interleave

    def interleave(*arguments: Any, **options: Any) -> Any:
        gc.collect()  # an exception and its frames are a cycle
        seen.append(gone())
        return usual(*arguments, **options)

    monkeypatch.setattr(timing, "interleave", interleave)
    result = call(bench.main, "model.onnx", *ON_GPU, "--variants", "tensorrt", "--keep-going")
    assert result.returncode == 0, result.stderr
    assert seen[0] is None


class Card:
    """Memory for so many backends at a time, beside their weights."""

    def __init__(self, room: int) -> None:
        self.room, self.holders, self.most = room, set[Any](), 0


class Holding(FakeGpu):
    """One that keeps memory of the card from its first call on, as a captured graph does."""

    def __init__(self, card: Card, name: str) -> None:
        super().__init__(manifest(), name)
        self._card = card

    def run(self, inputs: Any) -> Any:
        self._card.holders.add(self)
        self._card.most = max(self._card.most, len(self._card.holders))
        if len(self._card.holders) > self._card.room:
            self.release()
            raise backend_error("CUDA failed in cudaGraphInstantiate: out of memory")
        return super().run(inputs)

    def release(self) -> None:
        self._card.holders.discard(self)


def test_the_memory_of_a_setting_is_given_back_before_the_next(
    gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    card = Card(room=2)

    class PerBatch(Holding):
        """A graph for each batch size, as PyTorch's backend keeps them."""

        def run(self, inputs: Any) -> Any:
            batches.setdefault(self, set()).add(len(inputs["x"]))
            most.append(len(batches[self]))
            return super().run(inputs)

        def release(self) -> None:
            batches.pop(self, None)
            super().release()

    batches: dict[Any, set[int]] = {}
    most: list[int] = []
    gpu({"model.onnx": PerBatch(card, "one"), "model.onnx cuda_graph": PerBatch(card, "two")})
    options = [*ON_GPU, "--variants", "cuda_graph"]
    options[options.index("--batch") + 1] = "1,2,4"
    assert call(bench.main, "model.onnx", *options).returncode == 0
    assert card.most == 2
    assert max(most) == 1, "the graphs of several batch sizes were there at the same time"
    assert not card.holders
    assert len(json.loads(Path("bench.json").read_text())["rows"]) == 6


@pytest.mark.parametrize("keep_going", [(), ("--keep-going",)])
def test_who_has_no_memory_beside_the_others_is_timed_alone(
    keep_going: tuple[str, ...], gpu: Callable[..., list[Any]], call: Callable[..., Any]
) -> None:
    card = Card(room=1)
    result = bench_two(gpu, call, Holding(card, "one"), Holding(card, "two"), *keep_going)
    assert result.returncode == 0, result.stderr
    record = json.loads(Path("bench.json").read_text())
    assert [(row["contender"], row["alone"]) for row in record["rows"]] == [
        ("model.onnx", False), ("model.onnx tensorrt", True),
    ]  # fmt: skip
    assert all(row["calls"] >= timing.FEW and row["device_times"] for row in record["rows"])
    assert record["left_out"] == []
    assert "timing model.onnx tensorrt at 1 step(s), batch 1 alone: memory was short beside the others" in result.stderr


def test_who_has_no_memory_alone_either_is_left_out(gpu: Callable[..., list[Any]], call: Callable[..., Any]) -> None:
    card = Card(room=1)

    class Growing(Holding):
        """One that has room while images are compared, and from then on too little for itself."""

        def run(self, inputs: Any) -> Any:
            if self._runs >= 1:
                raise backend_error("Failed to allocate memory for requested buffer of size 9")
            return super().run(inputs)

    result = bench_two(gpu, call, Holding(card, "one"), Growing(card, "two"), "--keep-going")
    assert result.returncode == 0, result.stderr
    record = json.loads(Path("bench.json").read_text())
    assert [row["contender"] for row in record["rows"]] == ["model.onnx"]
    (left,) = record["left_out"]
    assert (left["contender"], left["what"]) == ("model.onnx tensorrt", "run")
    assert "Failed to allocate memory" in left["why"]


# The process of its own.


def test_the_probe_opens_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def open_backend(*arguments: Any, **names: Any) -> FakeGpu:
        opened.append((arguments, names))
        return FakeGpu(manifest())

    monkeypatch.setattr(probe, "open_backend", open_backend)
    monkeypatch.setattr(probe, "gpu_mib", lambda: 7.0)
    for device, memory in (("cpu", None), ("cuda", 7.0)):
        launch = probe.Launch(
            file="model.pt",
            device=device,
            threads=2,
            variant="cuda_graph",
            precision="fp16",
            sigmas=(80.0, 0.8),
            batch=3,
        )
        found = probe.probe(launch)
        assert opened.pop() == (("model.pt", device, 2), {"variant": "cuda_graph", "precision": "fp16"})
        assert list(asdict(found)) == ["load_s", "first_call_ms", "peak_mib", "peak_gpu_mib"]
        assert found.peak_gpu_mib == memory


@pytest.mark.parametrize(
    ("lines", "found"),
    [([f"{os.getpid()}, 512"], 512.0), (["1, 9", f"{os.getpid()}, 500", f"{os.getpid()}, 12"], 512.0),
     ([f"{os.getpid()}, [N/A]"], None), ([f"1{os.getpid()}, 3"], None), ([], None)],
)  # fmt: skip
def test_the_gpu_memory_is_that_of_this_process(
    lines: list[str], found: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert probe.gpu_mib() == found


def test_without_nvidia_smi_the_gpu_memory_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.gpu_mib() is None
