# SPDX-License-Identifier: MIT
"""Pickled networks are read tensor by tensor, and whatever else a pickle asks for, nothing in it runs."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import shutil
import struct
import sys
import typing
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmfast.errors import ArtifactError
from cmfast_train.importers import pickle_opcodes
from cmfast_train.importers.pickle_opcodes import Foreign, Global
from cmfast_train.importers.pickles import module_tensors, read_pickle, read_torch

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Precond(nn.Module):
    """What EDM pickles, in small: a wrapper with attributes, containers, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma_data, self.label_dim, self.model_type = 0.5, 0, "SongUNet"
        self.init_kwargs = OrderedDict(img_resolution=8, dropout=0.1)
        self.model = nn.ModuleDict({"enc": nn.Linear(3, 2), "dec": nn.ModuleList([nn.Conv2d(2, 3, 1, bias=False)])})
        self.register_buffer("u", torch.arange(3.0))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("none", None)


def read(tmp_path: Path, content: bytes) -> Any:
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(content)
    return read_pickle(file)


def read_or_refusal(tmp_path: Path, content: bytes) -> Any:
    try:
        return read(tmp_path, content)
    except ArtifactError as err:
        return err


# What is read.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_network_gives_its_state_dict_and_its_attributes(
    protocol: int, persistent: Callable[..., bytes], tmp_path: Path
) -> None:
    network = Precond()
    content = persistent({"ema": network, "dataset_kwargs": {"path": "cifar10.zip"}, "loss_fn": None}, protocol)
    tree = read(tmp_path, content)
    assert tree["dataset_kwargs"] == {"path": "cifar10.zip"}
    assert tree["ema"].name == "Precond"
    state = tree["ema"].state
    assert (state["sigma_data"], state["label_dim"], state["model_type"]) == (0.5, 0, "SongUNet")
    assert state["init_kwargs"] == {"img_resolution": 8, "dropout": 0.1}
    have, want = module_tensors(tree["ema"], tmp_path), network.state_dict()
    assert list(have) == ["u", "model.enc.weight", "model.enc.bias", "model.dec.0.weight"] == list(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(have[name], tensor)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_of_every_kind_come_back(dtype: torch.dtype, protocol: int, tmp_path: Path) -> None:
    base = (10 * torch.randn(4, 6)).to(dtype)
    tensors = [base, base.t(), base[1:3, ::2], base[0, 0], base[:0], base.reshape(2, 1, 12)]
    if dtype.is_floating_point:
        tensors.append(nn.Parameter(base))
    for got, want in zip(read(tmp_path, pickle.dumps(tensors, protocol)), tensors, strict=True):
        assert (type(got), got.dtype, got.shape, got.requires_grad) == (Tensor, dtype, want.shape, False)
        assert torch.equal(got, want)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda some: (
        st.lists(some) | st.lists(some).map(tuple)
        | st.dictionaries(st.text() | st.integers(1 - (1 << 60), (1 << 60) - 1), some)
        | st.frozensets(st.text()).map(set)
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=100)
@given(content=PLAIN, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_containers_come_back_as_they_were(
    content: Any, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    got = read(tmp_path_factory.getbasetemp(), pickle.dumps(content, protocol))
    assert got == content
    assert type(got) is type(content)


def test_other_objects_are_records_of_their_names_and_states(tmp_path: Path) -> None:
    content = {"scalar": np.float64(0.5), "path": Path("x"), "class": OrderedDict, "error": ValueError("no")}
    tree = read(tmp_path, pickle.dumps(content))
    assert tree["class"] == Global("collections.OrderedDict")
    assert {type(tree[name]) for name in ("scalar", "path", "error")} == {Foreign}
    assert (tree["error"].name, tree["error"].args) == ("builtins.ValueError", ("no",))


# What is refused, or stays without effect.


class Trap:
    """Creates a folder as soon as anything makes or restores one of these."""

    def __new__(cls, *folder: str, **named: str) -> Trap:
        for path in (*folder, *named.values()):
            os.mkdir(path)
        return super().__new__(cls)

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["folder"])


def text(value: str) -> bytes:
    """Return the opcodes that push a text."""
    return b"V" + value.encode() + b"\n"


HERE = __name__.encode()
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "REDUCE os.system": lambda mark: b"cos\nsystem\n(" + text(f"mkdir '{mark}'") + b"tR.",
    "REDUCE eval": lambda mark: b"cbuiltins\neval\n(" + text(f"__import__('os').mkdir({mark!r})") + b"tR.",
    "STACK_GLOBAL": lambda mark: b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text(mark) + b"\x85R.",
    "dotted name": lambda mark: b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + text(f"mkdir '{mark}'") + b"\x85R.",
    "from the memo": lambda mark: b"cos\nmkdir\nq\x000h\x00" + text(mark) + b"\x85R.",
    "INST": lambda mark: b"(" + text(mark) + b"ios\nmkdir\n.",
    "OBJ": lambda mark: b"(cos\nmkdir\n" + text(mark) + b"o.",
    "NEWOBJ": lambda mark: b"\x80\x02c" + HERE + b"\nTrap\n" + text(mark) + b"\x85\x81.",
    "NEWOBJ_EX": lambda mark: b"\x80\x04c" + HERE + b"\nTrap\n)}" + text("folder") + text(mark) + b"s\x92.",
    "BUILD calls __setstate__": lambda mark: (
        b"\x80\x02c" + HERE + b"\nTrap\n)\x81}" + text("folder") + text(mark) + b"sb."
    ),
    "BUILD changes an allowed function": lambda mark: (
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_parameter\x93N}" + text("planted") + b"cos\nmkdir\ns\x86b0"
        b"\x8c\x0ctorch._utils\x8c\x1a_rebuild_parameter.planted\x93" + text(mark) + b"\x85R."
    ),
    "within the memory of a tensor": lambda mark: pickle.dumps(Inner(pickle.dumps(Call(os.mkdir, mark)))),
    "as the memory of a tensor": lambda mark: pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, Call(os.mkdir, mark), 0, (1,), (1,), False, OrderedDict())
    ),
    "as a key": lambda mark: pickle.dumps({Call(os.mkdir, mark): 1}),
    "an extension code": lambda mark: b"\x80\x02\x82\xf0" + text(mark) + b"\x85R.",
}  # fmt: skip


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Inner:
    """Bytes that are pickled as a tensor's memory is."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.content,)


@pytest.fixture
def proof(tmp_path: Path) -> Iterator[Path]:
    """Yield the path of a folder that hostile pickles create."""
    copyreg.add_extension("os", "mkdir", 0xF0)
    yield tmp_path / "it ran"
    copyreg.remove_extension("os", "mkdir", 0xF0)
    copyreg.clear_extension_cache()
    vars(torch._utils._rebuild_parameter).pop("planted", None)


def runs(content: bytes, proof: Path) -> bool:
    """Whether plain pickle creates the folder; it is removed again."""
    with contextlib.suppress(Exception):  # a payload need not survive itself
        pickle.loads(content)
    ran = proof.exists()
    shutil.rmtree(proof, ignore_errors=True)
    vars(torch._utils._rebuild_parameter).pop("planted", None)
    copyreg.clear_extension_cache()
    return ran


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_in_a_hostile_pickle_runs(name: str, proof: Path, tmp_path: Path) -> None:
    content = PAYLOADS[name](str(proof))
    assert runs(content, proof)  # the check below can fail
    assert isinstance(read_or_refusal(tmp_path, content), (Foreign, Global, dict, ArtifactError))
    assert not proof.exists()
    assert not hasattr(torch._utils._rebuild_parameter, "planted")


def test_the_source_code_in_a_snapshot_does_not_run(
    persistent: Callable[..., bytes], proof: Path, tmp_path: Path
) -> None:
    source = f"import os\nos.mkdir({str(proof)!r})\nclass {{name}}: pass\n"
    content = persistent({"ema": nn.Linear(2, 2)}, source=source)
    assert runs(content, proof)
    tree = read(tmp_path, content)
    assert list(module_tensors(tree["ema"], tmp_path)) == ["weight", "bias"]
    assert "module_src" not in tree["ema"].state
    assert not proof.exists()


def test_no_module_is_imported(tmp_path: Path) -> None:
    sys.modules.pop("this", None)
    assert read(tmp_path, b"cthis\ns\n.") == Global("this.s")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Pstorage 0\n.", "opcode PERSID, which networks do not; refused, nothing in it was run"),
        (b"I1\nQ.", "opcode BINPERSID"),
        (b"\x80\x02\x82\xf0.", "opcode EXT1"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (b"I1\n)R.", "it calls something that is no named class or function"),
        (b"cos\nmkdir\n)R)R.", "it calls something that is no named class or function"),
        (b"<!DOCTYPE html>", "not a whole pickle"),
        (b"PK\x03\x04" + bytes(30), "torch.save wrote this, not pickle; rename it to end in .pt"),
        (b"", "not a whole pickle"),
        (b".", "not a whole pickle"),
        (b"t.", "not a whole pickle"),
        (b"h\x07.", "not a whole pickle"),
        (b"I1\n\x93.", "not a whole pickle"),
        (b"\x80\x04I1\nI2\n\x93.", "not a whole pickle"),
        (b"NNa.", "not a whole pickle"),
        (b"N(NNu.", "not a whole pickle"),
        (b"}(Nu.", "not a whole pickle"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "not a whole pickle"),
    ],
    ids=repr,
)
def test_what_is_no_pickle_of_a_network_is_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=words) as refused:
        read(tmp_path, content)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "snapshot.pkl"))


def test_a_snapshot_that_ends_early_is_refused(persistent: Callable[..., bytes], tmp_path: Path) -> None:
    content = persistent({"ema": nn.Linear(2, 2)})
    for length in range(1, len(content), 7):
        with pytest.raises(ArtifactError, match=r"not a whole pickle|refused"):
            read(tmp_path, content[:length])


def test_a_text_with_unknown_escapes_is_refused_where_warnings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not a whole pickle: invalid escape sequence"):
        read(tmp_path, b"S'\\o'\n.")


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_snapshot_is_read_or_refused_but_never_crashes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(pickle.dumps({"a": torch.ones(2), "b": [Path("x"), {1: (2, 3.0)}, {4, 5}], "c": slice(1)}))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    refusal = read_or_refusal(tmp_path_factory.getbasetemp(), bytes(content))
    assert not isinstance(refusal, ArtifactError) or "\n" not in str(refusal)


@pytest.mark.parametrize(
    "content",
    [b"(" * 10**5 + b"l" * 10**5 + b".", b")" + b"\x85" * 10**5 + b".", b"})" + b"\x85" * 2 * 10**5 + b"Ns."],
    ids=["lists", "tuples", "a key of tuples"],
)
def test_nesting_without_end_needs_no_recursion(content: bytes, tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, content), (list, tuple, dict))


def rebuilt(size: Any, stride: Any, offset: Any = 0) -> bytes:
    storage = torch.arange(6.0)._typed_storage()
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict()))


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((7,), (1,), 0), ((6,), (1,), 1), ((2,), (1 << 62,), 0), ((-1,), (1,), 0), ((2,), (-1,), 3), ((2, 2), (1,), 0),
     ((1 << 62, 4), (0, 1), 4), (("2",), (1,), 0), ((2,), (1,), -1), ((1 << 62, 4), (0, 0), 0), ((1 << 70,), (0,), 0),
     ((0, 1 << 62, 1 << 62), (0, 0, 0), 0), ((0, 1 << 62), (1 << 62, 1 << 62), 0), ((1,), (1 << 70,), 0),
     ((0,), (1,), 1 << 70), ((1,) * 9, (1,) * 9, 0), ((True,), (1,), 0), ((7,), (0,), 0)],
    ids=str,
)  # fmt: skip
def test_a_tensor_cannot_reach_beyond_its_memory(size: Any, stride: Any, offset: int, tmp_path: Path) -> None:
    assert torch.equal(read(tmp_path, rebuilt((2, 2), (3, 1), 1)), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    with pytest.raises(ArtifactError, match=r"a tensor in it (is larger than its memory|has no shape)"):
        read(tmp_path, rebuilt(size, stride, offset))


def times(count: int, start: bytes, again: bytes) -> bytes:
    """Return a pickle that does something once, and something with what it remembers many times."""
    return b"\x80\x04" + start + b"0(" + again * count + b"l."


def many(item: bytes, count: int) -> bytes:
    return b"](" + item * count + b"e"


LATIN = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"X\x06\x00\x00\x00latin1\x86"
COPIES = {  # each wants more than 3 GB, of less than 400 KB
    "a longer tuple": times(20_000, b"cos\nx\nq\x000(" + b"N" * 100_000 + b"tq\x01", b"h\x00h\x01}\x92"),
    "an ordered dictionary": times(
        20_000, b"ccollections\nOrderedDict\nq\x000" + many(b")N\x86", 50_000) + b"\x85q\x01", b"h\x00h\x01R"
    ),
    "a set": times(20_000, b"cbuiltins\nset\nq\x000" + many(b")", 50_000) + b"\x85q\x01", b"h\x00h\x01R"),
    "bytes from text": times(20_000, b"c_codecs\nencode\nq\x000" + LATIN + b"q\x01", b"h\x00h\x01R"),
    "attributes": times(
        20_000, b"cos\nx\nq\x000}q\x01(" + b"".join(b"V%d\nN" % i for i in range(30_000)) + b"u", b"h\x00)Rh\x01b"
    ),
    "names": times(
        20_000, b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"q\x000Vb\nq\x01", b"h\x00h\x01\x93"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_what_a_file_can_make_is_bounded_by_its_size(name: str, tmp_path: Path) -> None:
    assert len(COPIES[name]) < 400_000
    words = "what it asks for is many times larger than the file|a name in it has no end"
    with pytest.raises(ArtifactError, match=words) as refused:
        read(tmp_path, COPIES[name])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_network_takes_few_times_its_file(
    protocol: int, persistent: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pickle_opcodes, "BESIDE", 0)
    content = persistent({"ema": nn.Linear(300, 300), "net": nn.Linear(300, 300)}, protocol)
    assert list(module_tensors(read(tmp_path, content)["net"], tmp_path)) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_the_memory_of_tensors_that_share_it_is_read_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(6.0)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    one, two = read(tmp_path, pickle.dumps([Inner(content), Inner(content)]))
    assert one is two
    assert one.data.tolist() == [0, 1, 2, 3, 4, 5]


def test_many_tensors_of_one_memory_count_each(tmp_path: Path) -> None:
    storage = torch.zeros(100_000)
    file = tmp_path / "model.pt"
    torch.save([storage.view(1, -1) for _ in range(2000)], file)  # 800 MB if they were copied, in a file of 400 KB
    with pytest.raises(ArtifactError, match="many times larger than the file"):
        read_torch(file)


def test_whole_numbers_that_hash_alike_are_no_keys(tmp_path: Path) -> None:
    alike = {k * (2**61 - 1): k for k in range(1, 2000)}
    assert {hash(number) for number in alike} == {0}
    assert not any(isinstance(key, int) for key in read(tmp_path, pickle.dumps(alike)))


def test_one_dictionary_in_every_module_is_no_network(tmp_path: Path) -> None:
    parameters = {f"w{i}": torch.ones(1) for i in range(1000)}
    parts = {f"m{i}": module(_parameters=parameters) for i in range(1000)}
    with pytest.raises(ArtifactError, match="more than 100000 weights"):
        module_tensors(module(_modules=parts), tmp_path)
    with pytest.raises(ArtifactError, match="is malformed"):
        module_tensors(module(_parameters={"w" * 1001: torch.ones(1)}), tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", pickle.dumps(OrderedDict), pickle.dumps({"a": 1})], ids=repr)
def test_the_memory_of_a_tensor_that_is_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="memory of a tensor in it") as refused:
        read(tmp_path, pickle.dumps(Inner(content)))
    assert "\n" not in str(refused.value)


def module(**parts: Any) -> Foreign:
    return Foreign("M", state={"_parameters": {}, "_buffers": {}, "_modules": {}, **parts})


def test_a_module_that_is_none_is_refused(tmp_path: Path) -> None:
    loop = module()
    loop.state["_modules"]["again"] = loop
    twice = module()
    deep = module()
    for _ in range(2000):
        deep = module(_modules={"m": deep})
    for bad in (
        None, loop, module(_modules={"a": twice, "b": twice}), module(_modules={"a": 1}), module(_parameters=[]), deep,
        module(_parameters={"w": 1}), module(_buffers={1: torch.ones(1)}), module(_non_persistent_buffers_set=None),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=f"{tmp_path}: the module"):
            module_tensors(bad, tmp_path)


# What torch.save writes.


class Stateful:
    """A part of a trainer, as it ends up in a checkpoint whole."""

    def __init__(self, **state: Any) -> None:
        self.state = state


class Betas(list[float]):
    """Stands for omegaconf's ListConfig: a list of a class of its own."""


