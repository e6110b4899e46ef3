# SPDX-License-Identifier: MIT
"""What several test modules share: tiny models on disk, and commands run the way a user runs them."""

from __future__ import annotations

import ctypes
import functools
import gc
import io
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from hypothesis import settings
from onnx import helper

from cmfast.formats.manifest import Manifest
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.kernels.signals import take_back_signals
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers.only_installed import OPTIONAL
from helpers.specs import image_spec

if find_spec("onnx_ir") and find_spec("onnxscript"):  # else nothing is exported here: see only_installed
    from helpers import traced_once  # noqa: F401  before anything imports what it replaces

# The networks are tiny: a second thread brings nothing, and on a busy machine the two wait for each other, spinning.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves
# Python's own full collections were a tenth of the time of tests that export. Old garbage may wait.
gc.set_threshold(700, 10, 100)
settings.register_profile("cmfast", deadline=None)  # a busy machine is not a failure
settings.load_profile("cmfast")

Result = subprocess.CompletedProcess


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a test module that imports an optional package where there is none; an error would stop all others too."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        error: BaseException | None = report.call.excinfo.value  # type: ignore[attr-defined]
        while error is not None and not isinstance(error, ModuleNotFoundError):
            error = error.__cause__ or error.__context__
        name = ((error and error.name) or "").partition(".")[0]
        if name in OPTIONAL and find_spec(name) is None:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {name}")
    return report


# Nothing comes after these, which compile kernels: see `cmfast_train.kernels.signals`.
LAST = ("test_kernels_training", "test_kernels")
# Where files go to processes whole (--dist loadfile), these go first: a long one at the end would leave a core idle.
# The seconds that each takes, down to about ten, decide the order.
LONG = (
    "test_ort_cuda", "test_precision", "test_to_tensorrt", "test_export", "test_benchmarks_gpu", "test_loop_processes",
    "test_methods", "test_step_graph", "test_loop", "test_own_networks", "test_loop_methods", "test_cpp_onnxruntime",
    "test_parallel", "test_cpp_package", "test_web_page", "test_cli_bench",
    "test_docs", "test_importers", "test_to_openvino", "test_cost", "test_fuzz", "test_eval", "test_cpp_noise",
    "test_tensorrt_backend", "test_bench_analysis", "test_run", "test_write", "test_suite", "test_edm_networks",
    "test_frozen",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist, where there is one, keep our order; its own begins with files of many tests, however short."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)} | dict.fromkeys(LAST, len(LONG) + 1)
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


class SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2) on Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


SS_DISABLE = 2


