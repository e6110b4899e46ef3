# SPDX-License-Identifier: MIT
"""The clock of cmfast-bench: whose turn it is, which calls count, and when times should not be believed."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cmfast
from cmfast.bench import timing
from cmfast.checks import usable_cores
from cmfast.errors import CmfastError


def sleeper(seconds: float, log: list[str], name: str) -> Callable[[], None]:
    """Return a call that takes at least so long, and says that it was made."""

    def call() -> None:
        log.append(name)
        time.sleep(seconds)

    return call


# interleave


def test_contenders_take_turns_in_bursts_and_each_round_begins_one_further_on() -> None:
    log: list[str] = []
    lengths = {"a": 0.001, "b": 0.005, "c": 0.02}  # seconds of a call
    calls = {name: sleeper(length, log, name) for name, length in lengths.items()}
    times = timing.interleave(calls, seconds=0.15, calls=5, warmup_s=0)
    bursts = [(name, len(list(same))) for name, same in itertools.groupby(log)]
    assert bursts[:3] == [("a", 2), ("b", 2), ("c", 2)]  # warm-up
    rounds, rest = divmod(len(bursts) - 3, 3)
    assert (rest, rounds >= 3) == (0, True)
    turns = itertools.cycle(["abc", "bca", "cab"])
    assert "".join(name for name, _ in bursts[3:]) == "".join(itertools.islice(turns, rounds))
    for name, each in times.items():
        assert sum(each) >= 150, "less than the seconds that were asked for"
        assert len(each) == log.count(name) - 2 - rounds, "only the first call of a burst goes uncounted"
        assert min(each) >= 999 * lengths[name], "in ms; 0.1 % for two clocks"
    assert min(calls for _, calls in bursts[3:]) >= 1 + timing.BURST_CALLS


@pytest.mark.parametrize(("calls", "counted"), [(1, 3), (3, 3), (4, 6), (7, 9)])
def test_there_are_as_many_calls_as_requested_in_whole_bursts(calls: int, counted: int) -> None:
    log: list[str] = []
    times = timing.interleave({"slow": sleeper(0.02, log, "slow")}, seconds=0, calls=calls, warmup_s=0)
    assert len(times["slow"]) == counted  # a burst is three calls of 20 ms
    assert len(log) == 2 + counted * 4 // 3


def test_slow_calls_are_few_once_they_have_taken_long_enough() -> None:
    def calls(most_s: float) -> int:
        log: list[str] = []
        return len(
            timing.interleave({"slow": sleeper(0.02, log, "slow")}, seconds=0.01, warmup_s=0, most_s=most_s)["slow"]
        )

    assert calls(0.05) == 6, "two bursts: five calls are enough"
    assert calls(0.3) == 15
    assert calls(math.inf) == 21, "seven bursts: twenty are"


def test_a_burst_of_very_slow_calls_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_S", 0.05)
    log: list[str] = []
    times = timing.interleave({"slow": sleeper(0.06, log, "slow")}, seconds=0, calls=2, warmup_s=0)
    assert len(times["slow"]) == 2
    assert len(log) == 2 + 2 * 2


def test_a_budget_ends_the_rounds_and_each_has_had_a_turn() -> None:
    log: list[str] = []
    calls = {name: sleeper(0.02, log, name) for name in "abc"}
    start = time.perf_counter()
    times = timing.interleave(calls, seconds=60, budget_s=0.5)
    took = time.perf_counter() - start
    assert 0.5 <= took < 0.5 + 3 * (timing.PAUSE_S + 4 * 0.02) + 0.3, "a round over it at most"
    assert len({len(each) for each in times.values()}) == 1, "whole rounds"
    assert min(map(len, times.values())) >= 3
    tight = timing.interleave(calls, seconds=60, budget_s=0)
    assert [len(each) for each in tight.values()] == [3, 3, 3]


def test_the_first_call_after_another_contender_is_not_counted() -> None:
    previous = ""

    def call(name: str) -> Callable[[], None]:
        def cold_at_first() -> None:
            nonlocal previous
            time.sleep(0.001 if previous == name else 0.2)
            previous = name

        return cold_at_first

    times = timing.interleave({name: call(name) for name in "ab"}, seconds=0, calls=1, warmup_s=0)
    assert max(times["a"] + times["b"]) < 200


def test_the_cpu_time_is_that_of_the_counted_calls() -> None:
    def work() -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass

    cpu_ms: dict[str, list[float]] = {}
    times = timing.interleave(
        {"works": work, "sleeps": lambda: time.sleep(0.002)}, seconds=0.02, calls=3, cpu_ms=cpu_ms
    )
    assert {name: len(each) for name, each in cpu_ms.items()} == {name: len(each) for name, each in times.items()}
    assert min(cpu_ms["works"]) >= 2
    assert min(cpu_ms["sleeps"]) < 1


def test_warming_up_takes_the_time_that_was_requested() -> None:
    log: list[str] = []
    start = time.perf_counter()
    timing.interleave({"a": sleeper(0.02, log, "a")}, seconds=0, calls=1, warmup_s=0.2)
    assert time.perf_counter() - start >= 0.2 + 4 * 0.02
    assert len(log) > 2 + 4


@pytest.mark.parametrize(
    ("contenders", "settings", "words"),
    [
        ({}, {}, "nothing to time"),
        ({"a": int}, {"seconds": -1.0}, "got -1.0 and 20"),
        ({"a": int}, {"seconds": math.nan}, "got nan"),
        ({"a": int}, {"seconds": math.inf}, "got inf"),
        ({"a": int}, {"calls": 0}, "got 3.0 and 0"),
    ],
)
def test_a_request_that_would_time_nothing_or_never_end_is_an_error(
    contenders: dict[str, Callable[[], object]], settings: dict[str, float], words: str
) -> None:
    with pytest.raises(CmfastError, match=words):
        timing.interleave(contenders, **settings)  # type: ignore[arg-type]


def test_what_a_contender_raises_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        timing.interleave({"a": lambda: 1 / 0})


# summarise


def test_the_summary_of_known_times() -> None:
    times = [11.0, 1.0, 10.0, 2.0, 9.0, 3.0, 8.0, 4.0, 7.0, 5.0, 6.0]
    assert timing.summarise(times) == timing.Summary(median_ms=6, p10_ms=2, p90_ms=10, max_ms=11, calls=11)
    assert times[0] == 11.0, "it sorts a copy"
    assert timing.summarise([3.0]) == timing.Summary(median_ms=3, p10_ms=3, p90_ms=3, max_ms=3, calls=1)
    assert timing.summarise([1.0, 2.0]).median_ms == 1.5


def test_no_times_have_no_summary() -> None:
    with pytest.raises(CmfastError, match="no times"):
        timing.summarise([])


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_those_of_numpy(values: list[float], fraction: float) -> None:
    want = np.percentile(values, 100 * fraction)
    assert timing.percentile(sorted(values), fraction) == pytest.approx(want, rel=1e-9)


# noise_warning

CALM = {"calm": [1.0] * 10}
LIMIT = timing.MAX_LOAD * usable_cores()


@pytest.mark.parametrize(
    ("times", "load", "steal"),
    [
        (CALM, None, None),
        (CALM, LIMIT, 0.01),  # the limits themselves are allowed
        ({"a": [1.0] * 5 + [1.3] * 5, "b": [100.0] * 9}, 0.0, 0.0),  # a spread is each contender's own
        ({"a": [0.0] * 9}, None, None),  # a clock that stands still divides nothing by zero
        ({"a": [1.0] * 98 + [50.0] * 2}, None, None),  # a rare outlier is in the maximum
    ],
)
def test_a_quiet_machine_is_not_warned_of(times: dict[str, list[float]], load: float | None, steal: float) -> None:
    assert timing.noise_warning(times, load=load, steal=steal) is None


@pytest.mark.parametrize(
    ("times", "load", "steal", "words"),
    [
        (
            {"wild": [1.0] * 5 + [2.0] * 5, **CALM},
            None,
            None,
            "the calls of wild spread by a factor of 2.00 from p10 to p90",
        ),
        (
            {"wild": [1.0] * 5 + [2.0] * 5, "wilder": [1.0] * 5 + [3.0] * 5},
            None,
            None,
            "wilder spread by a factor of 3.00",
        ),
        (CALM, LIMIT + 1, None, f"the load average is {LIMIT + 1:.1f} on {usable_cores()} core(s)"),
        (CALM, None, 0.02, "the host gave 2.0% of the CPU time to other machines"),
    ],
)
def test_a_noisy_machine_is_named_with_its_reason(
    times: dict[str, list[float]], load: float | None, steal: float | None, words: str
) -> None:
    warning = timing.noise_warning(times, load=load, steal=steal) or ""
    assert warning.startswith("the machine is too noisy to trust small differences: ")
    assert words in warning
    assert ";" not in warning, "one reason"


def test_all_reasons_stand_in_one_sentence() -> None:
    warning = timing.noise_warning({"wild": [1.0, 9.0]}, load=LIMIT + 1, steal=0.5) or ""
    assert [word in warning for word in ("spread", "load average", "the host gave")] == [True] * 3
    assert warning.count(";") == 2


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [((10, 100), (15, 200), 0.05), ((0, 100), (0, 300), 0.0), (None, (0, 1), None), ((0, 1), None, None),
     ((3, 100), (3, 100), None)],
)  # fmt: skip
def test_the_stolen_share_is_of_the_time_in_between(
    before: tuple[int, int] | None, after: tuple[int, int] | None, share: float | None
) -> None:
    assert timing.steal_share(before, after) == share


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat, which only Linux has")
def test_linux_counts_its_ticks() -> None:
    stolen, every = timing.cpu_ticks() or (0, 0)
    assert 0 <= stolen < every


# provenance


def test_the_provenance_of_a_record_names_date_machine_versions_and_commit() -> None:
    found = timing.provenance()
    assert list(found) == ["date", "machine", "versions", "commit"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    graphics = {"gpu", "driver", "compute_capability", "gpu_memory_mib"}
    assert set(found["machine"]) == {"cpu", "cores", "ram_gib", "os", "python", *graphics}
    assert found["machine"]["cores"] == usable_cores() >= 1
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["cmfast"] == cmfast.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert set(found["versions"]) <= {"cmfast", *timing.PACKAGES}
    assert json.loads(json.dumps(found)) == found


def test_a_record_does_not_name_the_host() -> None:
    node = os.uname().nodename if hasattr(os, "uname") else ""
    assert not node or len(node) < 4 or node not in json.dumps(timing.machine())


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            "case $1 in *name*) echo 'L4, 560.1'; echo 'T4, 560.1';; *) echo '8.9, 23034'; echo '7.5, 15360';; esac",
            ["L4; T4", "560.1", "8.9", 23034.0],
        ),
        ("case $1 in *name*) echo 'H100, 580.2';; *) echo '9.0, 81559';; esac", ["H100", "580.2", "9.0", 81559.0]),
        (
            "case $1 in *name*) echo 'T4, 418.0';; *) echo 'no such field' >&2; exit 2;; esac",
            ["T4", "418.0", None, None],
        ),
        ("case $1 in *name*) echo 'GB10, 580.2';; *) echo '12.1, [N/A]';; esac", ["GB10", "580.2", "12.1", None]),
        ("echo 'No devices were found'", [None] * 4),
        ("exit 9", [None] * 4),
    ],
)
def test_the_gpu_is_what_nvidia_smi_says(
    script: str, found: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = timing.machine()
    assert [machine[name] for name in ("gpu", "driver", "compute_capability", "gpu_memory_mib")] == found


def test_a_machine_without_nvidia_smi_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = timing.machine()
    assert {machine[name] for name in ("gpu", "driver", "compute_capability", "gpu_memory_mib")} == {None}


def test_the_commit_is_that_of_the_code_and_dirty_where_the_code_differs(tmp_path: Path) -> None:
    shutil.copytree(
        Path(cmfast.__file__).parent, tmp_path / "cmfast", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"PYTHONPATH": str(tmp_path), "GIT_CONFIG_GLOBAL": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"}

    def output(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit() -> dict[str, object] | None:
        program = "import json; from cmfast.bench.timing import commit; print(json.dumps(commit()))"
        found: dict[str, object] | None = json.loads(output(sys.executable, "-c", program))
        return found

    output("git", "init", "-q", "-b", "main")
    assert commit() is None, "the code lies in a repository that does not hold it"
    output("git", "add", "cmfast")
    output("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-q", "-m", "First")
    head = output("git", "rev-parse", "HEAD")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not code")
    assert commit() == {"commit": head, "dirty": False}
    (tmp_path / "benchmarks" / "new.py").write_text("")
    assert commit() == {"commit": head, "dirty": True}
