# SPDX-License-Identifier: MIT
"""`cmfast_train.train` and `cmfast-train --network`: a network and data of one's own, from arrays to an export."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cmfast
import cmfast_export
import cmfast_train
from cmfast.errors import CmfastError
from cmfast_train import TrainConfig, phase
from helpers import ROOT
from helpers.own_networks import UNet1d, embed
from helpers.runs import assert_equal_to_the_bit, log_of, losses_of

T, A, S = 8, 2, 3  # steps, actions, size of the state
QUICK: dict[str, Any] = {"batch": 16, "log_images": 16, "grid": 4, "tensorboard": False, "device": "cpu"}


class Policy(nn.Module):
    """Actions [B, T, A] from noise and a state; the second time is one more number, where there is one."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.enter = nn.Linear(T * A + S + 8 * times, 64)
        self.leave = nn.Linear(64, T * A)

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor, c_noise_next: Tensor | None = None) -> Tensor:
        times = [embed(c) for c in (c_noise, c_noise_next) if c is not None]
        hidden = nn.functional.silu(self.enter(torch.cat([x.flatten(1), state, *times], dim=1)))
        return self.leave(hidden).unflatten(1, (T, A))


def data(n: int = 256, seed: int = 0) -> dict[str, Any]:
    """Return actions whose mean is the first number of the state, halved; standard deviation 0.5 in all."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(n, S, generator=generator)
    noise = torch.randn(n, T, A, generator=generator)
    return {"x": 0.45 * state[:, :1, None] + 0.2 * noise, "state": state}


def denoiser(net: nn.Module | None = None, /, **changes: Any) -> cmfast_train.Denoiser:
    torch.manual_seed(0)
    usual: dict[str, Any] = {"shape": (T, A), "conditions": {"state": (S,)}, "scaling": "edm", "c_noise": "ln/4"}
    return cmfast_train.wrap(net or Policy(), **{**usual, **changes})


def train(phases: str, /, out: Path | None = None, **more: Any) -> cmfast_train.Trained:
    names = {"denoiser": denoiser(), "data": data()}
    names |= {name: more.pop(name) for name in ("denoiser", "data", "teacher") if name in more}
    steps = tuple(phase(each.partition(":")[0], int(each.partition(":")[2])) for each in phases.split(","))
    return cmfast_train.train(TrainConfig(phases=steps, **{**QUICK, **more}), out=out, **names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cmfast_train.Trained]:
    out = tmp_path_factory.mktemp("policy") / "run"
    phases = (phase("edm", 40_000, lr=5e-3, ema=0.99), phase("ect", 20_000, lr=1e-3, ema=0.99, stages=(1, 4)))
    settings = {**QUICK, "batch": 100, "log_images": 10_000, "checkpoint_images": 30_000}
    return out, cmfast_train.train(
        TrainConfig(phases=phases, **settings), denoiser=denoiser(), data=data(4000), out=out
    )


def test_actions_of_an_exported_policy_follow_its_state(run: Any, tmp_path: Path) -> None:
    _, trained = run
    cmfast_export.export_onnx(trained.denoiser, tmp_path / "policy.onnx", kind="sampler", steps=1)
    state = data(500, seed=1)["state"].numpy()
    actions = cmfast.load(tmp_path / "policy.onnx").sample(500, conditions={"state": state})
    assert (actions.shape, actions.dtype) == ((500, T, A), np.float32)
    means = actions.mean(axis=(1, 2))
    slope = np.polyfit(state[:, 0], means, 1)[0]
    assert slope == pytest.approx(0.45, abs=0.1)  # of a run of two seconds
    assert actions.std() == pytest.approx(0.49, abs=0.12)


def test_the_folder_of_a_run_holds_models_samples_and_curves(run: Any) -> None:
    out, trained = run
    assert trained.out == out
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == [
        "config.json", "log.jsonl", "model.pt", "phases/1_edm.pt", "samples/000000030000.npz",
        "samples/000000060000.npz", "state.pt",
    ]  # fmt: skip
    with np.load(out / "samples/000000060000.npz") as drawn:
        assert {name: drawn[name].shape for name in drawn} == {"samples": (4, T, A), "state": (4, S)}
        np.testing.assert_array_equal(drawn["state"], data(4000)["state"][:4])
    config = json.loads((out / "config.json").read_text())
    assert (config["data"], config["network"], config["scaling"]) == ("arrays", "own", "edm")
    checkpoint = cmfast_train.load_model(out / "model.pt")
    assert checkpoint.spec == trained.denoiser.spec
    assert checkpoint.spec.scaling == "boundary", "a consistency model holds the boundary condition"
    again = checkpoint.denoiser(Policy())
    assert_equal_to_the_bit(again.network.state_dict(), trained.denoiser.network.state_dict())


def test_a_model_without_its_network_is_one_line(run: Any, tmp_path: Path) -> None:
    checkpoint = cmfast_train.load_model(run[0] / "model.pt")
    with pytest.raises(CmfastError, match=r"its code is not in the file.*denoiser\(net\)"):
        checkpoint.denoiser()
    with pytest.raises(CmfastError, match="weights do not fit the network"):
        checkpoint.denoiser(Policy(times=2))
    with pytest.raises(CmfastError, match="its code is not in the file"):
        cmfast_export.export_onnx(run[0] / "model.pt", tmp_path / "model.onnx")


def test_the_given_network_stays_as_it_is_and_the_result_trains_on() -> None:
    given = denoiser()
    before = {name: value.clone() for name, value in given.network.state_dict().items()}
    config = TrainConfig(phases=(phase("edm", 64),), **QUICK)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    trained = cmfast_train.train(config, denoiser=given, data=data())
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers go on"
    assert_equal_to_the_bit(dict(given.network.state_dict()), before)
    assert not torch.equal(trained.denoiser.network.leave.weight, given.network.leave.weight)
    assert not trained.denoiser.network.training
    again = train("ect:64", denoiser=trained.denoiser)
    assert not torch.equal(again.denoiser.network.leave.weight, trained.denoiser.network.leave.weight)


class Stopping(torch.utils.data.Dataset[Any]):
    """Samples one by one; the process gets a signal at the n-th batch that is read."""

    def __init__(self, at: int | None) -> None:
        self.whole, self.at, self.read = data(64), at, 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        if self.at is not None and self.read == 16 * self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return {name: values[index] for name, values in self.whole.items()}


@pytest.mark.parametrize(
    ("phases", "at", "between"), [("edm:128,ect:128", 20, (128, 256)), ("edm:32,ect:32,sid:160", 14, (64, 224))]
)
def test_a_stopped_run_goes_on_to_the_same_bits(phases: str, at: int, between: tuple[int, int], tmp_path: Path) -> None:
    plain, stopped, given = tmp_path / "plain", tmp_path / "stopped", denoiser(Noisy())
    settings: dict[str, Any] = {"denoiser": given, "checkpoint_images": 1000, "emas": (0.9,)}
    whole = train(phases, plain, data=Stopping(None), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(phases, stopped, data=Stopping(at), **settings)
    assert between[0] < log_of(stopped)[-1]["images"] < between[1], "in the last phase"
    again = train(phases, stopped, data=Stopping(None), **settings)
    states = [torch.load(out / "state.pt", weights_only=True) for out in (plain, stopped)]
    assert_equal_to_the_bit(*states)
    assert losses_of(plain) == losses_of(stopped)
    assert_equal_to_the_bit(*(dict(each.denoiser.network.state_dict()) for each in (whole, again)))
    arrays = train(phases, data=data(64), **settings)
    assert_equal_to_the_bit(*(dict(each.denoiser.network.state_dict()) for each in (whole, arrays)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(11, 1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        result: Tensor = self.convolution(x) + self.label(label)[:, :, None, None]
        return result


class Noisy(nn.Module):
    """What networks have beside plain weights: dropout, tied and frozen weights, statistics that change, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.norm, self.dropout = Policy(), nn.BatchNorm1d(T * A), nn.Dropout(0.2)
        self.one, self.other = nn.Linear(A, A), nn.Linear(A, A)
        self.other.weight = self.one.weight
        self.frozen = nn.Linear(S, S).requires_grad_(False)
        self.register_buffer("mask", torch.ones(T, 1, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor) -> Tensor:
        hidden = self.dropout(self.policy(x, c_noise, self.frozen(state))) * self.mask
        return self.other(self.one(self.norm(hidden.flatten(1)).unflatten(1, (T, A))))


def test_tied_and_frozen_weights_and_statistics_are_what_they_should_be(tmp_path: Path) -> None:
    given = denoiser(Noisy())
    trained = train("edm:320", tmp_path / "run", denoiser=given).denoiser.network
    assert trained.one.weight is trained.other.weight
    saved = cmfast_train.load_model(tmp_path / "run" / "model.pt").weights
    assert torch.equal(saved["one.weight"], saved["other.weight"]), "both names hold the average"
    assert torch.equal(trained.frozen.weight, given.network.frozen.weight)
    assert not trained.frozen.weight.requires_grad
    assert trained.one.weight.requires_grad
    assert int(trained.norm.num_batches_tracked) == 20
    assert trained.norm.running_mean.abs().max() > 0.001
    assert trained.mask.dtype == torch.bool


def test_the_example_of_the_page_trains_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r'```python title="train_policy.py"\n(.*?)```', page("training.md"), re.DOTALL)
    (network,) = re.findall(r'```python title="policy.py"\n(.*?)```', page("extending.md"), re.DOTALL)
    assert len([line for line in text.splitlines() if line and "import" not in line]) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "policy", raising=False)  # a benchmark has that name, too
    (tmp_path / "policy.py").write_text(network)
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(0, 0.5, (300, 16, 7)), "state": rng.normal(size=(300, 14))}  # float64, as numpy has them
    np.savez("demonstrations.npz", **arrays)
    names: dict[str, Any] = {}
    try:
        exec(compile(text.replace("500_000", "256"), "train_policy.py", "exec"), names)  # shorter
    finally:
        sys.modules.pop("policy", None)
    assert (tmp_path / "runs/policy/phases/1_edm.pt").exists()
    drawn = cmfast.load("policy.onnx").sample(2, conditions={"state": np.zeros(14)})
    assert drawn.shape == (2, 16, 7)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


