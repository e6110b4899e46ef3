# SPDX-License-Identifier: MIT
"""Files of weights as people have them: averages in every spelling, other files by the same name, and traps."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import resource
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from cmfast_train.importers import load_model, pickle_opcodes, pickles
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise

Make = Callable[..., Any]
CONFIG = AdmConfig(
    image_size=8, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,), head_channels=32
)
TOLD = ("image_size=8", "head_channels=32", "qkv=3hd", "scaling=boundary")


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    network = AdmUnet(CONFIG)
    randomise(network)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def average(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in raw.items()}


def load(content: Any, folder: Path, weights: str | None = None) -> dict[str, Tensor]:
    torch.save(content, folder / "model.pt")
    said = [*TOLD, *([] if weights is None else [f"weights={weights}"])]
    return dict(load_model(folder / "model.pt", "openai", Given.parse(said)).weights)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def shadow(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": 5, "shadow_params": list(weights.values())}


BOTH: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]] = {
    "model, ema.shadow_params": lambda raw, ema: {"ema": shadow(ema), "model": raw},
    "model, ema": lambda raw, ema: {"model": raw, "ema": ema},
    "model_state, ema_state_dict": lambda raw, ema: {"model_state": raw, "ema_state_dict": ema},
    "model, emas.0.shadow_params": lambda raw, ema: {"model": raw, "emas": [shadow(ema)]},
    "model, ema.0.9999": lambda raw, ema: {"model": raw, "ema": {"0.9999": ema}},
    "online_model, ema_model": lambda raw, ema: (
        prefixed("online_model.", raw) | prefixed("ema_model.", ema)
        | {"initted": torch.tensor(True), "step": torch.tensor(7)}
    ),
    "state_dict.model, state_dict.model_ema": lambda raw, ema: {
        "state_dict": prefixed("model.diffusion_model.", raw)
        | {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in ema.items()}
        | {"model_ema.num_updates": torch.tensor(3, dtype=torch.int32), "model_ema.decay": torch.tensor(0.9)}
    },
    "net, teacher": lambda raw, ema: prefixed("net.module.", raw) | prefixed("teacher.", ema),
}  # fmt: skip


@pytest.mark.parametrize("names", BOTH)
def test_raw_and_averaged_weights_in_one_file_are_two_sets_that_the_user_chooses_from(
    names: str, raw: dict[str, Tensor], average: dict[str, Tensor], tmp_path: Path
) -> None:
    content, (first, second) = BOTH[names](raw, average), names.split(", ")
    with pytest.raises(CmfastError, match=r"holds 2 set\(s\) of weights .*choose one, for example --set weights="):
        load(content, tmp_path)
    assert same(load(content, tmp_path, first), raw)
    assert same(load(content, tmp_path, second), average)


@pytest.mark.parametrize(
    "better", ["ema", "swa_model", "target_model", "best_model", "averaged_model", "EMA", "model_ema"]
)
@pytest.mark.parametrize("first", [True, False])
def test_of_raw_and_better_weights_the_advice_names_the_better_ones(
    better: str, first: bool, raw: dict[str, Tensor], average: dict[str, Tensor], tmp_path: Path
) -> None:
    sets = {better: average, "model": raw}
    with pytest.raises(CmfastError, match=rf"choose one, for example --set weights={better}$"):
        load(sets if first else dict(reversed(sets.items())), tmp_path)


def test_the_advice_prefers_an_average_to_a_target_to_raw_weights_and_knows_words_from_their_parts(
    raw: dict[str, Tensor], average: dict[str, Tensor], tmp_path: Path
) -> None:
    sets = {"schema": raw, "model": raw, "best_model": average, "target_model": average, "swa_model": average}
    for gone, advice in (("", "swa_model"), ("swa_model", "target_model"), ("target_model", "best_model")):
        sets.pop(gone, None)
        with pytest.raises(CmfastError, match=rf"for example --set weights={advice}$"):
            load(sets, tmp_path)
    many = {f"step{n}": {"w": torch.zeros(2, 2)} for n in range(200)}
    with pytest.raises(CmfastError, match=r"more than 64 .*for example --set weights=best_model$"):
        load(sets | many, tmp_path)


def test_an_average_without_names_that_fits_no_set_is_said_to_be_there(
    raw: dict[str, Tensor], average: dict[str, Tensor], tmp_path: Path
) -> None:
    turned = list(average.values())[::-1]
    in_order = {name: raw[name] for name in sorted(raw)}
    for content in (
        {"model": raw, "ema": {"shadow_params": turned}},
        {"model": raw, "ema": {"shadow_params": list(average.values())[:-1]}},
        {"model": in_order, "ema": {"shadow_params": [average[name] for name in sorted(raw)]}},  # no module's order
    ):
        with pytest.raises(CmfastError, match=r"ema\.shadow_params is a list of \d+ tensors without names.*cannot be"):
            load(content, tmp_path)
        assert same(load(content, tmp_path, "model"), raw)
    with pytest.raises(ArtifactError, match=r"is a list of .* tensors without their names; save the state dict"):
        load(shadow(average), tmp_path)


def test_an_average_in_an_optimizers_state_is_said_to_be_there(raw: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"model": raw, "optimizer": {"state": {0: {"swa_buffer": torch.zeros(2, 2)}}}}
    with pytest.raises(CmfastError, match=r"holds an average, optimizer.state.swa_buffer, which is not read"):
        load(content, tmp_path)
    assert same(load(content, tmp_path, "model"), raw)


def states_by_name(raw: dict[str, Tensor]) -> dict[str, Any]:
    """Return an optimizer's state dict as FSDP saves it: by the names of the weights."""
    state = {name: {"exp_avg": tensor, "exp_avg_sq": tensor} for name, tensor in raw.items()}
    return {"state": state, "param_groups": [{"lr": 1e-4, "params": list(raw)}]}


