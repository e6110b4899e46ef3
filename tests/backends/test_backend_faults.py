# SPDX-License-Identifier: MIT
"""Backends where files change, lie or are links, processes fork, memory ends: it works, or it is one line."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import cmfast
from cmfast.backends import MAX_THREADS, onnxruntime, open_backend, pinned
from cmfast.errors import ArtifactError, BackendError, CmfastError, CmfastWarning
from cmfast.formats import onnx_file
from cmfast.formats.manifest import Manifest, file_sha256, graph_sha256, read_onnx
from cmfast_train.backends import pytorch as torch_backend
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.importers import load_model
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers import ROOT
from helpers.specs import image_spec

Factory = Callable[..., Path]
IMAGE = ["B", 1, 8, 8]
X = np.ones((2, 1, 8, 8), np.float32)


def write(
    path: Path,
    factor: float = 2.0,
    *,
    nodes: list[Any] | None = None,
    image: list[Any] | None = None,
    outputs: dict[str, Any] | None = None,
    data: str = "",
    more: list[Any] | None = None,
) -> Path:
    """Write out = factor x; `data` names a file beside it that holds the factor, `nodes` compute something else."""
    weight = helper.make_tensor("factor", TensorProto.FLOAT, [1, 1, 8, 8], [factor] * 64)
    if data:
        (path.parent / data).write_bytes(weight.SerializeToString() and np.full(64, factor, np.float32).tobytes())
        del weight.float_data[:]
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=data)
    batched = IMAGE if image is None else image
    given = outputs if outputs is not None else {"out": IMAGE}
    graph = helper.make_graph(
        nodes or [helper.make_node("Mul", ["x", "factor"], ["out"])],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, batched),
            helper.make_tensor_value_info("sigma", TensorProto.FLOAT, batched[:1]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()],
        [weight, *(more or [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"cmfast": Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8))).to_json()})
    onnx.save(model, path)
    return path


def factor_of(model: cmfast.Model) -> float:
    return float(model.denoise(X, 1.0)[0, 0, 0, 0])


# What was checked is what is loaded.


@pytest.mark.parametrize("memory", [False, True], ids=["descriptor", "memory"])
@pytest.mark.parametrize("data", ["", "weights.bin"])
def test_a_file_that_is_renamed_over_between_check_and_load_is_not_loaded(
    data: str, memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory:
        monkeypatch.setattr(onnx_file, "DESCRIPTORS", tmp_path / "none")
    path = write(tmp_path / "model.onnx", 2.0, data=data)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "model.onnx", 3.0, data=data)
    real = onnx_file.OnnxFile.session

    def swapped(self: Any, *arguments: Any, **more: Any) -> Any:
        for file in other.iterdir():
            os.replace(file, tmp_path / file.name)
        return real(self, *arguments, **more)

    monkeypatch.setattr(onnx_file.OnnxFile, "session", swapped)
    assert factor_of(cmfast.load(path, sha256=None if data else file_sha256(path))) == 2.0
    monkeypatch.undo()
    assert factor_of(cmfast.load(path)) == 3.0


def test_a_file_that_is_written_to_between_check_and_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.onnx")
    real = onnx_file.OnnxFile.session

    def overwritten(self: Any, *arguments: Any, **more: Any) -> Any:
        with path.open("r+b") as file:
            file.write(file.read(0))
        os.utime(path, ns=(1, 1))
        return real(self, *arguments, **more)

    monkeypatch.setattr(onnx_file.OnnxFile, "session", overwritten)
    with pytest.raises(ArtifactError, match="written to while it was opened; open it again"):
        cmfast.load(path)


@pytest.mark.parametrize("copies", [False, True], ids=["descriptor", "copy"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_that_is_renamed_over_between_check_and_load_is_not_loaded(
    suffix: str, copies: bool, tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies:
        monkeypatch.setattr(pinned, "DESCRIPTORS", tmp_path / "none")
    path = Path(shutil.copy(tiny_checkpoint(10, suffix), tmp_path / f"model{suffix}"))
    other = Path(shutil.copy(tiny_checkpoint(0, suffix), tmp_path / f"other{suffix}"))
    real = torch_backend.load_model

    def swapped(model: Path) -> Any:
        os.replace(other, path)
        return real(model)

    monkeypatch.setattr(torch_backend, "load_model", swapped)
    model = cmfast.load(path, sha256=file_sha256(path))
    assert model.spec.classes == 10
    assert model.sample(1).shape == (1, 8, 8, 1)
    monkeypatch.undo()
    assert cmfast.load(path).spec.classes == 0


def test_errors_and_hashes_of_a_checkpoint_name_its_file_not_the_place_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(CmfastError) as caught:
        cmfast.load(path, sha256=file_sha256(path))
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(ArtifactError, match=rf"^{path}: its SHA-256 is .* not 0000"):
        cmfast.load(path, sha256="0" * 64)


def foreign_file(path: Path) -> Path:
    """Write weights that are read with a warning: an EDM teacher's, as OpenAI's are named."""
    config = AdmConfig(
        image_size=8, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,), head_channels=32
    )
    network = AdmUnet(config)
    randomise(network)
    torch.save(network.state_dict(), path)
    return path


def test_a_warning_about_a_checkpoint_that_is_read_under_another_path_names_the_file_to_its_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign_file(tmp_path / "weights.pt")
    given = Given.parse(["image_size=8", "head_channels=32", "qkv=3hd", "scaling=edm"])
    monkeypatch.setattr(torch_backend, "load_model", lambda model: load_model(model, "openai", given))
    with pytest.warns(CmfastWarning) as said:
        cmfast.load(path, sha256=file_sha256(path))
    assert [str(each.message).startswith(f"{path}: ") for each in said] == [True]


def test_files_that_are_opened_at_once_leave_the_warnings_of_the_process_alone(
    tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    paths = [Path(shutil.copy(tiny_checkpoint(classes), tmp_path / f"{classes}.pt")) for classes in (0, 10)]
    opened, ended = threading.Event(), threading.Event()

    def second() -> None:
        with pinned.pinned(paths[1], file_sha256(paths[1])) as place:
            warnings.warn(f"{place}: of the second", CmfastWarning, stacklevel=1)
            opened.set()
            ended.wait(60)

    thread = threading.Thread(target=second)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pinned.pinned(paths[0], file_sha256(paths[0])):
            thread.start()
            opened.wait(60)
            warnings.warn("of nobody", UserWarning, stacklevel=1)
            assert [str(each.message) for each in said] == [f"{paths[1]}: of the second", "of nobody"]
        ended.set()  # the first began before the second and ends before it
        thread.join()
        warnings.warn("after both", UserWarning, stacklevel=1)
        assert [str(each.message) for each in said][2:] == ["after both"]


def test_weights_beside_the_model_are_read_from_there_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime looks into the current folder for weights inside an If, even when it was given them in memory."""
    inner = helper.make_tensor("inner", TensorProto.FLOAT, [1], [1.0])
    del inner.float_data[:]
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="inner.bin")
    branch = helper.make_graph(
        [helper.make_node("Mul", ["x", "inner"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, IMAGE)],
        [inner],
    )
    folder, current = tmp_path / "model", tmp_path / "current"
    for each in (folder, current):
        each.mkdir()
        (each / "inner.bin").write_bytes(np.float32(7).tobytes())
    monkeypatch.chdir(current)
    path = write(
        folder / "model.onnx",
        nodes=[helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch)],
        more=[helper.make_tensor("yes", TensorProto.BOOL, [], [True])],
    )
    with pytest.raises(ArtifactError, match="cannot open it"):
        cmfast.load(path)


