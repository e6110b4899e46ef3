# SPDX-License-Identifier: MIT
"""Model repositories of Triton: its own protobufs read the configuration, ONNX Runtime runs what it points to.

No server runs here. What Triton's sources demand of a configuration and a model together is in `Triton` below. The
plans are none that TensorRT could load: only their manifests are read.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmfast import gaussian, save_images
from cmfast.errors import ArtifactError, CmfastError
from cmfast.formats.manifest import Manifest
from cmfast.formats.table import read_manifest
from cmfast.model import load
from cmfast.spec import ModelSpec
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_export.graphs.server import server_graph
from cmfast_export.graphs.writer import write_data, write_with_manifest
from cmfast_export.targets.triton_config import MAX_BATCH, ServeOptions, check_name
from cmfast_export.targets.triton_repository import (
    Written,
    check_repository,
    client_example,
    model_name,
    write_repository,
)
from cmfast_train.checkpoint import load_checkpoint
from helpers.plans import plan

Make = Callable[..., Path]
Graphs = Callable[..., tuple[ir.Model, ModelSpec]]
Arrays = Mapping[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def samplers(tiny_checkpoint: Make) -> Graphs:
    """Return a factory of sampler graphs with random weights, and the spec with their noise levels."""

    @functools.cache
    def denoiser(classes: int, batch: int | None) -> tuple[ir.Model, ModelSpec]:
        model = load_checkpoint(tiny_checkpoint(classes=classes)).denoiser()
        return denoiser_graph(model, batch), model.spec

    def make(classes: int = 10, batch: int | None = None, steps: int = 2) -> tuple[ir.Model, ModelSpec]:
        graph, spec = denoiser(classes, batch)
        levels = spec.sigmas_for(steps)
        return sampler_graph(graph, levels, spec), replace(spec, sigmas={steps: levels})

    return make


@pytest.fixture(scope="module")
def server_file(samplers: Graphs, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a factory of files of kind server, written as `export_onnx` writes them."""

    @functools.cache
    def make(classes: int = 10, batch: int | None = None, data: bool = False) -> Path:
        graph, spec = samplers(classes, batch)
        path = tmp_path_factory.mktemp("server") / "two.steps.onnx"
        manifest = Manifest(kind="server", spec=spec, source={"sha256": "0" * 64}, made_by={"cmfast": "0"})
        write_with_manifest(server_graph(graph), manifest, path, write_data(graph, path) if data else None)
        return path

    return make


class Triton:
    """As much of the server as its sources tell: onnxruntime_backend/src/onnxruntime_utils.cc and core's checks."""

    def __init__(self, repository: Path) -> None:
        (folder,) = repository.iterdir()
        self.config = read_config(folder)
        assert (self.config.name, self.config.platform) == (folder.name, "onnxruntime_onnx")
        model = folder / "1" / "model.onnx"
        model = model / "model.onnx" if model.is_dir() else model
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.first = [-1] if self.config.max_batch_size else []
        for told, have in (
            (self.config.input, self.session.get_inputs()),
            (self.config.output, self.session.get_outputs()),
        ):
            shapes = {node.name: [n if isinstance(n, int) else -1 for n in node.shape] for node in have}
            assert {tensor.name: [*self.first, *tensor.dims] for tensor in told} == shapes

    def infer(self, name: str, inputs: Arrays) -> npt.NDArray[np.float32]:
        assert name == self.config.name
        for tensor in self.config.input:
            shape = list(inputs[tensor.name].shape)
            assert shape[len(self.first) :] == list(tensor.dims)
            assert not self.first or shape[0] <= self.config.max_batch_size
        (images,) = self.session.run(None, dict(inputs))
        return np.asarray(images)


def read_config(folder: Path) -> Any:
    """Return Triton's own message of a configuration; its client's wheel brings the message."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def as_dict(folder: Path) -> dict[str, Any]:
    """Return a configuration as a dict, 64-bit numbers as protobuf's JSON has them: in quotes."""
    config = read_config(folder)
    from google.protobuf import json_format

    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def draw(classes: int, n: int, steps: int = 2) -> dict[str, npt.NDArray[Any]]:
    """Return a sampler graph's inputs."""
    noise = np.stack([gaussian(7, range(n), step, (1, 8, 8)) for step in range(steps)])
    return {"noise": noise, **({"label": np.arange(n) % classes} if classes else {})}


