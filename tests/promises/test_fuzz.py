# SPDX-License-Identifier: MIT
"""Every reader on mutated files: it reads or refuses in one line. `make fuzz` does the same with ten times as many."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from helpers import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
try:
    import fuzz
    from fuzz_corpus import READERS, Reader
except ModuleNotFoundError:
    pytest.skip("needs the repository", allow_module_level=True)
finally:
    sys.path.remove(str(BENCHMARKS))

INPUTS = 2000  # of a reader of share 1, a second or less; by number and not by time, so every machine sees the same
SEED = int(os.environ.get("CMFAST_FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_reader_reads_mutated_files_or_refuses_them_in_one_line(name: str) -> None:
    with fuzz.scratch() as folder:
        result = fuzz.fuzz(READERS[name], folder, seed=SEED, inputs=int(INPUTS * READERS[name].share))
    assert result.findings == [], f"python benchmarks/fuzz.py --reader {name} --seed {SEED} --number ..."
    assert result.accepted > 0  # some are read, so the mutations reach what is behind the first check
    assert result.refused > result.inputs / 4


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda data: json.loads(data), "JSONDecodeError"),
        (lambda data: (_ for _ in ()).throw(fuzz.CmfastError("two\nlines")), "not one line"),
        (lambda data: (_ for _ in ()).throw(fuzz.CmfastError("x" * 10_000)), "not one line"),
        (lambda data: sum(range(3_000_000)), " s"),
    ],
)
def test_the_check_above_can_fail(
    read: Callable[[bytes], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "MAX_S", 0.01)
    reader = Reader(name="bad", read=lambda data, _: read(data), corpus=lambda _: [b'{"a": [1, 2]}'])
    result = fuzz.fuzz(reader, tmp_path, inputs=8)
    assert result.inputs == 8
    assert words in result.findings[0]["what"]


def test_every_file_of_a_corpus_is_read_or_refused_before_it_is_mutated(tmp_path: Path) -> None:
    for reader in READERS.values():
        folder = tmp_path / reader.name
        folder.mkdir()
        read = 0
        for data in reader.corpus(folder):
            try:
                reader.read(data, folder)
                read += 1
            except fuzz.CmfastError:
                pass  # foreign weights of no known network: refused by what they lack
        assert read or reader.name in ("torch", "safetensors"), reader.name


def test_an_input_depends_on_reader_seed_and_number_alone() -> None:
    corpus = [bytes(range(256)), b'{"a": 12}' * 9]
    inputs = [fuzz.mutated(corpus, "npz", 0, number) for number in range(200)]
    assert inputs == [fuzz.mutated(corpus, "npz", 0, number) for number in range(200)]
    assert len(set(inputs)) > 150
    assert inputs != [fuzz.mutated(corpus, "npz", 1, number) for number in range(200)]


def test_the_command_writes_a_record_and_makes_an_input_again(
    call: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    def main() -> None:
        fuzz.run_command(fuzz.command)

    out = tmp_path / "fuzz.json"
    result = call(main, "--reader", "plan", "--reader", "onnx", "--inputs", 120, "--seed", 3, "--json", out)
    assert result.returncode == 0
    record = json.loads(out.read_text())
    assert (record["seed"], record["inputs"]) == (3, 120)
    assert [row["reader"] for row in record["rows"]] == ["plan", "onnx"]
    assert "1 inputs" in call(main, "--reader", "plan", "--seed", 3, "--number", 7).stdout
    assert call(main, "--number", 7).stderr == "fuzz: --number is one input of one reader; name it with --reader\n"
