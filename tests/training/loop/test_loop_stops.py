# SPDX-License-Identifier: MIT
"""Runs that are stopped: by signals, by images that cannot be read, by another process; runs in threads; names."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmfast.errors import BackendError, CheckFailed, CmfastError, CmfastWarning
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.cli.train import main
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import load_data
from cmfast_train.training import parallel, step_graph, trainer
from helpers.runs import TINY, arguments, assert_equal_to_the_bit, log_of, run_here

SHORT = ["phases=edm:32", "checkpoint_images=8000", "grid=1"]
Call = Callable[..., Any]


@pytest.fixture
def batches_end_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Return a function that lets the images of the fourth step end by what is called."""
    whole = trainer.batches

    def until(end: Callable[[], None]) -> None:
        def batches(*arguments: Any) -> Iterator[Any]:
            for i, batch in enumerate(whole(*arguments)):
                if i == 3:
                    end()
                yield batch

        monkeypatch.setattr(trainer, "batches", batches)

    return until


def fail() -> None:
    raise CmfastError("a worker was killed; use --set workers=0")


def bug() -> None:
    raise ZeroDivisionError("a bug")


def signalled() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    fail()


def test_images_that_cannot_be_read_end_a_run_that_continues_after_its_last_step_to_the_bit(
    batches_end_by: Any, tmp_path: Path, call: Call, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*TINY, *SHORT, "dropout=0.2"]
    out = tmp_path / "run"
    with monkeypatch.context():
        batches_end_by(fail)
        refused(
            call(main, *arguments(out, settings)),
            f"workers=0; {out} holds a checkpoint of the last step; the same command continues",
        )
        monkeypatch.undo()
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 3
    assert log_of(out)[-1]["checkpoint"] == "model.pt"
    run_here(out, *SHORT, "dropout=0.2")
    run_here(tmp_path / "plain", *SHORT, "dropout=0.2")
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (tmp_path / "plain", out)]
    assert_equal_to_the_bit(*states)


def test_a_bug_in_reading_images_keeps_its_traceback_and_the_steps_that_were_done(
    batches_end_by: Any, tmp_path: Path
) -> None:
    batches_end_by(bug)
    with pytest.raises(ZeroDivisionError):
        run_here(tmp_path / "run", *SHORT)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3


def test_a_signal_that_ends_the_readers_of_images_too_is_a_stop(
    batches_end_by: Any, tmp_path: Path, call: Call
) -> None:
    batches_end_by(signalled)
    result = call(main, *arguments(tmp_path / "run", [*TINY, *SHORT]))
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.splitlines() == [
        f"cmfast-train: stopped; {tmp_path / 'run'} holds a checkpoint of the last step; the same command continues"
    ]