def test_a_model_in_a_hub_cache_is_sampled_and_one_with_weights_elsewhere_is_not(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs / "model.onnx", 5.0, data="weights.bin")
    for name, blob in (("model.onnx", "aa"), ("weights.bin", "bb")):
        os.rename(blobs / name, blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert factor_of(cmfast.load(snapshot / "model.onnx")) == 5.0
    os.rename(blobs / "bb", tmp_path / "bb")
    (snapshot / "weights.bin").unlink()
    (snapshot / "weights.bin").symlink_to("../../bb")
    with pytest.raises(ArtifactError, match="copy both: cp -L"):
        cmfast.load(snapshot / "model.onnx")


def sealed(path: Path) -> Path:
    """Give a file the digest of its graph and weights."""
    model = onnx.load(path, load_external_data=False)
    manifest = replace(read_onnx(path)[0], graph_sha256=graph_sha256(path))
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    onnx.save(model, path)
    return path


def test_weights_beside_a_model_that_differ_from_its_digest_are_not_sampled(tmp_path: Path) -> None:
    path = sealed(write(tmp_path / "model.onnx", 2.0, data="weights.bin"))
    assert factor_of(cmfast.load(path)) == 2.0
    assert factor_of(cmfast.load(path, sha256=file_sha256(path))) == 2.0, "the digest is in what was hashed"
    weights = tmp_path / "weights.bin"
    before = weights.read_bytes()
    weights.write_bytes(np.full(64, 3.0, np.float32).tobytes())
    with pytest.raises(ArtifactError, match="changed since they were verified"):
        cmfast.load(path)
    weights.write_bytes(before[:-4])
    with pytest.raises(ArtifactError, match=r"model\.onnx: (its graph|its data file|.*changed)"):
        cmfast.load(path)


def test_weights_with_another_name_elsewhere_are_read_where_a_digest_shows_that_they_are_the_models(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "model.onnx", 2.0, data="weights.bin")
    backup = tmp_path / "backup"
    backup.mkdir()
    os.link(tmp_path / "weights.bin", backup / "weights.bin")
    with pytest.raises(ArtifactError, match="a hard link"):
        cmfast.load(path)
    os.unlink(backup / "weights.bin")
    sealed(path)
    os.link(tmp_path / "weights.bin", backup / "weights.bin")
    assert factor_of(cmfast.load(path)) == 2.0


# Graphs that lie.


def constant(name: str, values: list[int]) -> Any:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


FLAT = [helper.make_node("Reshape", ["x", "flat"], ["out"])]
SUM = [helper.make_node("ReduceSum", ["x"], ["out"], keepdims=0)]
WIDE = [helper.make_node("Concat", ["x", "x"], ["out"], axis=3)]
TWO = [helper.make_node("Neg", ["x"], ["out"]), helper.make_node("Neg", ["x"], ["second"])]


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"nodes": FLAT, "more": [constant("flat", [-1])]}, r"the graph return(s|ed)"),
        ({"nodes": SUM}, r"the graph returned float32 \[\], its manifest promises float32 \[2, 1, 8, 8\]"),
        (
            {"nodes": WIDE, "outputs": {"out": None}},
            r"returns \['B', 1, 8, 16\], its manifest says \[batch, 1, 8, 8\]",
        ),
        ({"nodes": TWO, "outputs": {"out": IMAGE, "second": IMAGE}}, "the graph has 2 outputs"),
        ({"image": [2**40, 1, 8, 8], "outputs": {"out": None}}, "fixed at 1099511627776; at most 65,536"),
        ({"image": ["B", 8, 8], "outputs": {"out": None}}, r"x is \['B', 8, 8\], its manifest says"),
        ({"image": [], "outputs": {"out": None}}, r"x is \[\], its manifest says"),
    ],
    ids=["flat", "rank 0", "other sides", "two outputs", "batch", "rank 3", "input of rank 0"],
)
def test_a_graph_that_is_not_what_its_manifest_says_is_one_line(
    graph: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "lie.onnx", **graph)
    with pytest.raises(ArtifactError, match=words) as caught:
        cmfast.load(path).denoise(X, 1.0)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("nodes", "values", "words"),
    [
        ([helper.make_node("Gather", ["x", "bad"], ["out"])], [7], r"idx=7 must be within"),
        ([helper.make_node("Reshape", ["x", "bad"], ["out"])], [3, 5], r"cannot be reshaped"),
        ([helper.make_node("Expand", ["x", "bad"], ["out"])], [2**36, 2, 1, 8, 8], r"smaller batch: .*allocate memory"),
    ],
)
def test_what_onnx_runtime_reports_while_it_runs_is_one_line_with_the_cause_and_nothing_beside_it(
    nodes: list[Any], values: list[int], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.onnx", nodes=nodes, more=[constant("bad", values)], outputs={"out": None})
    backend = open_with_any_output(path)
    with pytest.raises(BackendError, match=words) as caught:
        backend.run({"x": X, "sigma": np.ones(2, np.float32)})
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def open_with_any_output(path: Path) -> Any:
    """Open a graph whose output is wrong already by its inferred shape."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnxruntime.OnnxRuntimeBackend, "_check_graph", lambda self, path: None)
        return open_backend(path)


# Pickles and forks.


@pytest.mark.parametrize("kind", ["onnx", "pt"])
def test_a_pickled_model_opens_the_same_file_with_the_same_options(
    kind: str, tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model.{kind}"
    if kind == "onnx":
        write(path)
    else:
        shutil.copy(tiny_checkpoint(0), path)
    monkeypatch.chdir(tmp_path)
    model = cmfast.load(path.name, threads=1, sha256=file_sha256(path))
    sent = pickle.dumps(model)
    monkeypatch.chdir("/")
    for again in (pickle.loads(sent), copy.deepcopy(model)):
        assert again.backend.origin == model.backend.origin
        assert again.spec == model.spec
        np.testing.assert_array_equal(again.denoise(X, 1.0), model.denoise(X, 1.0))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="changed or removed since the model was pickled; load it again"):
        pickle.loads(sent)
    path.unlink()
    with pytest.raises(ArtifactError, match="changed or removed"):
        pickle.loads(sent)


def test_a_backend_that_was_not_opened_from_a_file_is_not_pickled(tiny_checkpoint: Factory) -> None:
    with pytest.raises(CmfastError, match=r"opened by cmfast\.load"):
        pickle.dumps(TorchBackend(tiny_checkpoint(0)))


def in_child(work: Callable[[], bool]) -> int:
    """Return the status of a forked child that ends with 0 if work() is true, and is killed if it hangs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forking beside threads: our subject
        child = os.fork()
    if child == 0:
        code = 3
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest-timeout's handler, which a hang never reaches
            signal.alarm(20)
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_checkpoint_runs_in_a_forked_child_of_a_process_with_several_threads(tiny_checkpoint: Factory) -> None:
    model = cmfast.load(tiny_checkpoint(0))
    try:
        torch.set_num_threads(2)
        torch.ones(1 << 20).exp_()  # the threads exist
        want = model.sample(2)

        def child() -> bool:
            with pytest.raises(BackendError, match="PyTorch hangs with more than one"):
                cmfast.load(tiny_checkpoint(0), threads=2)
            again = cmfast.load(tiny_checkpoint(0))
            return all(np.abs(each.sample(2).astype(int) - want).max() <= 1 for each in (model, again))

        assert in_child(child) == 0
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_graph_runs_in_a_forked_child_and_goes_there_without_a_crash(tmp_path: Path) -> None:
    models = [cmfast.load(write(tmp_path / "model.onnx"), threads=4)]

    def child() -> bool:
        same = factor_of(models[0]) == 2.0
        models.clear()  # ONNX Runtime would wait for threads that only the parent has
        return same

    assert in_child(child) == 0
    assert factor_of(models[0]) == 2.0


def test_a_gpu_is_not_used_after_a_fork() -> None:
    from cmfast.backends.cuda.runtime import check_process

    check_process(os.getpid(), "TensorRT cuda")
    with pytest.raises(BackendError, match=r"TensorRT cuda was opened before this process was forked.*spawn"):
        check_process(os.getpid() + 1, "TensorRT cuda")


# Arguments, memory, warnings.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 10**12}, f"threads must be at most {MAX_THREADS}, got 1000000000000"),
        ({"threads": True}, "threads must be a whole number, got True"),
        ({"threads": 2.0}, "threads must be a whole number, got 2.0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": 3}, "device must be cpu or cuda, got 3"),
        ({"device": ["cpu"]}, "device must be cpu or cuda"),
        ({"variant": ["x"]}, "variant must be one of"),
        ({"precision": 16}, "precision must be one of"),
        ({"sha256": b"0"}, "64 hex digits, got bytes"),
        ({"sha256": "12"}, "64 hex digits"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type_or_size_are_one_line(
    options: dict[str, Any], words: str, handmade_onnx: Factory
) -> None:
    with pytest.raises(CmfastError, match=words):
        cmfast.load(handmade_onnx(), **options)


@pytest.mark.parametrize("path", [5, None, b"model.onnx", "model\0.onnx"], ids=repr)
def test_what_is_no_path_is_one_line(path: Any) -> None:
    with pytest.raises(CmfastError, match=r"path|no such file"):
        cmfast.load(path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tri"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        MemoryError("Unable to allocate 8 GiB"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=repr,
)
def test_a_checkpoint_without_memory_is_one_line(
    error: Exception, tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cmfast.load(tiny_checkpoint(0))

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(model.backend, "_execute", full)
    with pytest.raises(BackendError, match="PyTorch cpu is short of memory; try a smaller batch"):
        model.denoise(X, 1.0)


def test_real_allocations_that_fail_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert torch_backend.out_of_memory(caught.value)


def test_arrays_that_cannot_be_written_to_give_no_warning_of_pytorch(tiny_checkpoint: Factory) -> None:
    x = X.copy()
    x.setflags(write=False)
    assert cmfast.load(tiny_checkpoint(0)).denoise(x, 1.0).shape == x.shape


@pytest.mark.parametrize("precision", ["", "fp16", "bf16"])
def test_the_default_dtype_of_torch_changes_no_image(precision: str, tiny_checkpoint: Factory) -> None:
    want = cmfast.load(tiny_checkpoint(10), precision=precision).sample_float(2, steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        got = cmfast.load(tiny_checkpoint(10), precision=precision).sample_float(2, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(got, want)


# Telemetry.


SCRIPT = "import cmfast, sys, numpy; cmfast.load(sys.argv[1]).denoise(numpy.ones((1, 1, 8, 8), 'f'), 1.0)"


def test_onnx_runtime_writes_nothing_to_the_home_folder_and_opens_no_socket(
    handmade_onnx: Factory, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(handmade_onnx())]
    strace = shutil.which("strace")
    if strace:
        command = [strace, "-f", "-e", "trace=network", "-o", str(trace), *command]
    done = subprocess.run(command, env=environment | {"HOME": str(home)}, capture_output=True, text=True, timeout=120)
    if strace and "ptrace" in done.stderr:
        pytest.skip("strace is not allowed to trace here")
    assert (done.returncode, done.stderr) == (0, "")
    assert [str(path) for path in home.rglob("*")] == []
    if not strace:
        pytest.skip("without strace: the home folder is clean, sockets were not looked at")
    assert "socket(" not in trace.read_text()


def test_a_user_who_wants_telemetry_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmfast.backends.onnxruntime_library import disable_telemetry

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    disable_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    disable_telemetry()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_only_one_module_imports_onnx_runtime() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("cmfast", "train", "export", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if any(
            line.strip().startswith(("import onnxruntime", "from onnxruntime"))
            for line in path.read_text().splitlines()
        )
    ]
    assert found == ["cmfast/backends/onnxruntime_library.py"]