BESIDE: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {  # what trainers keep beside the weights
    "a batch of samples": lambda raw: {"samples": [torch.zeros(4, 3, 8, 8)]},
    "features for a score": lambda raw: {"fid": {"reference": [torch.zeros(9), torch.zeros(9, 9)]}},
    "an optimizer called opt": lambda raw: {"opt": states_by_name(raw)},
    "two optimizers deeper in": lambda raw: {"trainer": {"adam": states_by_name(raw), "muon": states_by_name(raw)}},
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_a_trainer_keeps_beside_the_weights_leaves_nothing_to_choose(
    what: str, raw: dict[str, Tensor], tmp_path: Path
) -> None:
    assert same(load({"model": raw, **BESIDE[what](raw)}, tmp_path), raw)


def test_an_optimizer_of_any_name_is_searched_for_an_average(raw: dict[str, Tensor], tmp_path: Path) -> None:
    held = {"state": {0: {"ema": torch.zeros(2, 2)}}, "param_groups": [{}]}
    with pytest.raises(CmfastError, match=r"holds an average, opt\.state\.ema, which is not read"):
        load({"model": raw, "opt": held}, tmp_path)


def test_a_list_as_long_as_the_parameters_may_be_an_average_whatever_its_name(
    raw: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CmfastError, match=r"slow is a list of \d+ tensors without names.*cannot be read"):
        load({"model": raw, "slow": list(raw.values())[::-1]}, tmp_path)
    with pytest.raises(CmfastError, match=r"holds 2 set\(s\) of weights \(model, slow\)"):
        load({"model": raw, "slow": list(raw.values())}, tmp_path)


def test_of_very_many_sets_the_one_that_was_chosen_is_read(
    raw: dict[str, Tensor], average: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {"runs": {f"step{n}": {"w": torch.zeros(2, 2)} for n in range(200)}, "ema": average, "model": raw}
    with pytest.raises(CmfastError, match=r"more than 64 sets of weights; choose one, for example --set weights="):
        load(content, tmp_path)
    assert same(load(content, tmp_path, "ema"), average)
    assert same(load(content, tmp_path, "model"), raw)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "ema.", "student.", "denoiser.", "unet.", "module.model.net."]
)
def test_a_trainers_prefix_and_counters_are_no_part_of_the_network(
    prefix: str, raw: dict[str, Tensor], tmp_path: Path
) -> None:
    counters = {"n_averaged": torch.tensor(3), "num_updates": torch.tensor(3), f"{prefix}initted": torch.tensor(True)}
    assert same(load({"state_dict": prefixed(prefix, raw) | counters}, tmp_path), raw)