def batch_first(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
    return {name: value.swapaxes(0, 1) if name == "noise" else value[:, None] for name, value in inputs.items()}


@pytest.mark.parametrize(("classes", "batch", "steps"), [(10, None, 2), (0, None, 2), (10, 3, 2), (0, None, 1)])
def test_a_server_graph_is_the_sampler_graph_with_the_batch_first(
    classes: int, batch: int | None, steps: int, samplers: Graphs
) -> None:
    sampler, _ = samplers(classes, batch, steps)
    server = server_graph(sampler)
    inputs = draw(classes, 3, steps)
    (want,), (got,) = session(sampler).run(None, inputs), session(server).run(None, batch_first(inputs))
    np.testing.assert_array_equal(got, want)
    assert np.ptp(want) > 0.1  # not all the same, so that an order of axes can be wrong
    size = session(sampler).get_inputs()[0].shape[1]
    assert size == batch or batch is None
    shapes = {"noise": [size, steps, 1, 8, 8], **({"label": [size, 1]} if classes else {})}
    assert {node.name: node.shape for node in session(server).get_inputs()} == shapes
    onnx.checker.check_model(ir.to_proto(server), full_check=True)


def test_a_server_graph_shares_the_weights_and_leaves_the_sampler_graph_alone(samplers: Graphs) -> None:
    sampler, _ = samplers()
    before = ir.to_proto(sampler).SerializeToString(deterministic=True)
    server = server_graph(sampler)
    assert ir.to_proto(sampler).SerializeToString(deterministic=True) == before
    for name, value in sampler.graph.initializers.items():
        assert server.graph.initializers[name].const_value is value.const_value


@pytest.mark.parametrize(("classes", "batch"), [(10, None), (0, None), (10, 3)])
def test_a_server_file_draws_the_images_of_the_checkpoint(
    classes: int, batch: int | None, server_file: Make, tiny_checkpoint: Make
) -> None:
    model = load(server_file(classes, batch))
    assert model.backend.batch == batch
    got = model.sample_float(5, seed=3)
    want = load(tiny_checkpoint(classes=classes)).sample_float(5, steps=2, seed=3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # float32 in another order of operations


NOISE = {"data_type": "TYPE_FP32", "dims": ["2", "1", "8", "8"]}
LABEL = {"data_type": "TYPE_INT64", "dims": ["1"]}
IMAGES = {"name": "images", "data_type": "TYPE_FP32", "dims": ["1", "8", "8"]}
TF32_OFF = {"gpu_execution_accelerator": [{"name": "cuda", "parameters": {"use_tf32": "0"}}]}


def warm_up(sizes: list[int], **inputs: dict[str, Any]) -> list[dict[str, Any]]:
    values = {name: {**value, "zero_data": True} for name, value in inputs.items()}
    return [{"name": f"{size} at once", "batch_size": size, "inputs": values} for size in sizes]


def test_the_configuration_of_an_onnx_file_is_this_and_no_more(server_file: Make, tmp_path: Path) -> None:
    written = write_repository(tmp_path / "repo", [server_file()])
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "repo/two_steps/config.pbtxt",
        "repo/two_steps/1/model.onnx",
    }
    assert as_dict(tmp_path / "repo" / "two_steps") == {
        "name": "two_steps",
        "platform": "onnxruntime_onnx",
        "max_batch_size": MAX_BATCH,
        "input": [{"name": "noise", **NOISE}, {"name": "label", **LABEL}],
        "output": [IMAGES],
        "instance_group": [{"kind": "KIND_GPU", "count": 1}],
        "optimization": {"execution_accelerators": TF32_OFF},
        "dynamic_batching": {},
        "model_warmup": warm_up([1, 2, 3, 4, 5, 6, 7, 8], noise=NOISE, label=LABEL),
    }
    assert written == Written(
        path=tmp_path / "repo",
        name="two_steps",
        manifest=read_manifest(server_file()),
        backend="onnxruntime",
        max_batch=8,
        batch=None,
        tensorrt=None,
        capabilities=(),
        arguments=(),
    )


def test_what_is_requested_stands_in_the_configuration(server_file: Make, tmp_path: Path) -> None:
    model = server_file(classes=0)
    options = ServeOptions(name="a-b", max_batch=6, queue_delay_us=500, instances=3, device="cpu")
    write_repository(tmp_path / "repo", [model], options)
    assert as_dict(tmp_path / "repo" / "a-b") == {
        "name": "a-b",
        "platform": "onnxruntime_onnx",
        "max_batch_size": 6,
        "input": [{"name": "noise", **NOISE}],
        "output": [IMAGES],
        "instance_group": [{"kind": "KIND_CPU", "count": 3}],
        "dynamic_batching": {"max_queue_delay_microseconds": "500"},
        "model_warmup": warm_up([1, 6], noise=NOISE),
    }
    write_repository(tmp_path / "single", [model], ServeOptions(max_batch=1, device="auto"))
    single = read_config(tmp_path / "single" / "two_steps")
    assert (single.max_batch_size, single.HasField("dynamic_batching"), len(single.model_warmup)) == (1, False, 1)
    assert single.instance_group[0].kind == single.instance_group[0].KIND_AUTO
    assert single.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters == {"use_tf32": "0"}


def test_a_file_that_may_round_to_tensorfloat_is_let(samplers: Graphs, tmp_path: Path) -> None:
    graph, spec = samplers()
    manifest = Manifest(kind="server", spec=spec, dtype="tf32", made_by={"cmfast": "0"})
    write_with_manifest(server_graph(graph), manifest, tmp_path / "model.onnx")
    write_repository(tmp_path / "repo", [tmp_path / "model.onnx"])
    accelerators = read_config(tmp_path / "repo" / "model").optimization.execution_accelerators
    assert accelerators.gpu_execution_accelerator[0].parameters == {"use_tf32": "1"}


def test_a_fixed_batch_is_served_as_requests_of_just_that_size(server_file: Make, tmp_path: Path) -> None:
    written = write_repository(tmp_path / "repo", [server_file(batch=3)])
    noise = {**NOISE, "dims": ["3", *NOISE["dims"]]}
    label = {**LABEL, "dims": ["3", "1"]}
    assert as_dict(tmp_path / "repo" / "two_steps") == {
        "name": "two_steps",
        "platform": "onnxruntime_onnx",  # max_batch_size: 0, which is not written out
        "input": [{"name": "noise", **noise}, {"name": "label", **label}],
        "output": [{**IMAGES, "dims": ["3", *IMAGES["dims"]]}],
        "instance_group": [{"kind": "KIND_GPU", "count": 1}],
        "optimization": {"execution_accelerators": TF32_OFF},
        "model_warmup": [{**warm_up([3], noise=noise, label=label)[0], "batch_size": 1}],
    }
    assert (written.batch, written.max_batch) == (3, 3)


@pytest.mark.parametrize(
    ("classes", "batch", "data"), [(10, None, False), (0, None, False), (10, 3, False), (10, None, True)]
)
def test_the_model_in_the_repository_draws_the_images_of_the_sampler_graph(
    classes: int, batch: int | None, data: bool, server_file: Make, samplers: Graphs, tmp_path: Path
) -> None:
    write_repository(tmp_path / "repo", [server_file(classes, batch, data=data)], ServeOptions(name="m"))
    inputs = draw(classes, 3)
    (want,) = session(samplers(classes, batch)[0]).run(None, inputs)
    np.testing.assert_array_equal(Triton(tmp_path / "repo").infer("m", batch_first(inputs)), want)


def test_weights_in_a_file_of_their_own_go_into_a_folder_with_the_model(server_file: Make, tmp_path: Path) -> None:
    model = server_file(data=True)
    (data,) = set(model.parent.iterdir()) - {model}
    write_repository(tmp_path / "repo", [model])
    folder = tmp_path / "repo" / "two_steps" / "1" / "model.onnx"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", data.name}
    assert (folder / data.name).read_bytes() == data.read_bytes()
    assert load(folder / "model.onnx").sample(1).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(("classes", "batch"), [(10, None), (0, None), (10, 3)])
def test_the_client_example_draws_what_the_file_draws(
    classes: int, batch: int | None, server_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_repository(tmp_path / "repo", [server_file(classes, batch)])
    server = Triton(written.path)

    class Client:
        def __init__(self, url: str) -> None:
            assert url == "localhost:8001"

        def infer(self, name: str, inputs: list[Any]) -> Client:
            dtypes = {"FP32": np.float32, "INT64": np.int64}
            self.images = server.infer(
                name,
                {
                    value.name(): np.frombuffer(value._raw_content, dtypes[value.datatype()]).reshape(value.shape())
                    for value in inputs
                },
            )
            return self

        def as_numpy(self, name: str) -> npt.NDArray[np.float32]:
            assert name == "images"
            return self.images

    monkeypatch.setattr(pytest.importorskip("tritonclient.grpc"), "InferenceServerClient", Client)
    monkeypatch.chdir(tmp_path)
    script = client_example(written)
    assert len(script.splitlines()) <= 14
    assert ("label" in script) == bool(classes)
    exec(compile(script, "example", "exec"), {})
    save_images("want.png", load(server_file(classes, batch)).sample(batch or 4, seed=0))
    assert (tmp_path / "images.png").read_bytes() == (tmp_path / "want.png").read_bytes()


def graph_specs(sizes: list[int], noise: list[str], label: list[str]) -> dict[str, Any]:
    inputs = {"noise": {"dim": noise}, "label": {"dim": label}}
    return {"cuda": {"graphs": True, "graph_spec": [{"batch_size": size, "input": inputs} for size in sizes]}}


def test_the_configuration_of_a_plan_is_this_and_no_more(tmp_path: Path) -> None:
    file = plan(tmp_path / "one.engine")
    written = write_repository(tmp_path / "repo", [file])
    assert as_dict(tmp_path / "repo" / "one") == {
        "name": "one",
        "platform": "tensorrt_plan",
        "max_batch_size": 6,
        "input": [{"name": "noise", **NOISE}, {"name": "label", **LABEL}],
        "output": [IMAGES],
        "instance_group": [{"kind": "KIND_GPU", "count": 1}],
        "optimization": graph_specs([1, 2, 4, 6], NOISE["dims"], LABEL["dims"]),
        "dynamic_batching": {},
        "model_warmup": warm_up([1, 2, 4, 6], noise=NOISE, label=LABEL),
    }
    assert (tmp_path / "repo" / "one" / "1" / "model.plan").read_bytes() == file.read_bytes()
    assert (written.backend, written.tensorrt, written.capabilities) == ("tensorrt", "10.13.3.9", ("8.9",))
    write_repository(tmp_path / "less", [file], ServeOptions(max_batch=2))
    assert read_config(tmp_path / "less" / "one").max_batch_size == 2


def test_a_plan_for_one_batch_size_is_served_as_requests_of_just_that_size(tmp_path: Path) -> None:
    written = write_repository(tmp_path / "repo", [plan(tmp_path / "one.plan", batch=[4, 4, 4])])
    config = as_dict(tmp_path / "repo" / "one")
    noise, label = ["4", *NOISE["dims"]], ["4", "1"]
    assert [tensor["dims"] for tensor in config["input"]] == [noise, label]
    assert config["optimization"] == {
        "cuda": {"graphs": True, "graph_spec": [{"input": {"noise": {"dim": noise}, "label": {"dim": label}}}]}
    }
    assert [entry["batch_size"] for entry in config["model_warmup"]] == [1]
    assert not {"max_batch_size", "dynamic_batching"} & set(config)
    assert (written.batch, written.max_batch) == (4, 4)


def test_several_plans_are_chosen_by_compute_capability(tmp_path: Path) -> None:
    files = [
        plan(tmp_path / "two_ada.engine"),
        plan(tmp_path / "hopper.engine", compute_capability=["9.0"], batch=[1, 8, 16]),
        plan(tmp_path / "both.engine", compute_capability=["10.0", "12.0"]),
    ]
    written = write_repository(tmp_path / "repo", files)
    places = {"8.9": "model_sm89.plan", "9.0": "model_sm90.plan"}
    places |= {"10.0": "model_sm100_sm120.plan", "12.0": "model_sm100_sm120.plan"}
    folder = tmp_path / "repo" / "two_ada"
    config = read_config(folder)
    assert config.cc_model_filenames == places
    assert config.max_batch_size == 6  # which all of them take
    assert {path.name for path in (folder / "1").iterdir()} == set(places.values())
    for file, capability in zip(files, ("8.9", "9.0", "12.0"), strict=True):
        assert (folder / "1" / places[capability]).read_bytes() == file.read_bytes()
    assert (written.capabilities, written.arguments) == (("8.9", "9.0", "10.0", "12.0"), ())


def test_a_plan_for_all_gpus_from_ampere_on_serves_those_without_a_plan_of_their_own(tmp_path: Path) -> None:
    files = [
        plan(tmp_path / "ada.engine"),
        plan(tmp_path / "any.engine", hardware_compatible="ampere+", version_compatible=True),
    ]
    written = write_repository(tmp_path / "repo", files)
    folder = tmp_path / "repo" / "ada"
    assert read_config(folder).cc_model_filenames == {"8.9": "model_sm89.plan"}
    assert (folder / "1" / "model.plan").read_bytes() == files[1].read_bytes()
    assert written.capabilities == ("8.9", "8.0+")
    assert written.arguments == ("--backend-config=tensorrt,version-compatible=true",)
    with pytest.raises(
        CmfastError, match=r"any\.engine and .*any\.engine are both for GPUs of compute capability 8\.0\+"
    ):
        write_repository(tmp_path / "twice", [files[1], files[1]])


ENGINES: list[tuple[dict[str, Any], str]] = [
    ({"source": "3" * 64}, r"differ in their weights \(1{64} and 3{64}\)"),
    ({"version": "10.9.0"}, r"version of TensorRT \(10.13.3.9 and 10.9.0\)"),
    ({"platform": "windows"}, "platform"),
    ({"batch": [4, 4, 4]}, "fixed batch"),
    ({"compute_capability": ["9.0", "8.9"]}, r"a\.engine and .*b\.engine are both for GPUs of compute capability 8\.9"),
]


@pytest.mark.parametrize(("other", "words"), ENGINES)
def test_plans_that_one_server_cannot_hold_are_refused(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    files = [plan(tmp_path / "a.engine"), plan(tmp_path / "b.engine", **{"compute_capability": ["9.0"], **other})]
    with pytest.raises(CmfastError, match=words):
        write_repository(tmp_path / "repo", files)
    assert not (tmp_path / "repo").exists()


MAKE_PLAN = "cmfast-export model.pt --kind server --steps 2 --format engine"


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"magic": b"vtrt"}, CmfastError, f"built by tensorrt_rtx, .*: {MAKE_PLAN} --build library=tensorrt; .*onnx"),
        (
            {"batch": [2, 4, 8]},
            CmfastError,
            f"2 to 8, and Triton sends .* from 1; .*: {MAKE_PLAN} --build batch=1,4,8$",
        ),
        ({"batch": [0, 4, 8]}, ArtifactError, "its manifest says batch of the engine wrongly"),
        ({"compute_capability": ["../9.0"]}, ArtifactError, "says compute_capability of the engine wrongly"),
        ({"compute_capability": []}, ArtifactError, f"does not say for which GPUs it is; .*: {MAKE_PLAN}$"),
        ({"kind": "sampler"}, CmfastError, f"is of kind sampler; .*: {MAKE_PLAN}$"),
    ],
)
def test_a_plan_that_triton_cannot_serve_is_refused(
    values: dict[str, Any], error: type[CmfastError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        write_repository(tmp_path / "repo", [plan(tmp_path / "a.engine", **values)])
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a.b"}, "a model's name"),
        ({"name": "../a"}, "a model's name"),
        ({"max_batch": -1}, "max_batch must be at least 1 and at most 4,096 images, got -1"),
        ({"queue_delay_us": -1}, "queue_delay_us must be at least 0 and at most 60,000,000 microseconds, got -1"),
        ({"instances": 0}, "instances must be at least 1 and at most 1,000, got 0"),
        ({"device": "tpu"}, "one of gpu, cpu, auto, got 'tpu'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        ServeOptions(**options)


def test_options_that_a_file_cannot_follow_are_refused(server_file: Make, tmp_path: Path) -> None:
    def refused(file: Path, words: str, **options: Any) -> None:
        with pytest.raises(CmfastError, match=words):
            write_repository(tmp_path / "repo", [file], ServeOptions(**options))
        assert not (tmp_path / "repo").exists()

    refused(server_file(batch=3), "takes exactly 3 images", max_batch=8)
    refused(server_file(batch=3), "takes exactly 3 images", queue_delay_us=100)
    file = plan(tmp_path / "a.engine")
    refused(file, "at most 6, which the plan was built for, got 7", max_batch=7)
    refused(file, "runs on a GPU, not on cpu", device="cpu")


def test_files_that_are_no_servers_are_refused(
    server_file: Make, handmade_onnx: Make, samplers: Graphs, tmp_path: Path
) -> None:
    with pytest.raises(CmfastError, match=r"is of kind denoiser; .*--format triton"):
        write_repository(tmp_path / "repo", [handmade_onnx()])
    for models in ([], [server_file(), server_file()], [server_file(), plan(tmp_path / "a.plan")]):
        with pytest.raises(CmfastError, match=r"one \.onnx file, or TensorRT plans"):
            write_repository(tmp_path / "repo", models)
    graph, spec = samplers()
    lies = tmp_path / "lies.onnx"  # a sampler's graph under a server's manifest
    write_with_manifest(graph, Manifest(kind="server", spec=spec, made_by={"cmfast": "0"}), lies)
    with pytest.raises(ArtifactError, match=r"the graph has noise \[2, B, 1, 8, 8\], label \[B\]; export it again"):
        write_repository(tmp_path / "repo", [lies])


def test_a_folder_with_something_in_it_is_left_alone(server_file: Make, tmp_path: Path) -> None:
    precious = tmp_path / "repo" / "precious"
    precious.parent.mkdir()
    precious.write_text("precious")
    with pytest.raises(CmfastError, match="is not a model repository: precious in it is not a model"):
        write_repository(tmp_path / "repo", [server_file()])
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]


def test_a_second_model_joins_the_first_and_a_third_of_the_same_name_is_refused(
    server_file: Make, tmp_path: Path
) -> None:
    out = tmp_path / "repo"
    write_repository(out, [server_file()], ServeOptions(name="one"))
    before = (out / "one" / "config.pbtxt").read_bytes()
    write_repository(out, [server_file()], ServeOptions(name="two"))
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]
    assert (out / "two" / "config.pbtxt").read_bytes() == before.replace(b'"one"', b'"two"')
    with pytest.raises(CmfastError, match=r"has two already; give this model another name, --serve name=NAME, or"):
        write_repository(out, [server_file()], ServeOptions(name="two"))
    assert (out / "one" / "config.pbtxt").read_bytes() == before


@pytest.mark.parametrize(
    ("stem", "asked", "name"),
    [
        ("two.steps", "", "two_steps"),
        ("cd imagenet64-l2", "", "cd_imagenet64_l2"),
        ("..", "", "model"),
        ("模型", "", "model"),
        ("two.steps", "a-b", "a-b"),
    ],
)
def test_a_model_is_called_as_asked_or_like_its_file_as_far_as_triton_allows(stem: str, asked: str, name: str) -> None:
    assert model_name(stem, ServeOptions(name=asked)) == name


@given(st.text())
def test_every_file_gives_a_name_that_the_check_takes(stem: str) -> None:
    check_name(model_name(stem))


def test_a_model_that_cannot_be_written_is_refused_before_its_files_are_there(
    server_file: Make, tmp_path: Path
) -> None:
    out = tmp_path / "repo"
    check_repository(out, "two_steps")
    assert not out.exists()
    write_repository(out, [server_file()])
    check_repository(out, "another")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes").touch()
    (tmp_path / "file").touch()
    for where, name, words in (
        ("repo", "two_steps", f"repo has two_steps already; .*, or remove {out}/two_steps"),
        ("repo", ".hidden", "a model's name for Triton is letters"),
        ("precious", "a", "is not a model repository: notes in it is not a model"),
        ("file", "a", "exists and is not a folder"),
        ("no/where", "a", "does not exist; make it first"),
    ):
        with pytest.raises(CmfastError, match=words):
            check_repository(tmp_path / where, name)


def test_a_repository_that_nothing_can_be_moved_into_is_refused(
    server_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "repo"
    write_repository(out, [server_file()])
    for module, name, value, words in (
        (os, "access", lambda path, mode: Path(path) != tmp_path, f"{tmp_path} is not writable"),  # to root all is
        (os.path, "ismount", lambda path: Path(path) == out, f"{out} is a file system of its own"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            with pytest.raises(CmfastError, match=f"but {words}; .*: -o new, then mv new/b {out}$"):
                check_repository(out, "b")
    check_repository(out, "b")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Return a function that lets the n-th copy of a file stop halfway; it gives the list of where copies went."""

    def stop(number: int, error: type[BaseException], then: Callable[[], None] = lambda: None) -> list[Path]:
        copied: list[Path] = []

        def half(source: Path, target: Path) -> None:
            copied.append(target)
            target.write_bytes(source.read_bytes()[:100])
            if len(copied) == number:
                then()
                raise error("no space left on device")

        monkeypatch.setattr(shutil, "copyfile", half)
        return copied

    return stop


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_halfway_leaves_nothing(
    error: type[BaseException], server_file: Make, copies: Callable[..., list[Path]], tmp_path: Path
) -> None:
    copied = copies(2, error)
    with pytest.raises(error, match="no space"):
        write_repository(tmp_path / "repo", [server_file(data=True)])
    assert len(copied) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [False, True])
def test_a_server_that_watches_the_repository_never_sees_half_a_model(
    inside: bool,
    server_file: Make,
    copies: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "repo"
    write_repository(out, [server_file()])
    if inside:
        monkeypatch.chdir(out)
    seen: list[set[str]] = []
    copied = copies(1, KeyboardInterrupt, lambda: seen.append({path.name for path in out.rglob("*")}))
    with pytest.raises(KeyboardInterrupt):
        write_repository("." if inside else out, [server_file()], ServeOptions(name="second"))
    assert seen == [{"two_steps", "config.pbtxt", "1", "model.onnx"}]  # nothing of the second, hidden or not
    assert copied[0].is_relative_to(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]
    assert [path.name for path in out.iterdir()] == ["two_steps"]


@pytest.mark.parametrize("others", [True, False])
def test_what_a_killed_run_left_hidden_in_a_repository_is_not_in_the_way(
    others: bool, server_file: Make, tmp_path: Path
) -> None:
    out = tmp_path / "repo"
    if others:
        write_repository(out, [server_file()])
    left = out / ".second.abc.tmp" / "1" / "model.onnx"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    write_repository(out, [server_file()], ServeOptions(name="second"))
    assert read_config(out / "second").name == "second"
    assert left.read_bytes() == b"half"
    assert {path.name for path in out.iterdir()} == {".second.abc.tmp", "second", *(["two_steps"] if others else [])}


def test_an_empty_folder_becomes_a_repository_and_stays_the_same_folder(
    server_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, out in (("here", "."), ("link", "link")):
        folder = tmp_path / f"of_{name}"
        folder.mkdir()
        monkeypatch.chdir(folder if out == "." else tmp_path)
        if out == "link":
            Path("link").symlink_to(folder)
        before = folder.stat().st_ino
        write_repository(out, [server_file()])
        assert folder.stat().st_ino == before  # a shell that stands in it still does
        assert [path.name for path in folder.iterdir()] == ["two_steps"]
