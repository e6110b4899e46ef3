# SPDX-License-Identifier: MIT
"""OpenVINO as a backend: ONNX Runtime's samples, a precision that is stated, compiled graphs that are kept."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import cmfast
from cmfast.backends import float32, open_backend
from cmfast.backends.openvino import compiled, library, precise
from cmfast.backends.openvino.backend import OpenVinoBackend
from cmfast.errors import ArtifactError, BackendError
from cmfast.formats.manifest import Manifest
from helpers.graphs import sampled, write_denoiser
from helpers.specs import image_spec

pytestmark = pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")

STATE = {"name": "state", "kind": "tensor", "shape": [3, None]}
LABEL = {"name": "label", "kind": "class", "classes": 10}
SHAPES = [[6], [5, 4], [2, 4, 4], [2, 3, 3, 3]]
ALL = {"second_time": True, "data": "array", "conditions": [LABEL, STATE], "renoise": "ddim", "clip": False}


def opened(path: Path, **options: Any) -> OpenVinoBackend:
    backend = open_backend(path, variant="openvino", **options)
    assert isinstance(backend, OpenVinoBackend)
    return backend


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_draws_what_onnx_runtime_draws_at_any_rank_with_conditions_and_a_second_time(
    shape: list[int], tmp_path: Path
) -> None:
    path = write_denoiser(tmp_path / "model.onnx", ALL | {"shape": shape})
    ours, theirs = cmfast.load(path, variant="openvino"), cmfast.load(path)
    for size, n in ((2, 3), (5, 1)):  # another size of the condition, another batch
        state = np.random.default_rng(size).standard_normal((n, 3, size), dtype=np.float32)
        given: dict[str, Any] = {"steps": 3, "conditions": {"state": state}, "label": 7}
        want = theirs.sample_float(n, **given)
        np.testing.assert_allclose(ours.sample_float(n, **given), want, rtol=1e-5, atol=1e-5)  # the order of sums
        assert np.ptp(want) > 0.1


def graph(path: Path, kind: str, batch: Any = "B") -> Path:
    """Write out = noise of step 0 - noise of step 1 as a sampler or a server."""
    axis = int(kind == "server")
    numbers = [helper.make_tensor(name, TensorProto.INT64, [], [index]) for index, name in enumerate(("zero", "one"))]
    nodes = [helper.make_node("Gather", ["noise", name], [f"z{name}"], axis=axis) for name in ("zero", "one")]
    nodes.append(helper.make_node("Sub", ["zzero", "zone"], ["images"]))
    shape = [2, batch] if kind == "sampler" else [batch, 2]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)
        for name, sides in (("noise", [*shape, 1, 4, 4]), ("images", [batch, 1, 4, 4]))
    ]
    made = helper.make_graph(nodes, "graph", values[:1], values[1:], numbers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = image_spec(image=(1, 4, 4), sigmas={2: (80.0, 0.8)})
    helper.set_model_props(model, {"cmfast": Manifest(kind=kind, spec=spec).to_json()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("variant", ["openvino", "openvino throughput"])
@pytest.mark.parametrize(("kind", "batch"), [("sampler", "B"), ("server", "B"), ("sampler", 4), ("server", 4)])
def test_samplers_and_servers_run_in_whole_and_in_parts(kind: str, batch: Any, variant: str, tmp_path: Path) -> None:
    model = cmfast.load(graph(tmp_path / "model.onnx", kind, batch), threads=2, variant=variant)
    assert model.backend.batch == (None if batch == "B" else batch)
    for n in (3, 1):  # three in two parts: the last sample is computed twice
        noise = np.random.default_rng(0).standard_normal((2, n, 1, 4, 4), dtype=np.float32)
        np.testing.assert_array_equal(model.from_noise(noise, (80.0, 0.8)), noise[0] - noise[1])


def test_inputs_that_a_graph_does_not_read_are_taken_and_a_graph_of_others_is_refused(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "model.onnx", {"conditions": [LABEL]})
    model = onnx.load(path)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Identity", ["x"], ["denoised"]))
    onnx.save(model, path)
    loaded = cmfast.load(path, variant="openvino")
    x = np.ones((2, 1, 4, 4), np.float32)
    np.testing.assert_array_equal(loaded.denoise(x, 5.0, label=3), x)
    model.graph.input[0].name = model.graph.node[0].input[0] = "y"
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="the graph's inputs are y; its manifest needs x, sigma, label"):
        opened(path)


def test_a_batch_has_a_stream_for_each_of_its_parts(tmp_path: Path) -> None:
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx"), threads=2, variant="openvino throughput")
    assert isinstance(model.backend, OpenVinoBackend)
    for n, streams in ((1, 1), (2, 2), (3, 2)):
        model.sample(n)
        ready = list(model.backend._graphs._static.values())[-1]
        found = [ready[0].compiled.get_property(name) for name in ("NUM_STREAMS", "INFERENCE_NUM_THREADS")]
        assert (len(ready), *found) == (streams, streams, 2)


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx"), variant="openvino")
    first = model.sample_float(2, seed=1)
    kept = first.copy()
    model.sample_float(2, seed=2)
    np.testing.assert_array_equal(first, kept)


# Precision.


def test_float32_is_multiplied_as_float32_and_bfloat16_is_not() -> None:
    ov = library.import_openvino("this test")
    core = ov.Core()
    if "BF16" not in library.capabilities(core):
        pytest.skip("this CPU has no bfloat16")

    def errors(precision: str) -> dict[str, float]:
        def run(op: str, a: float32.Floats, b: float32.Floats) -> float32.Floats:
            sides = {"a": list(a.shape), "b": list(b.shape)}
            values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, each) for name, each in sides.items()]
            y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
            graph = helper.make_graph([helper.make_node(op, ["a", "b"], ["y"])], "graph", values, [y])
            opsets = [helper.make_opsetid("", 18)]
            model = core.read_model(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
            made = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
            result: float32.Floats = made({"a": a, "b": b})[0]
            return result

        return float32.measured(lambda a, b: run("MatMul", a, b), lambda x, w: run("Conv", x, w))

    assert max(errors("f32").values()) < float32.LIMIT
    assert min(errors("bf16").values()) > float32.LIMIT, "what the next test relies on"


def test_a_file_is_run_in_its_own_precision_unless_another_is_requested(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "model.onnx")
    plain = opened(path)
    assert (plain.manifest.dtype, plain.name) == ("float32", "OpenVINO cpu")
    properties = plain._graphs._properties
    assert properties["INFERENCE_PRECISION_HINT"] == "f32", "on a CPU with AMX OpenVINO would take bfloat16"
    if "BF16" not in library.capabilities(plain._graphs._core):
        pytest.skip("this CPU has no bfloat16")
    half = opened(path, precision="bf16")
    assert (half.manifest.dtype, half.name) == ("bfloat16", "OpenVINO cpu bfloat16")
    half.run({"x": np.zeros((1, 1, 4, 4), np.float32), "sigma": np.ones(1, np.float32)})
    (ready,) = half._graphs._static.values()
    assert ready[0].compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "bf16"


def test_a_bfloat16_file_runs_where_the_cpu_has_it(tmp_path: Path) -> None:
    """ONNX Runtime has no such convolutions on a CPU."""
    if "BF16" not in library.capabilities(library.import_openvino("this test").Core()):
        pytest.skip("this CPU has no bfloat16")
    weights = np.full((1, 1, 3, 3), 0.125, np.float32).view(np.uint32) >> 16
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [1, 1, 3, 3], weights.astype(np.uint16).tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["narrow", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["y"], ["denoised"], to=TensorProto.FLOAT),
    ]
    image = ["B", 1, 4, 4]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, image) for name in ("x", "denoised")]
    values.insert(1, helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["B"]))
    made = helper.make_graph(nodes, "graph", values[:2], values[2:], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 4, 4)), dtype="bfloat16")
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    onnx.save(model, tmp_path / "model.onnx")
    loaded = cmfast.load(tmp_path / "model.onnx", variant="openvino")
    assert loaded.backend.name == "OpenVINO cpu bfloat16"
    got = loaded.denoise(np.ones((1, 1, 4, 4), np.float32), 1.0)
    np.testing.assert_array_equal(got[0, 0, :2, :2], [[0.5, 0.75], [0.75, 1.125]])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_precision_that_the_cpu_lacks_is_one_line_with_those_that_it_has(
    precision: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "capabilities", lambda core: frozenset({"FP32", "INT8"}))  # as of a CPU with AVX2 only
    path = write_denoiser(tmp_path / "model.onnx")
    with pytest.raises(BackendError) as caught:
        opened(path, precision=precision)
    assert str(caught.value).startswith(f"{path}: {dtype}, which OpenVINO lacks on this CPU (")
    assert str(caught.value).endswith("); pass --precision fp32")
    half = write_denoiser(tmp_path / "half.onnx", {"dtype": dtype})
    with pytest.raises(BackendError, match=f"{dtype}, which OpenVINO lacks"):
        opened(half)
    assert opened(half, precision="fp32").manifest.dtype == "float32"
    tf32 = write_denoiser(tmp_path / "tf32.onnx", {"dtype": "tf32"})
    with pytest.raises(BackendError, match="a file in tf32, which no CPU computes in; pass --precision fp32 to run it"):
        opened(tf32)


def test_another_precision_than_the_requested_one_is_never_taken_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ov = library.import_openvino("this test")
    if "FP16" in library.capabilities(ov.Core()):
        pytest.skip("this CPU has float16")
    monkeypatch.setattr(library, "capabilities", lambda core: frozenset({"FP32", "FP16"}))
    backend = opened(write_denoiser(tmp_path / "model.onnx"), precision="fp16")
    with pytest.raises(BackendError, match=r"OpenVINO was to compute in f16 and chose \w+ on this CPU"):
        backend.run({"x": np.zeros((1, 1, 4, 4), np.float32), "sigma": np.ones(1, np.float32)})


def test_marks_go_into_layers_of_the_top_level_alone() -> None:
    body = '<layer id="1" name="a"><body><layer id="2" name="b"></layer></body></layer>'
    graph = f'<layer id="0" name="x" />{body}<layer id="2" name="c"><data /></layer><layer id="12"></layer>'
    marked = precise.with_marks(graph.encode(), {0, 2}).decode()
    assert marked.replace(f"\n\t\t\t<rt_info>{precise.MARK}</rt_info>", "") == graph
    assert marked.count(precise.MARK) == 1
    assert marked.index(precise.MARK) > marked.index('name="c"')


def test_angles_of_conditions_stay_float32_too_and_products_do_not(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "model.onnx", {"conditions": [{"name": "place", "kind": "tensor", "shape": [4]}]})
    model = onnx.load(path)
    nodes = [
        helper.make_node("MatMul", ["place", "weight"], ["angles"]),
        helper.make_node("Exp", ["angles"], ["far"]),
        helper.make_node("Sin", ["far"], ["sines"]),
        helper.make_node("Neg", ["sines"], ["place_sines"]),
    ]
    for node in model.graph.node:
        node.input[:] = ["place_sines" if name == "place" else name for name in node.input]
    for index, node in enumerate(nodes):
        model.graph.node.insert(index, node)
    model.graph.initializer.append(helper.make_tensor("weight", TensorProto.FLOAT, [4, 4], [0.5] * 16))
    graph = library.import_openvino("this test").Core().read_model(model.SerializeToString())
    operations = graph.get_ordered_ops()
    kept = {operations[place].get_type_name() for place in precise.to_mark(graph)}
    assert {"Exp", "Sin", "Add", "Divide"} <= kept  # the last two: 1 + sigma, x / (1 + sigma)
    assert not kept & {"MatMul", "Negative", "Constant", "Parameter", "Result"}


# What is kept.


def test_a_bounded_number_of_batch_sizes_is_kept_and_one_graph_for_all_others(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "model.onnx")
    model, reference = cmfast.load(path, variant="openvino"), cmfast.load(path)
    backend = model.backend
    assert isinstance(backend, OpenVinoBackend)
    graphs = backend._graphs

    def draw(n: int) -> None:
        np.testing.assert_allclose(model.sample_float(n), reference.sample_float(n), rtol=1e-5, atol=1e-6)

    for n in range(1, compiled.KEPT + 1):
        draw(n)
    assert len(graphs._static) == compiled.KEPT
    before = dict(graphs._static)
    for n in (20, 21, 20, 21):  # sizes that alternate never take a place
        draw(n)
    assert dict(graphs._static) == before
    assert graphs._any is not None
    draw(1)  # used, so it is not the next to go
    for _ in range(compiled.REPEATED):
        draw(22)
    assert len(graphs._static) == compiled.KEPT
    gone = before.keys() - graphs._static.keys()
    assert [list(before).index(key) for key in gone] == [1]


def test_dynamic_sizes_of_conditions_need_no_other_graph(tmp_path: Path) -> None:
    changes = {"conditions": [STATE]}
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes), variant="openvino")
    noise = np.random.default_rng(0).standard_normal((1, 2, 1, 4, 4), dtype=np.float32)
    for size in range(1, 9):
        state = np.full((2, 3, size), 0.25 * size, np.float32)
        got = model.from_noise(noise, (80.0,), conditions={"state": state})
        np.testing.assert_allclose(got, sampled(noise, changes, 1, 0.25 * size), rtol=1e-5, atol=1e-6)
    assert isinstance(model.backend, OpenVinoBackend)
    assert len(model.backend._graphs._static) == 1


def test_compiled_graphs_are_kept_on_disk_by_content_and_a_damaged_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("CMFAST_CACHE", str(cache))
    path = write_denoiser(tmp_path / "model.onnx")
    want = cmfast.load(path).sample_float(2)
    made: list[str] = []
    keep = compiled.Graphs._keep

    def seen(graphs: compiled.Graphs, name: str, graph: Any) -> None:
        made.append(name)
        keep(graphs, name, graph)

    monkeypatch.setattr(compiled.Graphs, "_keep", seen)

    def draws(file: Path, compilations: int, n: int = 2) -> None:
        made.clear()
        got = cmfast.load(file, variant="openvino").sample_float(n)
        np.testing.assert_allclose(got, want[:n], rtol=1e-5, atol=1e-6)
        assert len(made) == compilations

    draws(path, 1)
    (entry,) = cache.iterdir()
    draws(path, 0)
    path = path.rename(tmp_path / "moved.onnx")
    draws(path, 0)
    entry.write_bytes(entry.read_bytes()[:-1])
    draws(path, 1)
    draws(path, 0)
    draws(path, 1, n=1)
    other = write_denoiser(tmp_path / "other.onnx", {"sigma_data": 0.4})  # another manifest: another file
    draws(other, 1)
    cache.chmod(0o777)
    with pytest.raises(cmfast.CmfastError, match="others may write to the cache"):
        cmfast.load(path, variant="openvino")


# What is refused, and how.


def test_files_and_ways_that_it_does_not_run_are_one_line(tmp_path: Path) -> None:
    path = write_denoiser(tmp_path / "model.onnx")
    with pytest.raises(BackendError, match="cmfast runs OpenVINO on the CPU only, not on cuda: --device cpu"):
        opened(path, device="cuda")
    with pytest.raises(BackendError, match="OpenVINO has the variants '', 'throughput', not 'nhwc'"):
        open_backend(path, variant="openvino nhwc")
    with pytest.raises(BackendError, match="an exported file runs in the precision that it was exported with"):
        open_backend(path, precision="bf16")
    beside = tmp_path / "beside.onnx"
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [400], bytes(1600), raw=True))
    onnx.save(model, beside, save_as_external_data=True, location="beside.data", size_threshold=1000)
    with pytest.raises(ArtifactError, match=r"its weights are in another file.*--format openvino"):
        opened(beside)
    nodes = [helper.make_node("Nothing", ["x"], ["denoised"])]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    unknown = tmp_path / "unknown.onnx"
    onnx.save(model, unknown)
    with pytest.raises(ArtifactError, match=r"unknown\.onnx: OpenVINO cannot read it: ") as caught:
        opened(unknown)
    assert "\n" not in str(caught.value)


def test_a_model_can_be_pickled(tmp_path: Path) -> None:
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx"), variant="openvino throughput", threads=2)
    again = pickle.loads(pickle.dumps(model))
    assert again.backend.name == model.backend.name == "OpenVINO cpu throughput"
    np.testing.assert_array_equal(again.sample(2), model.sample(2))


def test_importing_it_sends_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from cmfast.backends.openvino.library import import_openvino as get; ov = get('this'); ov.Core(); "
    )
    code += "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**_paths(), "HOME": str(tmp_path)}
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, sys.path))}


def test_without_it_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_denoiser(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(cmfast.MissingDependency) as caught:
        opened(path)
    assert str(caught.value) == (
        "running model.onnx by OpenVINO needs openvino, which is not installed: pip install 'cmfast[openvino]'"
    )
