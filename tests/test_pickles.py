# SPDX-License-Identifier: MIT
"""Pickled networks are read tensor by tensor, and whatever else a pickle asks for, nothing in it runs."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import shutil
import sys
import types
from collections import OrderedDict
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
from cmfast_train.importers.pickles import Foreign, Global, module_tensors, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


# A stand-in for EDM's torch_utils.persistence: objects travel with the source code of their class.


def reconstruct(meta: dict[str, Any]) -> Any:
    """Do what the original does when it is unpickled: run the code that is in the file."""
    space: dict[str, Any] = {}
    exec(meta["module_src"], space)
    made = object.__new__(space[meta["class_name"]])
    made.__dict__.update(meta["state"])
    return made


class PersistentPickler(pickle.Pickler):
    """Pickle every module, but torch's containers, as EDM's persistent classes pickle themselves."""

    source = "import torch\nclass {name}(torch.nn.Module): pass\n"

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module) or isinstance(obj, (nn.ModuleDict, nn.ModuleList)):
            return NotImplemented
        name = type(obj).__name__
        source = self.source.format(name=name)
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": obj.__dict__}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture
def persistent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Return a function that pickles modules as EDM does; plain pickle can read what it returns."""
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
        st.lists(some) | st.lists(some).map(tuple) | st.dictionaries(st.text() | st.integers(), some)
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
     ((1 << 62, 4), (0, 1), 4), (("2",), (1,), 0), ((2,), (1,), -1)],
    ids=str,
)  # fmt: skip
def test_a_tensor_cannot_reach_beyond_its_memory(size: Any, stride: Any, offset: int, tmp_path: Path) -> None:
    assert torch.equal(read(tmp_path, rebuilt((2, 2), (3, 1), 1)), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    with pytest.raises(ArtifactError, match=r"a tensor in it (is larger than its memory|has no shape)"):
        read(tmp_path, rebuilt(size, stride, offset))


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
