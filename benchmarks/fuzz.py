# SPDX-License-Identifier: MIT
"""Mutated files for every reader: each must be read or refused in one line, in bounded time, and run nothing.

    python benchmarks/fuzz.py --inputs 1000000 --json benchmarks/results/fuzz.json      about a quarter of an hour
    python benchmarks/fuzz.py --reader pickle --seed 7 --seconds 60

The corpus is our own: small valid files, made by our writers when the program starts (`fuzz_corpus`). An input is one
of them, or two spliced, with a few mutations, and depends on (reader, seed, number) alone, so a finding is made again
by `--reader NAME --seed S --number N`. A reader passes if it returns, or raises a CmfastError whose message is one
line of at most MAX_LINE characters; anything else, and a call of more than MAX_S, is a finding.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click

from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import check_outputs, write_text
from fuzz_corpus import READERS, Reader

MAX_LINE = 3000  # characters of an error
MAX_S = 5.0  # of one call, CPU time
EDGE = 4096  # bytes: of a file, its beginning and its end

# Values that readers stumble over: as bytes anywhere, and as texts in the place of a number or of a word.
BYTES = [b"", b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 8, b"\xff" * 9 + b"\x01", b"\x00" * 16, b"\x80" * 10]
TEXTS = [
    "0", "-1", "1e400", "-0.0", "NaN", "Infinity", "9" * 400, str(2**31), str(2**63), str(2**64), "1" + "0" * 18,
    "true", "null", "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', "[" * 200, '{"a":' * 200, "0.1", "3.0",
    "[[]]",
]  # fmt: skip


@dataclass
class Result:
    """What a reader made of its inputs."""

    reader: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0  # CPU time of one call
    findings: list[dict[str, Any]] = field(default_factory=list)

    def found(self, number: int, what: str) -> None:
        """Count a finding; one that was there before is the same if it is at the same place."""
        kind = what.rpartition(" at ")[2]
        known = next((each for each in self.findings if each["what"].rpartition(" at ")[2] == kind), None)
        if known is None:
            self.findings.append({"number": number, "times": 1, "what": what})
        else:
            known["times"] += 1

    def row(self) -> dict[str, Any]:
        """Return the result for a record."""
        numbers = {"seconds": round(self.seconds, 1), "slowest_s": round(self.slowest_s, 4)}
        return {**vars(self), **numbers, "findings": self.findings}


def fuzz(
    reader: Reader,
    folder: Path,
    *,
    seed: int = 0,
    inputs: int | None = None,
    seconds: float | None = None,
    start: int = 0,
    show: bool = False,
) -> Result:
    """Feed a reader with mutated files.

    Args:
        reader: One of READERS.
        folder: Where the corpus and the inputs are written.
        seed: Of all mutations.
        inputs: How many; None: as many as `seconds` allow.
        seconds: Wall time; None: no limit.
        start: Number of the first input.
        show: Print the traceback of what is found.
    """
    result = Result(reader=reader.name, seed=seed)
    corpus = reader.corpus(folder)
    begun, number = time.perf_counter(), start
    # What is installed is looked up once, not for each input: that would be most of the time of some readers.
    with mock.patch("importlib.metadata.entry_points", functools.cache(importlib.metadata.entry_points)):
        while (inputs is None or number < start + inputs) and (
            seconds is None or time.perf_counter() - begun < seconds
        ):
            _one(reader, mutated(corpus, reader.name, seed, number), folder, number, result, show=show)
            number += 1
    result.seconds = time.perf_counter() - begun
    return result


def mutated(corpus: Sequence[bytes], name: str, seed: int, number: int) -> bytes:
    """Return input `number`: a file of the corpus, or two spliced, with one to eight mutations."""
    rng = random.Random(f"{name} {seed} {number}")
    data = bytearray(rng.choice(corpus))
    if rng.random() < 0.1:
        other = rng.choice(corpus)
        data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]
    for _ in range(min(rng.randint(1, 8), rng.randint(1, 8))):
        rng.choice(_MUTATIONS)(data, rng)
    return bytes(data)


def _one(reader: Reader, data: bytes, folder: Path, number: int, result: Result, *, show: bool) -> None:
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(data, folder)
        result.accepted += 1
        wrong = ""
    except CmfastError as err:
        result.refused += 1
        wrong = "" if "\n" not in str(err) and len(str(err)) <= MAX_LINE else f"not one line: {str(err)[:200]!r}"
    except Exception as err:
        wrong = f"{type(err).__name__}: {str(err)[:200]} at {_where(err)}"
        if show:
            traceback.print_exc()
    spent = time.process_time() - begun
    result.inputs += 1
    result.slowest_s = max(result.slowest_s, spent)
    if spent > MAX_S:
        wrong = wrong or f"{spent:.1f} s"
    if wrong:
        result.found(number, wrong)


def _where(err: BaseException) -> str:
    """Return the last place of ours that an exception passed."""
    frames = [
        frame for frame in traceback.extract_tb(err.__traceback__) if "/cmfast" in Path(frame.filename).as_posix()
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a place, three times in four near the beginning or the end, where files say what they are."""
    near = min(len(data), EDGE)
    which = rng.randrange(4)
    return rng.randrange(len(data) + 1) if which == 0 else rng.randrange(near + 1) + (len(data) - near) * (which == 1)


