# SPDX-License-Identifier: MIT
"""Progress: a bar on a terminal, lines in a log, silence if none was requested."""

from __future__ import annotations

import os
import re
import select
import sys
import time

import pytest

from cmfast import progress
from cmfast.progress import progress_bar

LINE = re.compile(r"drawing: ([\d,]+)/([\d,]+) images, ([\d.,e+]+) images/s, ([\d,]+) s left( .*)?")


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the log at every call."""
    monkeypatch.setattr(progress, "LINE_S", 0.0)


@pytest.mark.usefixtures("chatty")
def test_lines_in_a_log_say_what_is_done_how_fast_and_what_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    with progress_bar("drawing", 40_000, "images") as advance:
        for count, text in ((1_500, "first"), (2_500, "")):
            time.sleep(0.05)
            advance(count, text)
    took = time.monotonic() - begun
    out, err = capfd.readouterr()
    assert out == ""
    first, second = (LINE.fullmatch(line) for line in err.splitlines())
    assert first
    assert second
    assert (first[1], first[2], first[5]) == ("1,500", "40,000", " first")
    assert (second[1], second[2], second[5]) == ("4,000", "40,000", None)
    assert 4_000 / took - 1 <= number(second[3]) <= 4_000 / 0.1, "4 digits are shown"
    assert number(second[4]) == pytest.approx((40_000 - 4_000) / number(second[3]), abs=0.6), "whole seconds are shown"


@pytest.mark.usefixtures("chatty")
def test_a_resumed_run_counts_what_was_done_before_but_not_as_its_speed(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("drawing", 1_000_000, "images", start=900_000) as advance:
        time.sleep(0.1)
        advance(10, "")
    first, second = capfd.readouterr().err.splitlines()
    assert first == "drawing: continuing at 900,000 images"
    line = LINE.fullmatch(second)
    assert line
    assert number(line[1]) == 900_010
    assert number(line[3]) <= 10 / 0.1
    assert number(line[4]) == pytest.approx(99_990 / number(line[3]), rel=0.01), "4 digits of the speed are shown"


@pytest.mark.parametrize(("start", "show"), [(0, True), (1000, True), (500, False)])
def test_what_begins_or_is_done_or_is_not_shown_does_not_continue(
    start: int, show: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("drawing", 1000, "images", start, show):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_log_is_not_flooded(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("drawing", 1000, "images") as advance:
        for _ in range(1000):
            advance(1, "")
    assert capfd.readouterr() == ("", ""), f"it was over before {progress.LINE_S:g} s"


@pytest.mark.usefixtures("chatty")
def test_nothing_is_shown_where_nothing_was_requested(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("drawing", 10, "images", show=False) as advance:
        time.sleep(0.01)
        advance(10, "done")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("chatty")
def test_what_the_work_raises_comes_through() -> None:
    with pytest.raises(KeyError), progress_bar("drawing", 10, "images"):
        raise KeyError


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_gets_a_bar_with_the_numbers(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pty

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    master, slave = pty.openpty()
    try:
        with open(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            with progress_bar("drawing", 40_000, "images", start=1_000) as advance:
                for count, text in ((500, ""), (2_000, "loss 0.25")):
                    time.sleep(0.5)
                    advance(count, text)
            terminal.flush()
            written = b""
            while select.select([master], [], [], 0.2)[0]:  # the kernel brings it over by and by
                written += os.read(master, 1 << 16)
    finally:
        os.close(master)
    shown = written.decode()
    for words in ("drawing: continuing at 1,000 images", "3,500/40,000 images", "loss 0.25"):
        assert words in shown
    assert 0 < number(re.findall(r"([\d.,e+]+) images/s", shown)[-1]) <= 2_000 / 0.5, "not of what was done before"
    assert capfd.readouterr().out == ""
