# SPDX-License-Identifier: MIT
"""Recorded steps compute what plain steps compute, to the bit; a CUDA graph is imitated by replaying its operations."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmfast.errors import BackendError, CmfastError
from cmfast_train.backends.torch_cuda import WARM_UPS
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.batches import batches
from cmfast_train.training import saving, step_graph
from cmfast_train.training.saving import resume, save
from cmfast_train.training.state import Run
from cmfast_train.training.step import optimise
from cmfast_train.training.step_graph import RecordedSteps, check_graph, why_not
from cmfast_train.training.trainer import train
from helpers.runs import assert_equal_to_the_bit, losses_of
from helpers.steps import CASES, TINY, begin_last_phase, data, new_run, take_steps

pytestmark = pytest.mark.usefixtures("any_precision")

# What waits for a GPU or brings numbers from the host, neither of which a recording may.
FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero")


class Operations(TorchDispatchMode):
    """The operations on tensors that are run in it, with the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(FORBIDDEN), f"{name} cannot be recorded"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def again(self) -> None:
        """Run them on the same memory, as a CUDA graph does: Python has no part in it."""
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Graphs:
    """Records computations; the recording itself counts as the first run, for on a CPU it computes."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        operations, runs = Operations(), 0

        def replay() -> Tensor:
            nonlocal runs, output
            if runs == 0:
                with operations:
                    output = body()
            else:
                operations.again()
            runs += 1
            self.replayed += 1
            return output

        output = torch.empty(0)
        return replay


def state_of(run: Run) -> list[Tensor]:
    states = [run.state.optimizer.state[weight] for weight in run.state.student.parameters()]
    return [
        *run.state.student.parameters(),
        *(run.state.target.parameters() if run.state.target is not None else ()),
        *(value for average in run.state.averages.state().values() for value in average.values()),
        *(state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")),
    ]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_are_the_plain_steps_to_the_bit(case: str, tmp_path: Path) -> None:
    plain, recorded = (new_run(tmp_path, *CASES[case]) for _ in range(2))
    begin_last_phase(plain)
    begin_last_phase(recorded)
    graphs, count = Graphs(), plain.state.total
    want = take_steps(plain, functools.partial(optimise, plain), count)
    got = take_steps(recorded, RecordedSteps(recorded, graphs.record), count)
    assert plain.step == recorded.step == count
    numbers = {plain.phase.constants(step, count) for step in range(count)}
    assert graphs.recorded >= min(len(numbers), 2), "what changed was not recorded anew"
    assert graphs.replayed >= count / 2
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert same(list(ours), list(theirs)), f"step {step}"
    assert same(state_of(recorded), state_of(plain))
    assert not same([loss for loss, _ in want[1:]], [loss for loss, _ in want[:-1]])


@pytest.mark.usefixtures("quickly")
def test_a_number_that_is_not_among_the_constants_is_noticed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, recorded = (new_run(tmp_path, *CASES["ect"]) for _ in range(2))
    count = plain.config.images // plain.config.batch
    take_steps(plain, functools.partial(optimise, plain), count)
    monkeypatch.setattr(step_graph, "constants_of", lambda *_: ())  # a method forgets to say its stage
    take_steps(recorded, RecordedSteps(recorded, Graphs().record), count)
    assert not same(state_of(recorded), state_of(plain))


@pytest.mark.usefixtures("quickly")
def test_a_recorded_run_saved_in_the_middle_goes_on_plain_or_recorded(tmp_path: Path) -> None:
    plain = new_run(tmp_path / "plain", "phases=edm:320", "edm.lr_decay=1")
    take_steps(plain, functools.partial(optimise, plain), 40)
    first = new_run(tmp_path, "phases=edm:320", "edm.lr_decay=1")
    take_steps(first, RecordedSteps(first, Graphs().record), 20)
    (tmp_path / "samples").mkdir()
    save(first)
    for makes in (lambda run: functools.partial(optimise, run), lambda run: RecordedSteps(run, Graphs().record)):
        run = new_run(tmp_path, "phases=edm:320", "edm.lr_decay=1", lively=False)
        resume(run)
        assert run.step == 20
        take_steps(run, makes(run), 20)
        assert same(state_of(run), state_of(plain))


@pytest.mark.usefixtures("quickly")
def test_recordings_that_are_released_or_resumed_within_a_turn_go_on_to_the_bit(tmp_path: Path) -> None:
    settings = CASES["sid"]
    (tmp_path / "plain").mkdir()
    plain = new_run(tmp_path / "plain", *settings)
    begin_last_phase(plain)
    take_steps(plain, functools.partial(optimise, plain), plain.state.total)
    first = new_run(tmp_path, *settings)
    begin_last_phase(first)
    graphs = Graphs()
    take = RecordedSteps(first, graphs.record)
    take_steps(first, take, 31)
    assert take.release()
    assert not take.release()
    take_steps(first, take, 15)
    assert graphs.recorded == 4, "one for each turn, twice"
    (tmp_path / "samples").mkdir()
    save(first)
    again = new_run(tmp_path, *settings, lively=False)
    resume(again)
    assert again.step == 46
    take_steps(again, RecordedSteps(again, Graphs().record), again.state.total - 46)
    assert same(state_of(again), state_of(plain))


def test_weights_of_two_turns_are_not_recorded_wrongly(tmp_path: Path) -> None:
    run = new_run(tmp_path, "phases=edm:160")
    take_steps(run, functools.partial(optimise, run), 2)
    weights = list(run.state.student.parameters())
    run.state.optimizer.state[weights[1]]["step"] += 1
    with pytest.raises(BackendError, match="weights of several turns cannot be recorded as CUDA graphs"):
        step_graph._Radam(run.state.optimizer, weights)


def test_what_would_not_be_worth_it_is_not_recorded(tmp_path: Path) -> None:
    for settings in (["phases=edm:160"], ["phases=ect:320", "ect.stages=0,7"]):  # 20 steps; 8 stages of 5
        run, graphs = new_run(tmp_path, *settings), Graphs()
        take_steps(run, RecordedSteps(run, graphs.record), 1000)
        assert graphs.recorded == 0
    run, graphs = new_run(tmp_path, "phases=edm:240"), Graphs()
    take_steps(run, RecordedSteps(run, graphs.record), 1000)
    assert (graphs.recorded, graphs.replayed) == (1, 30 - WARM_UPS)


SAYS = [  # phases, and whether a step is recorded where 22 alike are not enough and 23 are
    ("edm:176", False), ("edm:184", True), ("ect:352 ect.stages=0,1", False), ("ect:360 ect.stages=0,1", True),
    ("ict:1600 ict.s0=4 ict.s1=8", True), ("ict:400 ict.s0=4 ict.s1=64", False), ("pd/4:352", True),
    ("sid:264 sid.fakes=2", False), ("sid:272 sid.fakes=2", True),  # of 34 steps, 23 are of the fakes
]  # fmt: skip


@pytest.mark.parametrize(("phases", "expected"), SAYS)
def test_the_log_says_recorded_only_of_phases_of_which_a_step_will_be(
    phases: str, expected: bool, tmp_path: Path
) -> None:
    name, *others = phases.split()
    run: Any = new_run(tmp_path, f"phases={'edm:8,' if name.startswith(('pd', 'sid')) else ''}{name}", *others)
    begin_last_phase(run)
    context = run.context
    run.context = dataclasses.replace(context, accelerator=Cuda())
    said = step_graph.recorded(run, run.phase)
    assert (said == "recorded") == expected
    assert expected or "too short: a recording needs 23 steps that compute the same" in said
    run.context, graphs = context, Graphs()
    take_steps(run, RecordedSteps(run, graphs.record), run.state.total)
    assert (graphs.recorded > 0) == expected


def test_of_a_phase_that_is_resumed_only_the_steps_to_come_count(tmp_path: Path) -> None:
    run: Any = new_run(tmp_path, "phases=edm:240,ect:80", lively=False)
    run.context = dataclasses.replace(run.context, accelerator=Cuda())
    assert [step_graph.recorded(run, phase)[:9] for phase in run.config.phases] == ["recorded", "too short"]
    run.step = 10
    assert step_graph.recorded(run, run.phase).startswith("too short")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch, quickly: None) -> list[weakref.ref[Any]]:
    """Let this CPU's steps be recorded by imitation; give the recordings, dead ones too."""
    found: list[weakref.ref[Any]] = []

    def record(body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = Graphs().record(body)
        found.append(weakref.ref(replay))
        return replay

    monkeypatch.setattr(step_graph, "why_not", lambda *_: "")
    monkeypatch.setattr(step_graph, "record", record)
    return found


class Short:
    """Something of a checkpoint for which a GPU has too little memory so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, look: Callable[[], Any] = lambda: None) -> None:
        self.times, self.seen = times, []
        self._enough, self._look = saving.save_samples, look
        monkeypatch.setattr(saving, "save_samples", self)

    def __call__(self, denoiser: Any, *arguments: Any) -> None:
        self.seen.append((weakref.ref(denoiser), self._look(), [before() is not None for before, *_ in self.seen]))
        if len(self.seen) <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self._enough(denoiser, *arguments)


SAVED_TWICE = ["phases=edm:160", "checkpoint_images=80", "log_images=8"]


def run_of(out: Path) -> Path:
    return train(override(PRESETS["digits"], [*TINY[:-1], *SAVED_TWICE]), out, None).parent


def test_a_checkpoint_for_which_memory_does_not_suffice_is_written_without_the_recorded_step(
    tmp_path: Path, recordings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as plain:
        plain.setattr(step_graph, "why_not", lambda *_: "graph=false")
        want = run_of(tmp_path / "plain")
    assert recordings == []
    gc.disable()  # memory that waits for it is not there for the second try
    try:
        short = Short(monkeypatch, 1, lambda: [recording() is not None for recording in recordings])
        got = run_of(tmp_path / "short")
    finally:
        gc.enable()
    # Of both tries and of the checkpoint at the end: which recordings there are, and which denoisers of tries before.
    assert [seen for _, *seen in short.seen] == [[[True], []], [[False], [False]], [[False, True], [False, False]]]
    assert losses_of(got) == losses_of(want)
    assert_equal_to_the_bit(*(torch.load(out / "state.pt", weights_only=True) for out in (got, want)))
    assert os.listdir(got / "samples") == os.listdir(want / "samples")


def test_a_checkpoint_for_which_memory_never_suffices_is_one_line(
    tmp_path: Path, recordings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Short(monkeypatch, 100)
    with pytest.raises(BackendError, match="too little memory for batch=8; --set recompute=true continues this run"):
        run_of(tmp_path)
    assert len(short.seen) == 2
    monkeypatch.setattr(step_graph, "why_not", lambda *_: "graph=false")
    with pytest.raises(BackendError, match="too little memory for batch=8"):
        run_of(tmp_path)
    assert len(short.seen) == 3, "without a recording there was nothing to free"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["phases=edm:80"], ""),
        (["phases=edm:80", "dropout=0.2"], ""),
        (["phases=ect:80"], ""),
        (["phases=edm:8,sid:80"], ""),
        (["phases=ect:80", "dropout=0.2"], "share dropout masks"),
        (["phases=sct:80"], "sct differentiates in forward mode"),
        (["phases=mf:80"], "mf differentiates in forward mode"),
        (["phases=edm:80", "accumulation=2"], "accumulation is above 1"),
        (["phases=edm:80", "recompute=true"], "recompute=true"),
        (["phases=edm:80", "graph=false"], "graph=false"),
    ],
    ids=" ".join,
)
def test_what_is_recorded_on_a_gpu_follows_the_configuration(settings: list[str], why: str, tmp_path: Path) -> None:
    run: Any = new_run(tmp_path, *settings, lively=False)
    assert why_not(run.context, run.phase) == ("graph=false" if why == "graph=false" else "the device is cpu")
    run.context = dataclasses.replace(run.context, accelerator=Cuda())
    said = why_not(run.context, run.phase)
    assert (why in said) if why else said == ""


class Cuda:
    """The facts of an accelerator on a GPU."""

    device, num_processes, mixed_precision = torch.device("cuda"), 1, "bf16"


def test_graph_true_where_it_cannot_be_is_an_error_with_the_reason(tmp_path: Path) -> None:
    config = override(PRESETS["digits"], [*TINY, "phases=edm:80", "graph=true"])
    with pytest.raises(BackendError, match="the steps of edm cannot be a CUDA graph, the device is cpu; use"):
        train(config, tmp_path / "run", None)
    assert not (tmp_path / "run" / "config.json").exists()
    run: Any = new_run(tmp_path, "phases=edm:80,ect:80", "graph=true", "dropout=0.1", lively=False)
    run.context = dataclasses.replace(run.context, accelerator=Cuda())
    with pytest.raises(CmfastError, match="steps of ect cannot be a CUDA graph, its evaluations share dropout masks"):
        check_graph(run.context)
    with pytest.raises(CmfastError, match="graph must be auto, true or false, got 'yes'"):
        override(PRESETS["digits"], ["graph=yes"])


def test_a_device_makes_the_batches_that_the_thread_makes() -> None:
    share = slice(3, 7)
    for start, stop in ((0, 300), (250, 290)):  # 300 batches of 10 are an epoch and two thirds
        plain = batches(data(), 10, 5, start, stop, share, 0, False)
        kept = batches(data(), 10, 5, start, stop, share, 0, False, torch.device("cpu"))
        for one, two in zip(plain, kept, strict=True):
            assert same(list(one), list(two))
            assert [value.dtype for value in two] == [torch.uint8, torch.int64]