def test_averaged_model_of_torch_is_read(raw: dict[str, Tensor], tmp_path: Path) -> None:
    network = AdmUnet(CONFIG)
    network.load_state_dict(raw)
    assert same(load(torch.optim.swa_utils.AveragedModel(network).state_dict(), tmp_path), raw)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html></html>", r"an HTML page, not a model: .*; download it again"),
        (b"<?xml version='1.0'?><Error/>", "as servers send errors"),
        (b"Invalid username or password.", "a text that begins with .?Invalid username"),
        (b'{"metadata": {"total_size": 3}, "weight_map": {}}', "the index of weights that are divided"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "HDF5 file, as Keras"),
        (b"\x00\x05\x16\x07" + bytes(90), "without the leading ._"),
        (gzip.compress(b"x", mtime=0), "gunzip"),
        (tar(), "a tar archive"),
        (bytes(5000), "nothing but zeros where it begins"),
        (b"\x08\x0a\x12\x07pytorch", "an ONNX file; rename it to end in .onnx"),
        (zipped("m/data.pkl", "m/constants.pkl", "m/code/x.py"), r"a TorchScript archive .*state_dict"),
        (zipped("a/model.safetensors"), "unpack it first"),
        (zipped("arr_0.npy"), "a NumPy archive"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pkl"])
def test_a_file_that_is_something_else_is_named_as_what_it_is(
    content: bytes, words: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as refused:
        load_model(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pkl"])
@pytest.mark.parametrize("start", [b"\x08\x0a\x12", b"\x80\x02}", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{}", b"{}"])
def test_a_file_of_the_first_bytes_alone_is_refused_in_one_line(start: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    for length in range(1, len(start) + 1):
        file.write_bytes(start[:length])
        with pytest.raises(ArtifactError) as refused:
            load_model(file)
        assert "\n" not in str(refused.value)


def test_a_graph_to_train_from_is_not_told_to_take_the_name_that_it_has(handmade_onnx: Make) -> None:
    with pytest.raises(ArtifactError, match="an ONNX file, a graph to run; training starts from a checkpoint"):
        load_model(handmade_onnx(8))


def test_a_suffix_of_another_format_is_told_the_right_one(tiny_checkpoint: Make, tmp_path: Path) -> None:
    for have, suffix, right in ((".pt", ".safetensors", ".pt"), (".safetensors", ".pth", ".safetensors")):
        file = tmp_path / f"renamed{suffix}"
        file.write_bytes(tiny_checkpoint(0, have).read_bytes())
        with pytest.raises(ArtifactError, match=rf"rename it to end in \{right}"):
            load_model(file)


def doubled(depth: int = 60) -> list[Any]:
    one: list[Any] = []
    for _ in range(depth):
        one = [one, one]
    return one


def changed(tiny_checkpoint: Make, place: str, value: Any) -> dict[str, Any]:
    content = torch.load(tiny_checkpoint(), weights_only=True)
    *path, last = place.split(".")
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    return dict(content)


def shared_dictionaries() -> dict[str, Any]:
    one: dict[str, Any] = {"w": torch.zeros(2, 2)}
    for _ in range(4):
        one = {f"k{number}": one for number in range(200)}
    return one


PLACES = ("format", "spec.image", "spec.sigmas", "network.type", "network.channel_mult", "source", "weights")


@pytest.mark.parametrize("place", [*PLACES, "shared dictionaries", "an expanded tensor", "res_blocks"])
def test_a_small_file_makes_nothing_large_and_ends_soon(place: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    if place == "shared dictionaries":
        content: Any = shared_dictionaries()
    elif place == "an expanded tensor":
        content = changed(tiny_checkpoint, "weights", {"w": torch.zeros(1).expand(40000, 40000)})
    elif place == "res_blocks":
        content = changed(tiny_checkpoint, "network.res_blocks", 10**6)
    else:
        content = changed(tiny_checkpoint, place, doubled())
    file = tmp_path / "model.pt"
    torch.save(content, file)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(CmfastError, match=r"model\.pt: ") as refused:
        load_model(file)
    spent, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(refused.value)) < 2000
    assert spent < 20  # without the bounds it never ends
    assert peak < 200e6


def test_a_compressed_file_that_unpacks_without_end_is_refused_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_opcodes, "BESIDE", 1 << 20)
    torch.save({"w": torch.zeros(1 << 21)}, tmp_path / "whole.pt")
    bomb = tmp_path / "model.pt"
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as old,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, True, 1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "whole.pt").unlink()
    with pytest.raises(ArtifactError, match="many times larger than the file"):
        read_tensors(bomb)


def content_of(file: Path, name: str) -> slice:
    """Return where the content of a file within a zip file stands, packed."""
    with zipfile.ZipFile(file) as archive:
        (entry,) = [each for each in archive.infolist() if each.filename.endswith(f"/{name}")]
    head = file.read_bytes()[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    return slice(start, start + entry.compress_size)


def flipped(file: Path, name: str) -> None:
    """Flip one bit in the middle of the content of a file within a zip file."""
    content, place = bytearray(file.read_bytes()), content_of(file, name)
    content[(place.start + place.stop) // 2] ^= 1
    file.write_bytes(content)


def deflated(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(
        file, "w", zipfile.ZIP_DEFLATED, True, 0
    ) as new:  # in blocks that are stored, so bits can flip
        for name, content in contents.items():
            new.writestr(name, content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bytes_in_memory", [False, True])
@pytest.mark.parametrize("name", ["data/0", "data/3", "data.pkl", "byteorder"])
def test_one_flipped_bit_in_a_file_of_weights_is_an_error(
    name: str, bytes_in_memory: bool, packed: bool, raw: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "model.pt"
    torch.save({"model": raw}, file)
    if packed:
        deflated(file)
    assert same(read_tensors(file)["model"], raw)
    flipped(file, name)
    with (
        io.BytesIO(file.read_bytes()) if bytes_in_memory else open(file, "rb") as opened,
        pytest.raises(ArtifactError) as refused,
    ):
        read_tensors(file, opened)
    assert str(refused.value) == (
        f"{file} is damaged: the data of '{name}' do not match their checksum; copy or download it again"
    )


def test_a_bit_that_flips_behind_the_first_piece_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "PIECE", 1000)
    torch.save({"w": torch.arange(3000.0)}, tmp_path / "model.pt")
    assert torch.equal(read_tensors(tmp_path / "model.pt")["w"], torch.arange(3000.0))
    flipped(tmp_path / "model.pt", "data/0")
    with pytest.raises(ArtifactError, match="is damaged: the data of 'data/0' do not match"):
        read_tensors(tmp_path / "model.pt")


def test_a_file_that_torch_wrote_without_checksums_is_read(raw: dict[str, Tensor], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": raw, "none": torch.empty(0)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert not any(entry.CRC for entry in archive.infolist() if "serialization_id" not in entry.filename)
    assert same(read_tensors(tmp_path / "model.pt")["model"], raw)


def test_a_file_whose_values_came_after_torch_wrote_it_is_read(raw: dict[str, Tensor], tmp_path: Path) -> None:
    file, weight = tmp_path / "model.pt", torch.randn(7, 5)
    with torch.serialization.skip_data():
        torch.save({"w": weight}, file)
    content = bytearray(file.read_bytes())
    content[content_of(file, "data/0")] = weight.numpy().tobytes()
    file.write_bytes(content)
    assert torch.equal(torch.load(file)["w"], weight)
    assert torch.equal(read_tensors(file)["w"], weight)


def test_many_entries_that_share_their_bytes_are_not_summed_up_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_opcodes, "BESIDE", 1 << 16)
    file = tmp_path / "model.pt"
    torch.save({str(n): torch.zeros(1 << 18, dtype=torch.uint8)[:0] for n in range(20)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if "/data/" not in name or name.endswith("/data/0"):
                new.writestr(name, old.read(name))
        first = new.getinfo("whole/data/0")
        for n in range(1, 20):
            other = zipfile.ZipInfo(f"whole/data/{n}")
            other.header_offset, other.CRC = first.header_offset, first.CRC
            other.file_size = other.compress_size = first.file_size
            new.filelist.append(other)
    with pytest.raises(ArtifactError, match="many times larger than the file"):
        read_tensors(file)
    monkeypatch.setattr(pickle_opcodes, "BESIDE", 1 << 28)
    assert len(read_tensors(file)) == 20  # nothing else is wrong with it


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("weights", {"w": torch.empty(2, device="meta")}, 'a tensor on "meta", which has no values'),
        ("weights", {"w": torch.zeros(2, 2).to_sparse()}, "sparse|objects"),
        ("weights", {"w": torch.zeros(2, dtype=torch.complex64)}, "a tensor of a type that is not read|complex64"),
        ("weights.w", torch.full((2,), float("nan")), "the weight w has values that are not finite"),
        ("weights.w", torch.zeros(2, dtype=torch.int64), "the weight w is torch.int64"),
        ("source", {"format": torch.zeros(2)}, "source.format is a Tensor"),
        ("source", {1, 2}, "source is a set"),
        ("source", {3: 1}, "source has a key of type int"),
        ("source", "text", "source is a str"),
        ("spec.sigma_max", torch.tensor(80.0), "spec.sigma_max is a Tensor"),
        ("network.res_blocks", torch.tensor(1), "network.res_blocks is a Tensor"),
        ("source", {"n": 1 << 5000}, "whole number that is too large"),
    ],
)
def test_a_checkpoint_of_ours_is_not_trusted(
    place: str, value: Any, words: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    torch.save(changed(tiny_checkpoint, place, value), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=words) as refused:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(refused.value)


def test_weights_that_require_gradients_are_only_values(tiny_checkpoint: Make, tmp_path: Path) -> None:
    weights = {name: nn.Parameter(tensor) for name, tensor in load_checkpoint(tiny_checkpoint()).weights.items()}
    torch.save(changed(tiny_checkpoint, "weights", weights), tmp_path / "model.pt")
    again = load_checkpoint(tmp_path / "model.pt")
    assert again.sha256() == load_checkpoint(tiny_checkpoint()).sha256()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_disk_that_is_full_is_one_line_and_keeps_the_old_file(
    suffix: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    checkpoint, file = load_checkpoint(tiny_checkpoint()), tmp_path / f"model{suffix}"
    file.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CmfastError, match=rf"model\{suffix}") as refused:
            save_checkpoint(checkpoint, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["line\nbreak.pt", "\x1b[31mred.pt", "not\udcffutf8.pt"])
def test_a_name_that_cannot_be_printed_is_escaped(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(CmfastError) as refused:
        load_model(tmp_path / name)
    assert str(refused.value).isprintable()


def test_an_encrypted_zip_and_a_folder_of_long_names_are_one_line(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3), "o": slice(1)}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    for place in range(len(content) - 10):
        if content[place : place + 4] == b"PK\1\2":
            content[place + 8] |= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.pt: ") as refused:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(refused.value)
    with pytest.raises(CmfastError):
        load_model(tmp_path / ("x" * 300 + ".pt"))


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + " " * (2 << 20) + "}", "\xff", json.dumps({"a": "b\n" * 999})])
def test_a_configuration_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"model_index\.json") as refused:
        load_model(tmp_path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("bytes_in_memory", [False, True])
def test_a_checkpoint_is_read_from_what_is_open_already(
    suffix: str, bytes_in_memory: bool, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(tiny_checkpoint(10, suffix).read_bytes())
    with io.BytesIO(file.read_bytes()) if bytes_in_memory else open(file, "rb") as opened:
        other = tmp_path / "other"
        other.write_bytes(pickle.dumps(None))
        other.replace(file)
        checkpoint = load_model(file, opened=opened)
    assert checkpoint.sha256() == load_checkpoint(tiny_checkpoint(10, suffix)).sha256()