FLOW: dict[str, Any] = {"scaling": "flow", "c_noise": "flow", "second_time": True}
METHODS: dict[str, tuple[str, dict[str, Any], Callable[[cmfast.ModelSpec], bool]]] = {
    "edm": ("edm:32", {}, lambda spec: spec.scaling == "edm"),
    "ct": ("ct:32", {}, lambda spec: spec.scaling == "boundary"),
    "ict": ("ict:32", {}, lambda spec: spec.scaling == "boundary"),
    "ect": ("ect:32", {"scaling": "boundary"}, lambda spec: spec.scaling == "boundary"),
    "cd": ("edm:32,cd:32", {}, lambda spec: spec.scaling == "boundary"),
    "cmt and ect": ("edm:32,cmt:32,ect:32", {}, lambda spec: spec.scaling == "boundary"),
    "ect and sid": ("edm:32,ect:32,sid:160", {}, lambda spec: spec.scaling == "boundary"),
    "pd": ("edm:32,pd:32", {}, lambda spec: (spec.renoise, list(spec.sigmas)) == ("ddim", [1])),
    "sct": ("sct:32", {"scaling": "trigflow", "c_noise": "trig"}, lambda spec: spec.scaling == "trigflow"),
    "scd": ("edm:32,scd:32", {"scaling": "boundary"}, lambda spec: spec.scaling == "edm"),
    "mf": ("mf:32", FLOW, lambda spec: spec.second_time),
    "edm and mf": ("edm:32,mf:32", FLOW, lambda spec: spec.second_time),
    "ect of two times": ("ect:32", FLOW, lambda spec: spec.second_time),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_network_of_sequences_with_a_state(method: str) -> None:
    phases, conventions, holds = METHODS[method]
    given = denoiser(Policy(times=2 if "second_time" in conventions else 1), **conventions)
    trained = train(phases, denoiser=given).denoiser
    assert holds(trained.spec), trained.spec
    for name, weight in trained.network.named_parameters():
        assert not torch.equal(weight, given.network.get_parameter(name)), name
    x = torch.randn(3, T, A)
    drawn = trained(x, torch.full([3], 80.0), state=torch.randn(3, S))
    assert (drawn.shape, bool(drawn.isfinite().all())) == (x.shape, True)


def test_a_teacher_may_be_another_network_that_takes_less() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(A, A)

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            result: Tensor = self.all(x)
            return result

    teacher = denoiser(Blind(), conditions={}).requires_grad_(False)
    given = denoiser()
    for used in (teacher, given):
        trained = train("cd:32", denoiser=given, teacher=used)
        assert trained.denoiser.spec.scaling == "boundary"
    frozen = denoiser().requires_grad_(False)  # its fake scores are trained all the same
    trained = train("ect:32,sid:160", denoiser=given, teacher=frozen)
    assert all(weight.isfinite().all() for weight in trained.denoiser.parameters())
    with pytest.raises(CmfastError, match="the teacher is not conditioned on state, and sid would unlearn it"):
        train("sid:160", denoiser=given, teacher=teacher)
    with pytest.raises(CmfastError, match="sid distils a diffusion model: pass teacher="):
        train("ect:32,sid:160", denoiser=given)


class Looking(Policy):
    """Notes the states that it sees."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor, c_noise_next: Tensor | None = None) -> Tensor:
        if self.training:
            self.seen.append(state)
        return super().forward(x, c_noise, state)


def test_a_tensor_is_dropped_as_often_as_requested() -> None:
    Looking.seen.clear()
    trained = train("edm:3200", denoiser=denoiser(Looking(), null={"state": -1.5}), label_dropout=0.25)
    without = (torch.cat(Looking.seen) == -1.5).all(dim=1)
    assert float(without.float().mean()) == pytest.approx(0.25, abs=0.03)  # four standard deviations of 3,200
    assert trained.denoiser.spec.conditions[0].null == -1.5


@pytest.mark.usefixtures("any_precision")
def test_half_precision_and_micro_batches_train(tmp_path: Path) -> None:
    given = denoiser(UNet1d(A, S))
    settings: dict[str, Any] = {"precision": "bf16", "accumulation": 2, "emas": (0.9,), "ema_stds": (0.1,)}
    halves = train("edm:64,sct:64", tmp_path / "run", denoiser=given, **settings)
    assert {weight.dtype for weight in halves.denoiser.network.parameters()} == {torch.float32}
    assert sorted(path.name for path in (tmp_path / "run" / "ema").iterdir())[0] == "0.9.pt"
    with pytest.raises(CmfastError, match="precision=no on the CPU in another process"):
        train("edm:32", precision="fp32")


def test_a_network_says_which_blocks_are_computed_again() -> None:
    class Blocks(Policy):
        def blocks(self) -> list[nn.Module]:
            return [self.enter, self.leave]

    given = denoiser(Blocks())
    plain, again = (train("edm:64", denoiser=given, recompute=recompute) for recompute in (False, True))
    assert_equal_to_the_bit(*(dict(each.denoiser.network.state_dict()) for each in (plain, again)))


def net_of(function: Callable[..., Tensor]) -> nn.Module:
    """Return a network with one weight that computes function(weight, x, c_noise, state)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, c_noise: Tensor, state: Tensor) -> Tensor:
            return function(self.weight, x, c_noise, state)

    return Net()