def test_a_signal_stops_a_run_in_which_a_c_library_took_it(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LLVM does where Triton compiles a kernel, in the first step; here the library ignores the signal."""
    whole, ignore = trainer.batches, ctypes.c_void_p(1)  # SIG_IGN
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def batches(*arguments: Any) -> Iterator[Any]:
        for i, batch in enumerate(whole(*arguments)):
            if i == 0:
                library.signal(signal.SIGTERM, ignore)
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer, "batches", batches)
    result = call(main, *arguments(tmp_path / "run", [*TINY, *SHORT]))
    assert result.returncode == 130, result.stderr
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3


def test_weights_that_are_not_finite_are_not_saved_when_images_cannot_be_read(
    batches_end_by: Any, tmp_path: Path
) -> None:
    batches_end_by(fail)
    with pytest.raises(CheckFailed, match="not finite"):
        run_here(tmp_path / "run", *SHORT, "edm.lr=1e30")
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["load_data", "Run", "begin_folder"])
def test_a_signal_before_the_first_step_is_one_line_and_130(
    where: str, number: signal.Signals, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, where, lambda *_: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    result = call(main, *arguments(tmp_path / "run", [*TINY, *SHORT]))
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "cmfast-train: stopped; before the first checkpoint; the same command begins again\n"
    assert os.listdir(tmp_path) == []
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_thread_trains_without_signals(tmp_path: Path, call: Call) -> None:
    codes: list[Any] = []

    def work() -> None:
        codes.append(call(main, *arguments(tmp_path / "command", [*TINY, *SHORT])).returncode)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]


def test_handlers_of_others_are_back_after_a_run(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_here(tmp_path / "run", "phases=edm:8", "grid=1")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_default_dtype_is_one_line(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(CmfastError, match=r"default dtype, float32, not torch.float64: torch.set_default_dtype"):
            run_here(tmp_path / "run", *SHORT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_fails_in_one_process_is_raised_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(parallel, "gather_object", lambda said: [*said, None])
    with pytest.raises(ZeroDivisionError):
        parallel.together(two, lambda: 1 / 0)
    assert parallel.together(two, lambda: 3) == 3
    monkeypatch.setattr(parallel, "gather_object", lambda said: [*said, "no space left in DIR"])
    for work in (None, lambda: 3):
        with pytest.raises(CmfastError, match=r"^another process has stopped: no space left in DIR$"):
            parallel.together(two, work)


def test_a_process_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimise(*_: Any) -> None:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer\n at ...")

    monkeypatch.setattr(step_graph, "optimise", optimise)
    config = override(PRESETS["digits"], [*TINY, *SHORT])
    for processes, error in ((2, CmfastError), (1, RuntimeError)):  # of one process it would be a bug
        accelerator = SimpleNamespace(num_processes=processes, process_index=0, device=torch.device("cpu"))
        context = SimpleNamespace(config=config, accelerator=accelerator, spec=config.spec(10), dropout=0.0)
        state = SimpleNamespace(total=config.steps(config.phases[0]))
        run: Any = SimpleNamespace(
            config=config, context=context, state=state, images=0, step=0, phase=config.phases[0]
        )
        with pytest.raises(error) as raised:
            next(trainer.steps(run, load_data(config, None)))
        said = "another process of the run has ended or cannot be reached" in str(raised.value)
        assert said == ("\n" not in str(raised.value)) == (processes == 2)


# Names of classes.

NAMES = tuple(f"class {i}" for i in range(10))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that names the classes of the data."""
    whole = load_data

    def name(*names: str) -> None:
        def load(*arguments: Any) -> Any:
            data: Any = whole(*arguments)
            data.class_names = names
            return data

        monkeypatch.setattr(trainer, "load_data", load)

    return name


def spec_of(model: Path) -> Any:
    return load_checkpoint(model).spec


def test_names_of_classes_are_in_the_configuration_and_the_model_also_of_a_run_begun_without(
    named: Any, tmp_path: Path
) -> None:
    named()
    assert spec_of(run_here(tmp_path / "run", *SHORT)).class_names == ()
    named(*NAMES)
    assert spec_of(run_here(tmp_path / "run", *SHORT)).class_names == ()  # it was finished
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] == list(NAMES)
    assert spec_of(run_here(tmp_path / "new", *SHORT)).class_names == NAMES
    plain = override(PRESETS["digits"], [*TINY, *SHORT, "conditional=false"])
    assert trainer._with_names(plain, trainer.load_data(plain, None)).class_names == ()
    named(*NAMES[::-1])
    with pytest.raises(CmfastError, match=r'another class_names; repeat .*\(class_names: \["class 0", .* there'):
        run_here(tmp_path / "new", *SHORT)


def test_names_of_classes_go_on_from_a_model_and_a_contradiction_is_said(named: Any, tmp_path: Path) -> None:
    named(*NAMES)
    start = f"init={run_here(tmp_path / 'first', *SHORT)}"
    named()
    assert spec_of(run_here(tmp_path / "second", *SHORT, start)).class_names == NAMES
    named(*NAMES[::-1])
    with pytest.raises(CmfastError, match="another order: label 0 is 'class 0' there and 'class 9' in the data"):
        run_here(tmp_path / "third", *SHORT, start)
    others = ("zero", *NAMES[1:])
    named(*others)
    with pytest.warns(CmfastWarning, match="other names: label 0 is 'class 0' there and 'zero' in the data"):
        assert spec_of(run_here(tmp_path / "fourth", *SHORT, start)).class_names == others


def test_a_run_of_an_older_version_does_not_go_on_with_its_classes_in_another_order(tmp_path: Path) -> None:
    from cmfast_train.training.folder import _check_order

    names = tuple(map(str, range(12)))
    config = dataclasses.replace(PRESETS["folder"], class_names=names)
    with pytest.raises(CmfastError, match=r"in the order of text .0, 1, 10, 11, .*name another --out"):
        _check_order(config, [], tmp_path)
    _check_order(config, list(names), tmp_path)
    _check_order(dataclasses.replace(config, class_names=names[:10]), [], tmp_path)
    _check_order(dataclasses.replace(config, class_names=()), [], tmp_path)


def test_a_run_may_have_as_many_classes_as_there_are() -> None:
    names = tuple(f"n{i:06d}" for i in range(20_000))
    assert dataclasses.replace(PRESETS["folder"], class_names=names).spec(20_000).class_names == names


# Memory of a GPU.


@pytest.mark.parametrize("where", ["step_graph.save", "step.set_lr"])
def test_too_little_memory_in_a_step_or_at_a_checkpoint_is_one_line_with_two_ways_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.40 GiB")  # what PyTorch raises there

    monkeypatch.setattr(f"cmfast_train.training.{where}", short)
    with pytest.raises(BackendError) as raised:
        run_here(tmp_path, *SHORT)
    assert str(raised.value) == (
        "the GPU has too little memory for batch=8; --set recompute=true continues this run with less memory, more "
        "slowly; smaller micro-batches compute the same: --set accumulation=2 (begin in another --out folder)"
    )