def drop_signal_stack() -> None:
    """Let signals run on the stack of the main thread.

    Python asks for the alternate one, and a process whose alternate stack a library has left unusable dies of the first
    signal: seen as SIGSEGV from the kernel while it delivered a SIGINT.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(SignalStack(None, SS_DISABLE, 0)), None)


_kill = os.kill


def kill_on_own_stack(process: int, number: int) -> None:
    """Do what os.kill does; of this process after `drop_signal_stack`, as the test may have imported such a library."""
    if process == os.getpid():
        drop_signal_stack()
    _kill(process, number)


pytest.MonkeyPatch().setattr(os, "kill", kill_on_own_stack)


NEW_MODULES = 100  # imported since the last freeze: a library and what it imports
_frozen_modules = [0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set Python's signal handlers again, and keep imported libraries out of garbage collections.

    Libraries have a million objects, and accelerate runs a full collection at each phase of a run: more than half of
    the time of tests that train.
    """
    take_back_signals()
    drop_signal_stack()
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    ):  # a command that was interrupted leaves it so: `report_interrupt`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(sys.modules) > _frozen_modules[0] + NEW_MODULES:
        gc.collect()
        gc.freeze()
        _frozen_modules[0] = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of checkpoints with random weights, 8x8 images of one channel; treat the files as read-only.

    Of levels=1 it is half as large: nothing is resampled, and the middle alone has attention.
    """
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(classes: int = 10, suffix: str = ".pt", levels: int = 2) -> Path:
        config = AdmConfig(
            image_size=8, channels=1, classes=classes, model_channels=32, res_blocks=1,
            channel_mult=(1, 2)[:levels], attention=(4,)[: levels - 1], head_channels=32,
        )  # fmt: skip
        network = AdmUnet(config)
        randomise(network)
        path = folder / f"classes{classes}_levels{levels}{suffix}"
        spec = image_spec(image=(1, 8, 8), classes=classes)
        save_checkpoint(Checkpoint(spec=spec, network=config, weights=network.state_dict()), path)
        return path

    return make


@pytest.fixture(scope="session")
def handmade_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a factory of denoisers written node by node: denoised = 0.01 x, so ONNX Runtime has something to run."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(side: int = 8) -> Path:
        float32 = onnx.TensorProto.FLOAT
        image = ["B", 1, side, side]
        graph = helper.make_graph(
            [helper.make_node("Mul", ["x", "hundredth"], ["denoised"])],
            "denoiser",
            [
                helper.make_tensor_value_info("x", float32, image),
                helper.make_tensor_value_info("sigma", float32, ["B"]),
            ],
            [helper.make_tensor_value_info("denoised", float32, image)],
            [helper.make_tensor("hundredth", float32, [], [0.01])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, side, side)))
        helper.set_model_props(model, {"cmfast": manifest.to_json()})
        path = folder / f"side{side}.onnx"
        onnx.save(model, path)
        return path

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., Result[str]]:
    """Return a function that runs `python -m MODULE ARGUMENTS` and captures what it says."""

    def run(module: str, *arguments: object, timeout: float = 120, **environment: str) -> Result[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result[str]]:
    """Return a function that runs a command's `main` in this process, which has torch already."""

    def call(main: Callable[[], None], *arguments: object) -> Result[str]:
        argv = ["command", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        capfd.readouterr()
        try:
            main()
        except SystemExit as stopped:  # not by pytest.raises, whose result would hold this frame and the test's
            code = int(stopped.code or 0)
        else:
            pytest.fail("the command did not exit")
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(argv, code, out, err)

    return call


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """Return a check that a command gave one line on stderr with these words, and the exit code of a user's error."""

    def refused(result: Result[str], *words: str, code: int = 2) -> None:
        assert result.returncode == code, result.stderr
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("cmfast-")
        for word in words:
            assert word in line

    return refused


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs are recorded as well."""
    from cmfast_train.training import step_graph

    monkeypatch.setattr(step_graph, "WORTH", 5)


@pytest.fixture
def persistent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Return a function that pickles modules as EDM does; plain pickle can read what it returns."""
    from helpers.foreign.edm_pickles import PersistentPickler, reconstruct

    module = types.ModuleType("torch_utils.persistence")
    function = types.FunctionType(reconstruct.__code__, globals(), "_reconstruct_persistent_obj")
    function.__module__, function.__qualname__ = module.__name__, "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def dumps(content: Any, protocol: int = 4, source: str = PersistentPickler.source) -> bytes:
        buffer = io.BytesIO()
        pickler = PersistentPickler(buffer, protocol)
        pickler.source = source
        pickler.dump(content)
        return buffer.getvalue()

    return dumps


@pytest.fixture
def snapshot(persistent: Callable[..., bytes], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a network snapshot as EDM and ECT do, of the weights of a case."""
    from helpers.foreign.edm import CASES, Precond, new, weights_of

    def write(name: str, kind: str, key: str = "ema", **attributes: Any) -> Path:
        network = new(CASES[name])
        network.load_state_dict(weights_of(name))
        model = type(kind, (Precond,), {})(network, **attributes)
        file = tmp_path / "network-snapshot-000100.pkl"
        file.write_bytes(persistent({key: model, "loss_fn": None, "dataset_kwargs": {"path": "cifar10.zip"}}))
        return file

    return write


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    from cmfast_train.torchvision_cpu import torchvision_datasets

    torchvision_datasets()  # diffusers imports torchvision
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    return diffusers