def trained(path: Path, **more: Any) -> dict[str, Tensor]:
    """Write a checkpoint as FastGen's trainer does; return the weights in it."""
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.RAdam(layer.parameters(), lr=np.float64(1e-4), betas=Betas([0.9, 0.999]))  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(1) / (1 + step))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    weights = {"w": torch.randn(4, 6), "half": torch.randn(3).to(torch.bfloat16), "count": torch.tensor(7)}
    content = {
        "model": {"net": weights, "ema": OrderedDict((k, 2 * v) for k, v in weights.items())},
        "optimizer": {"net": optimizer.state_dict()},
        "scheduler": {"net": scheduler.state_dict(), "any": typing.Any, "by step": defaultdict(list, {1: [2]})},
        "callbacks": Stateful(ema=0.9999, path=Path("x")),
        "iteration": 5,
    }
    torch.save(content | more, path)
    return weights


def repacked(file: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], how: int) -> Path:
    """Write the records of a zip file again, changed."""
    other = file.with_name("repacked.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", how) as new:
        for name in old.namelist():
            if entry := change(name, old.read(name)):
                new.writestr(*entry)
    return other


@pytest.mark.parametrize("how", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["torch's", "stored", "deflated"])
def test_a_trainers_checkpoint_gives_its_weights_and_records_of_the_rest(how: int | None, tmp_path: Path) -> None:
    file = tmp_path / "0000005.pth"
    weights = trained(file)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported"):  # why this is needed
        torch.load(file, weights_only=True)
    if how is not None:
        file = repacked(file, lambda name, content: (name, content), how)
    tree = read_torch(file)
    assert tree["iteration"] == 5
    assert list(tree["model"]) == ["net", "ema"]
    for name, want in weights.items():
        for got, expected in ((tree["model"]["net"][name], want), (tree["model"]["ema"][name], 2 * want)):
            assert (type(got), got.dtype, got.shape) == (Tensor, want.dtype, want.shape)
            assert torch.equal(got, expected)
    group = tree["optimizer"]["net"]["param_groups"][0]
    assert group["betas"].name == f"{__name__}.Betas"
    assert group["lr"].name.endswith("multiarray.scalar")
    assert tree["optimizer"]["net"]["state"][0]["exp_avg"].shape == (3, 3)
    assert tree["scheduler"]["any"] == Global("typing.Any")
    assert tree["scheduler"]["by step"].name == "collections.defaultdict"
    assert (tree["callbacks"].name, tree["callbacks"].state["state"]["ema"]) == (f"{__name__}.Stateful", 0.9999)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_whole_module_in_a_checkpoint_gives_its_state_dict(protocol: int, tmp_path: Path) -> None:
    network, file = Precond(), tmp_path / "training-state-000100.pt"
    torch.save({"net": network, "optimizer_state": {}}, file, pickle_protocol=protocol)
    tree = read_torch(file)
    assert tree["net"].name == f"{__name__}.Precond"
    have = module_tensors(tree["net"], file)
    assert list(have) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(have[name], tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_tensors_of_a_checkpoint_come_back(dtype: torch.dtype, how: int, tmp_path: Path) -> None:
    base, file = (10 * torch.randn(4, 6)).to(dtype), tmp_path / "model.pt"
    tensors = [
        base,
        base.t(),
        base[1:3, ::2],
        base[0, 0],
        base[:0],
        torch.empty(0, 3, dtype=dtype),
        nn.Parameter(base, False),
    ]
    torch.save(tensors, file)
    one, two = read_torch(file), read_torch(repacked(file, lambda name, content: ("x" + name, content), how))
    for got, want in zip([*one, *two], [*tensors, *tensors], strict=True):
        assert (type(got), got.dtype, got.shape) == (Tensor, dtype, want.shape)
        assert torch.equal(got, want)
    one[0].zero_()  # the memory is the process's own
    assert torch.equal(read_torch(file)[0], base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hostile_object_beside_the_weights_does_not_run(proof: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    weights = trained(file, hooks=Call(os.mkdir, str(proof)))
    torch.load(file, weights_only=False)
    assert proof.exists()  # the check below can fail
    proof.rmdir()
    tree = read_torch(file)
    assert (tree["hooks"].name, tree["hooks"].args) == ("posix.mkdir", (str(proof),))
    assert torch.equal(tree["model"]["net"]["w"], weights["w"])
    assert not proof.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, c: (n, b"big" if n.endswith("byteorder") else c), "in another byte order than little endian"),
        (lambda n, c: None if n.endswith("data.pkl") else (n, c), "a zip file, but not one of torch.save"),
        (lambda n, c: (n.replace("data.pkl", "constants.pkl"), c), "a zip file, but not one of torch.save"),
        (lambda n, c: None if n.endswith("data/0") else (n, c), "data/0"),
        (lambda n, c: (n, c + b"1234" if n.endswith("data/0") else c), "the memory of a tensor has 100 bytes where 24"),
        (lambda n, c: (n, c[4:] if n.endswith("data/0") else c), "the memory of a tensor has 92 bytes where 24"),
        (lambda n, c: (n, c[:-9] if n.endswith("data.pkl") else c), "not a whole PyTorch file"),
        (lambda n, c: (n, b"N2." if n.endswith("data.pkl") else c), None),
        (lambda n, c: (n, b"NQ." if n.endswith("data.pkl") else c), "outside the pickle that is no memory of a tensor"),
        (lambda n, c: (n, b"Px\n." if n.endswith("data.pkl") else c), "opcode PERSID"),
    ],
)
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line(
    change: Callable[[str, bytes], tuple[str, bytes] | None], words: str | None, how: int, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt"
    trained(file)
    other = repacked(file, change, how)
    if how == zipfile.ZIP_BZIP2 and (words is None or "not one of" not in words):
        words = "compressed in another way than zip's usual"
    if words is None:
        assert read_torch(other) is None
        return
    with pytest.raises(ArtifactError, match=words) as refused:
        read_torch(other)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(other))


def test_a_checkpoint_that_unpacks_without_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pickle_opcodes, "BESIDE", 1 << 20)
    file = tmp_path / "model.pt"
    torch.save([torch.zeros(1 << 20), torch.zeros(1 << 20)], file)
    assert len(read_torch(file)) == 2
    bomb = repacked(file, lambda *entry: entry, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 14
    with pytest.raises(ArtifactError, match="many times larger than the file"):
        read_torch(bomb)


def test_a_checkpoint_in_torchs_old_format_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"net": Stateful()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ArtifactError, match=r"not what torch\.save writes since PyTorch 1\.6"):
        read_torch(file)


def test_a_record_said_to_begin_outside_the_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2, 3), "o": slice(1)}, file)
    content = bytearray(file.read_bytes())
    directory = content.index(b"PK\1\2")  # of data.pkl, the first entry; 42 bytes on stands where it begins
    for place in range(directory + 42, directory + 46):
        damaged = content.copy()
        damaged[place] ^= 0x80
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="not a whole"):
            read_torch(file)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_read_or_refused_but_never_crashes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save({"w": torch.ones(2, 3), "o": slice(1), "p": Path("x")}, file)
    content = bytearray(file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(ArtifactError):
        read_torch(file)