def _slice(data: bytearray, rng: random.Random) -> slice:
    start = _place(data, rng)
    return slice(start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1024))))


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    if data:
        data[min(_place(data, rng), len(data) - 1)] = rng.randrange(256)


def _insert(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = rng.choice(BYTES)


def _replace(data: bytearray, rng: random.Random) -> None:
    data[_slice(data, rng)] = rng.choice(BYTES)


def _delete(data: bytearray, rng: random.Random) -> None:
    del data[_slice(data, rng)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    part = data[_slice(data, rng)]
    place = _place(data, rng)
    data[place:place] = part * rng.choice((1, 2, 50))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _word(data: bytearray, rng: random.Random) -> None:
    """Put another text in the place of a number or a word: what JSON, headers and opcodes of text are made of."""
    start = _place(data, rng)
    while start < len(data) and not chr(data[start]).isalnum():
        start += 1
    end = start
    while end < len(data) and (chr(data[end]).isalnum() or data[end] in b'.-+_"'):
        end += 1
    data[start:end] = rng.choice(TEXTS).encode()


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _set, _insert, _replace, _delete, _repeat, _truncate, _word, _word,
)  # fmt: skip


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for the inputs, in memory where the system has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@click.command("fuzz")
@click.option("--reader", "names", multiple=True, type=click.Choice(sorted(READERS)), help="Default: all.")
@click.option("--inputs", type=click.IntRange(1, 10**9), help="Of all readers together; default: by --seconds.")
@click.option("--seconds", type=click.FloatRange(0.01, 10**6), help="For each reader; default: 20, without --inputs.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Of the mutations.")
@click.option("--number", type=click.IntRange(0, 2**63), help="Make this one input again, and show what is raised.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    names: tuple[str, ...],
    inputs: int | None,
    seconds: float | None,
    seed: int,
    number: int | None,
    json_file: Path | None,
) -> int:
    """Feed the readers of files with mutated ones; exit with 1 if one does anything but read or refuse."""
    check_outputs({"--json": json_file})
    readers = [READERS[name] for name in (names or sorted(READERS))]
    if number is not None and len(readers) != 1:
        raise CmfastError("--number is one input of one reader; name it with --reader")
    seconds = 20.0 if inputs is None and seconds is None else seconds
    rows = []
    for reader in readers:
        with scratch() as folder:
            share = None if inputs is None else max(1, math.ceil(inputs * reader.share / sum(r.share for r in readers)))
            if number is not None:
                share = 1
            result = fuzz(
                reader, folder, seed=seed, inputs=share, seconds=seconds, start=number or 0, show=number is not None
            )
        rows.append(result.row())
        counts = f"{result.inputs:,} inputs, {result.accepted:,} read, {result.refused:,} refused"
        click.echo(f"{reader.name}: {counts}, slowest {result.slowest_s:.3f} s, {len(result.findings)} finding(s)")
        for finding in result.findings:
            again = f"--reader {reader.name} --seed {seed} --number {finding['number']}"
            click.echo(f"  {again}, {finding['times']} times: {finding['what']}")
    total = sum(row["inputs"] for row in rows)
    click.echo(f"{total:,} inputs")
    if json_file is not None:
        record = {"what": "fuzz", **provenance(), "seed": seed, "inputs": total, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
    return 1 if any(row["findings"] for row in rows) else 0


if __name__ == "__main__":
    run_command(command)