class Spiral(Policy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", 1j * torch.ones(2))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        return nn.Sequential(torch.jit.trace(nn.Linear(A, A), torch.ones(1, T, A)))  # type: ignore[no-untyped-call]


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


class Labelled(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.all, self.label = nn.Linear(A, A), nn.Embedding(rows, A)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        result: Tensor = self.all(x) + self.label(label)[:, None]
        return result


def of_classes(rows: int) -> dict[str, Any]:
    """Return a network with a table of so many rows, for 10 classes and none of them, and data of the first two."""
    given = denoiser(Labelled(rows), conditions={"label": 10}, null={"label": 10})
    return {"denoiser": given, "data": {"x": data(64)["x"], "label": torch.arange(64) % 2}}


OF_DIGITS = {"config": TrainConfig(data="digits", image_size=8, channels=1, phases=(phase("edm", 32),))}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no wrap": ({"denoiser": Policy()}, r"denoiser must be what cmfast_train.wrap\(net, ...\) returns, got Policy"),
    "teacher": ({"teacher": Policy()}, "teacher must be what cmfast_train.wrap"),
    "no teacher": ({"phases": "cd:32"}, "cd distils a diffusion model: pass teacher="),
    "a teacher too many": ({"teacher": denoiser()}, "a teacher, and none of these phases distils: edm"),
    "another teacher": (
        {"phases": "cd:32", "teacher": denoiser(Policy(), conditions={"state": (4,)})},
        "the teacher takes",
    ),
    "the levels of a teacher": ({"phases": "cd:32", "teacher": denoiser(sigma_max=40.0)}, "it knows noise levels from"),
    "two times": (
        {"phases": "mf:32", "denoiser": denoiser(scaling="flow", c_noise="flow")},
        r"wrap\(..., second_time=True",
    ),
    "conventions": (
        {"phases": "sct:32", "denoiser": denoiser(scaling="vp_v", c_noise="ln/4")},
        "sct needs scaling trigflow",
    ),
    "conventions twice": ({"sigma_max": 40.0}, "sigma_max=40.0: the denoiser has its own conventions"),
    "flip": ({"flip": True}, "flip=true mirrors images"),
    "no null": ({"label_dropout": 0.1}, "label_dropout needs a condition that can be left out"),
    "no blocks": ({"recompute": True}, r"give Policy a method blocks\(\)"),
    "init": ({"init": "model.pt"}, "pass the models: denoiser="),
    "data twice": (
        {**OF_DIGITS, "data": data()},
        "the config has data=digits, and data= brings the data: leave it out of the config",
    ),
    "no data": ({"data": None}, "data= is missing: pass"),
    "graph": ({"graph": "true"}, "graph=true: the steps of edm cannot be a CUDA graph"),
    "raises": (
        {"denoiser": denoiser(net_of(lambda w, x, c, state: w * x + state))},
        r"Net, called with x \[B, 8, 2\], c_noise \[B\], state=\[B, 3\], raised RuntimeError: .*own_training.py:\d+",
    ),
    "shape": ({"denoiser": denoiser(net_of(lambda w, x, c, state: w * x[:, :1]))}, r"the network returned \[2, 1, 2\]"),
    "one sample for all": (
        {"denoiser": denoiser(net_of(lambda w, x, c, state: w * x.mean(0, keepdim=True)))},
        r"Net returned \[1, 8, 2\] for \[B, 8, 2\] of B=2",
    ),
    "a norm of one sample": (
        {"denoiser": denoiser(Noisy()), "batch": 1, "log_images": 1, "phases": "edm:4"},
        r"state=\[B, 3\], in training mode, B=1, raised ValueError: Expected more than 1 value",
    ),
    "no row for the last class": (of_classes(9), r"label=\[B\] full of 9, raised IndexError"),
    "no row for no class": (of_classes(10), r"label=\[B\] full of 10, raised IndexError"),
    "no gradient": ({"denoiser": denoiser(net_of(lambda w, x, c, state: x))}, r"denoiser.requires_grad_\(True\)"),
    "no derivative": (
        {"phases": "sct:32", "denoiser": denoiser(net_of(lambda w, x, c, state: w * NoForwardMode.apply(x)))},
        "sct differentiates Net in forward mode, which fails: .*sct.derivative=finite",
    ),
    "in place": (
        {"denoiser": denoiser(net_of(lambda w, x, c, state: w * x * state.zero_().sum()))},
        "Net changes its condition state in place",
    ),
    "lazy": ({"denoiser": denoiser(nn.LazyLinear(A))}, "LazyLinear: weight has no values yet"),
    "complex": ({"denoiser": denoiser(Spiral())}, "holds phase"),
    "TorchScript": ({"denoiser": denoiser(traced())}, "TorchScript cannot be trained"),
    "not finite": (
        {"denoiser": denoiser(net_of(lambda w, x, c, state: w * x / 0))},
        r'step 0 .* try .* phase\("edm", .., lr=0.000\d\), precision="fp32", or check x and its .* sigma_data=0.5$',
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_trained_is_one_line(what: str) -> None:
    values, words = WRONG[what]
    values = dict(values)
    with pytest.raises(CmfastError, match=words) as caught:
        cmfast_train.train(denoiser=denoiser(), **values) if "config" in values else train(
            values.pop("phases", "edm:32"), **values
        )
    assert "\n" not in str(caught.value)


def test_training_without_gradients_is_one_line() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(CmfastError, match=r"call train outside torch.no_grad\(\)"):
            train("edm:32")


def test_a_run_does_not_begin_in_the_folder_of_its_data_and_leaves_other_files_alone(tmp_path: Path) -> None:
    for name, values in data(32).items():
        np.save(tmp_path / f"{name}.npy", values.numpy())
    with pytest.raises(CmfastError, match="is the folder of the data"):
        train("edm:32", tmp_path, data=tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train("edm:32", tmp_path / "run", data=tmp_path)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


class Masked(Policy):
    """With buffers that are no weights: a causal mask with infinity in it, a table in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((T, T), -torch.inf).triu(1))
        self.register_buffer("table", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.mask.softmax(1) @ x, c_noise, state * self.table.float())


def test_buffers_with_infinity_and_of_other_precisions_are_kept(tmp_path: Path) -> None:
    trained = train("edm:32", tmp_path / "run", denoiser=denoiser(Masked()))
    network = cmfast_train.load_model(tmp_path / "run" / "model.pt").denoiser(Masked()).network
    for found in (trained.denoiser.network, network):
        assert torch.equal(found.mask, Masked().mask)
        assert found.table.dtype == torch.float64


def test_a_run_of_other_data_or_of_another_network_is_not_continued(tmp_path: Path) -> None:
    train("edm:32", tmp_path / "run")
    wrong: dict[str, dict[str, Any]] = {
        r"another data \(\[256, 0, .*\], now \[100, 0, .*\]\)": {"data": data(100)},
        r"another data \(\[256, 0, .*\], now \[256, 0, .*\]\)": {"data": data(256, seed=1)},
        "another network .* now .* tensors of": {"denoiser": denoiser(Noisy())},
        "another sigma_data": {"denoiser": denoiser(sigma_data=0.7)},
    }
    for words, changes in wrong.items():
        with pytest.raises(CmfastError, match=words):
            train("edm:32", tmp_path / "run", **changes)


def test_a_state_without_a_digest_of_its_data_is_continued(tmp_path: Path) -> None:
    train("edm:32", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert len(state["made_for"]["data"]) == 3
    del state["made_for"]["data"][2]  # as in older states
    torch.save(state, tmp_path / "run" / "state.pt")
    train("edm:32", tmp_path / "run", data=data(256, seed=1))
    with pytest.raises(CmfastError, match="another data"):
        train("edm:32", tmp_path / "run", data=data(100))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the user's: code, conventions, data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_policy.py").write_text(
        "from test_own_training import Images, Policy\nmake = Policy\n"
        "def frozen():\n    made = Policy()\n    made.enter.requires_grad_(False)\n    return made\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(Path(__file__).parent)
    spec = {"shape": [T, A], "conditions": {"state": [S]}, "scaling": "edm", "c_noise": "ln/4"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    np.savez(tmp_path / "data.npz", **{name: values.numpy() for name, values in data().items()})
    return tmp_path


def test_the_command_trains_continues_and_exports(
    folder: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    from cmfast_export.cli import main as export
    from cmfast_train.cli.train import main

    own = ["--network", "own_policy:make", "--spec", "spec.json", "--data", "data.npz"]
    settings = ["batch=16", "device=cpu", "tensorboard=false", "grid=4"]
    settings = [word for setting in settings for word in ("--set", setting)]
    result = call(main, *own, "--out", "run", *settings, "--set", "phases=edm:64")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "run/model.pt is trained on 64 samples; samples are in run/samples",
        "next: cmfast-export run/model.pt --network own_policy:make",
    ]
    assert cmfast_train.load_model("run/model.pt").network.factory == "own_policy:make"  # type: ignore[union-attr]
    teacher = ["--teacher", "run/model.pt", "--set", "phases=cd:32"]
    assert call(main, *own, "--out", "cd", *settings, *teacher).returncode == 0
    goes_on = ["--network", "own_policy:make", "--data", "data.npz", "--init", "run/model.pt"]
    assert call(main, *goes_on, "--out", "ect", *settings, "--set", "phases=ect:32").returncode == 0
    goes_on[1] = "own_policy:frozen"
    assert call(main, *goes_on, "--out", "part", *settings, "--set", "phases=ect:32").returncode == 0
    weights = [cmfast_train.load_model(f"{name}/model.pt").weights for name in ("run", "part")]
    assert torch.equal(weights[0]["enter.weight"], weights[1]["enter.weight"]), "what the factory froze stays"
    assert not torch.equal(weights[0]["leave.weight"], weights[1]["leave.weight"])
    result = call(export, "run/model.pt", "--network", "own_policy:make", "-o", "model.onnx")
    assert result.returncode == 0, result.stderr
    refused(call(main, *own, "--out", "run", *settings, "--set", "phases=edm:128"), "another phases")
    refused(call(main, "--out", "x", *own[2:]), "--network")
    refused(call(main, *own, "--out", "x", "--set", "sigma_data=1"), "--set sigma_data", "--spec")
    refused(call(main, *own[:4], "--out", "x"), "--data FILE")
    spec = {"shape": [1, 8, 8], "conditions": {"label": 10}, "scaling": "edm", "c_noise": "ln/4", "null": {"label": 10}}
    (folder / "images.json").write_text(json.dumps(spec))
    images = ["--network", "own_policy:Images", "--spec", "images.json", "--set", "phases=edm:32,ect:32"]
    images += ["--set", "flip=true", "--set", "label_dropout=0.1"]
    assert call(main, "digits", *images, "--out", "images", *settings).returncode == 0
    assert cmfast_train.load_model("images/model.pt").spec.class_names == tuple("0123456789")
    assert (folder / "images/samples/000000000064.png").exists()
    refused(call(main, "digits", *own[:4], "--out", "x"), "the data of digits are [1, 8, 8]")
    refused(call(export, "run/model.pt"), "its code is not in the file", "--network own_policy:make")
