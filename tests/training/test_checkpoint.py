# SPDX-License-Identifier: MIT
"""Checkpoints: what goes in comes out, and whatever else the file is, nothing in it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from cmfast.errors import ArtifactError
from cmfast_train.checkpoint import Checkpoint, is_finite, load_checkpoint, safe_load, save_checkpoint
from cmfast_train.importers import load_model
from cmfast_train.networks.adm import AdmUnet, randomise
from helpers.specs import image_spec

SUFFIXES = [".pt", ".safetensors"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint())


@pytest.fixture
def stays_unrun(tmp_path: Path) -> Any:
    """Return an object whose unpickling creates a file, and check in the end that nothing did."""
    proof = tmp_path / "it ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(proof),)

    yield Hostile()
    assert not proof.exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert proof.exists()  # the check above can fail


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("classes", [0, 10])
def test_a_checkpoint_survives_its_file(
    classes: int, suffix: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    before = load_checkpoint(tiny_checkpoint(classes, suffix))
    save_checkpoint(before, tmp_path / f"again{suffix}")
    after = load_checkpoint(tmp_path / f"again{suffix}")
    assert (after.spec, after.network) == (before.spec, before.network)
    assert after.weights.keys() == before.weights.keys()
    for name, tensor in before.weights.items():
        np.testing.assert_array_equal(after.weights[name], tensor)
    assert after.sha256() == before.sha256() == load_checkpoint(tiny_checkpoint(classes)).sha256()
    assert os.listdir(tmp_path) == [f"again{suffix}"]


def test_a_checkpoint_is_plain_containers_and_tensors(tiny_checkpoint: Callable[..., Path]) -> None:
    content = torch.load(tiny_checkpoint(), weights_only=True)
    assert list(content) == ["format", "spec", "network", "weights"]
    assert content["format"] == "cmfast/2"
    assert content["spec"] == image_spec(image=(1, 8, 8), classes=10).to_dict()
    assert content["network"]["type"] == "adm"
    assert {type(tensor) for tensor in content["weights"].values()} == {Tensor}


def test_the_model_of_a_checkpoint_computes_what_its_network_computed(checkpoint: Checkpoint) -> None:
    network = AdmUnet(checkpoint.network).eval()
    randomise(network)
    x, sigma, label = torch.randn(3, 1, 8, 8), torch.tensor([0.002, 1.0, 80.0]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        got = checkpoint.denoiser()(x, sigma, label=label)
        c_skip, c_out, c_in = 0.25 / ((1 - 0.002) ** 2 + 0.25), (1 - 0.002) * 0.5 / 1.25**0.5, 1 / 1.25**0.5
        want = c_skip * x[1:2] + c_out * network(c_in * x[1:2], torch.zeros(1), label[1:2])
    np.testing.assert_allclose(got[1:2], want, atol=1e-5)  # another batch size rounds differently
    np.testing.assert_array_equal(got[0], x[0])  # sigma_min: the identity


def test_the_sha256_is_of_names_shapes_and_bytes_whatever_their_order(checkpoint: Checkpoint) -> None:
    names = list(checkpoint.weights)
    turned = dataclasses.replace(checkpoint, weights={name: checkpoint.weights[name] for name in reversed(names)})
    strided = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in checkpoint.weights.items()
    }
    assert checkpoint.sha256() == turned.sha256() == dataclasses.replace(checkpoint, weights=strided).sha256()

    digest = hashlib.sha256()
    for name in sorted(names):
        array = checkpoint.weights[name].numpy()
        digest.update(f"{name} torch.float32 {list(array.shape)}\n".encode() + array.astype("<f4").tobytes())
    assert checkpoint.sha256() == digest.hexdigest()


@pytest.mark.parametrize("change", ["one bit", "a name", "a shape", "two swapped"])
def test_the_sha256_changes_with_everything_it_is_of(change: str, checkpoint: Checkpoint) -> None:
    weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    first, second = "out.0.weight", "out.0.bias"
    if change == "one bit":
        weights[first].view(torch.int32)[3] ^= 1
    elif change == "a name":
        weights["renamed"] = weights.pop(first)
    elif change == "a shape":
        weights[first] = weights[first].reshape(2, -1)
    else:
        weights[first], weights[second] = weights[second], weights[first]
    assert dataclasses.replace(checkpoint, weights=weights).sha256() != checkpoint.sha256()


# Files that are something else.


@pytest.mark.parametrize("place", ["alone", "among weights", "as a key", "old format", "plain pickle", "protocol 4"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    place: str, stays_unrun: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    content: Any = {"format": "cmfast/1", "weights": {"w": torch.zeros(1), "x": stays_unrun}}
    if place == "alone":
        torch.save(stays_unrun, path)
    elif place == "as a key":
        torch.save({stays_unrun: 1, **content}, path)
    elif place == "old format":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif place == "plain pickle":
        path.write_bytes(pickle.dumps(stays_unrun, protocol=2))
    elif place == "protocol 4":
        path.write_bytes(pickle.dumps(stays_unrun, protocol=4))
    else:
        torch.save(content, path)
    with pytest.raises(ArtifactError, match=r"model\.pt: ") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)
    if place != "protocol 4":
        assert "it holds code or objects (posix.mkdir), not only tensors; refused, nothing in it was run" in str(
            raised.value
        )


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x04.", bytes(1000), b"PK\x03\x04" + bytes(100), b"\x89PNG\r\n\x1a\n"]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_kind_of_file_is_refused_in_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"model\{suffix}: ") as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ArtifactError, match="not a whole PyTorch file"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"weights": [1]}, {"state_dict": {}}, torch.zeros(3), None, {}], ids=repr)
def test_a_pytorch_file_of_another_kind_is_told_what_writes_the_right_one(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(
        ArtifactError,
        match=r"a PyTorch file, but (not a cmfast checkpoint; cmfast-train writes|it holds a \w+, no named)",
    ):
        load_checkpoint(tmp_path / "model.pt")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_crashes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged_weights.pt"
    torch.save({"w": torch.ones(2, 3), "n": [1, {"a": 2.5}]}, file)
    content = bytearray(file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(ArtifactError):
        safe_load(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(bad: float, dtype: torch.dtype) -> None:
    for shape in ((), (1,), (3, 5), (64, 33, 3, 3)):  # shorter and longer than a vector register, and over threads
        tensor = torch.randn(shape).to(dtype)
        assert is_finite(tensor)
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            wrong = tensor.clone()
            wrong.view(-1)[place] = bad
            assert not is_finite(wrong)
            assert not is_finite(wrong.T if wrong.ndim == 2 else wrong)
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    assert is_finite(torch.tensor(torch.finfo(dtype).max, dtype=dtype))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere\.pt: no such file"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_safetensors_of_another_program_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    deep = '{"format":' + "[" * 100_000
    for metadata in (None, {"cmfast": "no json"}, {"cmfast": "[]"}, {"format": "pt"}, {"cmfast": deep}):
        save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=metadata)
        with pytest.raises(ArtifactError, match=r"not a cmfast checkpoint.*cmfast-train writes DIR/model.pt"):
            load_checkpoint(tmp_path / "model.safetensors")


# Files that are damaged.


def content_of(checkpoint: Checkpoint) -> dict[str, Any]:
    network = dataclasses.asdict(checkpoint.network)
    network = {"type": "adm", **{k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}}
    return {
        "format": "cmfast/1",
        "spec": checkpoint.spec.to_dict(),
        "network": network,
        "weights": dict(checkpoint.weights),
    }


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("format",), "cmf\x00st/1", r"a damaged cmfast checkpoint: its format is 'cmf\\x00st/1', not 'cmfast/2'"),
        (("format",), None, "a damaged cmfast checkpoint: its format is missing, not 'cmfast/2'; copy the file again"),
        (("format",), [1], "a damaged cmfast checkpoint: its format is a list"),
        (("weights",), None, "a damaged cmfast checkpoint: its weights are missing, not named tensors"),
        (("weights",), [torch.zeros(3)], "a damaged cmfast checkpoint: its weights are a list, not named tensors"),
        (("format",), "cmfast/3", "a checkpoint of format 'cmfast/3', this version reads 'cmfast/1' and 'cmfast/2'"),
        (("spec",), None, "description is malformed"),
        (("spec", "shape"), [1, 8], "images have the shape"),
        (("spec", "shape"), [1, 16, 16], "its network and its spec disagree"),
        (("spec", "conditions"), [], "its network and its spec disagree"),
        (("network",), None, "description is malformed"),
        (("network", "type"), "dit", "unknown network type 'dit'; this version knows adm"),
        (("network", "invented"), 1, "description is malformed"),
        (("network", "channel_mult"), [], "description is malformed"),
        (("network", "channel_mult"), "12", "description is malformed"),
        (("network", "head_channels"), 0, "description is malformed"),
        (("network", "model_channels"), None, "description is malformed"),
        (("weights", "w"), 3, "its weights are not named tensors"),
        (("weights", 3), torch.zeros(1), "its weights are not named tensors"),
    ],
)
def test_a_wrong_description_is_refused_with_its_place(
    place: tuple[Any, ...], value: Any, words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    content = content_of(checkpoint)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    torch.save(content, tmp_path / "model.pt")
    for read in (load_checkpoint, load_model):  # what takes foreign files too does not take it for one
        with pytest.raises(ArtifactError, match=rf"model\.pt: .*{words}"):
            read(tmp_path / "model.pt")


def test_a_checkpoint_without_its_format_is_not_taken_for_a_foreign_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    content = content_of(checkpoint)
    del content["format"]
    torch.save(content, tmp_path / "model.pt")
    head = json.dumps({name: value for name, value in content.items() if name != "weights"})
    save_file(content["weights"], tmp_path / "model.safetensors", metadata={"cmfast": head})
    for suffix in SUFFIXES:
        for read in (load_checkpoint, load_model):
            with pytest.raises(ArtifactError, match=r"a damaged cmfast checkpoint: its format is missing"):
                read(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_the_network_are_refused(change: str, checkpoint: Checkpoint) -> None:
    weights = dict(checkpoint.weights)
    if change == "missing":
        del weights["out.0.weight"]
    elif change == "extra":
        weights["extra"] = torch.zeros(1)
    else:
        weights["out.0.weight"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match=r"the weights do not fit the network: .*(out\.0\.weight|extra)") as raised:
        dataclasses.replace(checkpoint, weights=weights).denoiser()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused_in_one_line(
    suffix: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = tiny_checkpoint(10, suffix).read_bytes()
    path = tmp_path / f"model{suffix}"
    for size in {0, 1, 8, 100, len(whole) // 4, len(whole) // 2, len(whole) - 1000, len(whole) - 22, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=rf"model\{suffix}: ") as raised:
            load_checkpoint(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bytes_are_loaded_or_refused_and_nothing_else(
    suffix: str, data: st.DataObject, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(tiny_checkpoint(0, suffix).read_bytes())
    ends = st.integers(0, 6000) | st.integers(len(damaged) - 6000, len(damaged) - 1)  # the headers and the directory
    for position in data.draw(st.lists(ends, min_size=1, max_size=4)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / f"flipped{suffix}"
    path.write_bytes(damaged)
    try:
        load_checkpoint(path).denoiser()
    except ArtifactError as err:
        assert "\n" not in str(err)  # noqa: PT017, the other outcome is as good
