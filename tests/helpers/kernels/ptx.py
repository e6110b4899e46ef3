# SPDX-License-Identifier: MIT
"""PTX on the CPU: a module's instructions, one by one, as C, so that tests run the very file that a GPU runs.

Threads run one after the other; a module that needs a barrier is refused, as is any instruction that is not in the
tables below. Every access to global memory is checked against the memory that the device has given out.

PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.cpp import need_compiler

TYPES = {
    "pred": "int", "b16": "uint16_t", "u8": "uint8_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f32": "float", "f64": "double",
}  # fmt: skip
SPECIAL = {"%tid.x": "thread", "%ntid.x": "block", "%ctaid.x": "at", "%nctaid.x": "grid"}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
ROUNDED = {"rn", "lo"}  # to nearest, the low half: what C does

HEAD = """
#include <stdint.h>
#include <string.h>
#include <math.h>
static float f32_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static double f64_of(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static uint64_t bits_of(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
typedef struct { const uint64_t (*pieces)[2]; uint64_t count; uint64_t wrong, size; } Memory;
static int allowed(Memory *memory, uint64_t address, uint64_t size) {
    uint64_t low = 0, high = memory->count;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (memory->pieces[middle][1] <= address) low = middle + 1; else high = middle;
    }
    if (low < memory->count && memory->pieces[low][0] <= address && address + size <= memory->pieces[low][1]) return 1;
    memory->wrong = address; memory->size = size;
    return 0;
}
"""


class _Memory(ctypes.Structure):
    _fields_ = [
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("wrong", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    ]


class Module:
    """A module's kernels, compiled for this CPU.

    Args:
        ptx: the text of the module.
        folder: where C and library are written.
    """

    def __init__(self, ptx: str, folder: Path) -> None:
        self.parameters: dict[str, list[str]] = {}
        parts = [HEAD]
        for name, parameters, body in re.findall(r"\.visible \.entry (\w+)\((.*?)\)\s*\{(.*?)\n\}", ptx, re.DOTALL):
            self.parameters[name] = re.findall(r"\.param \.(\w+) ", parameters)
            parts.append(_function(name, self.parameters[name], body))
        source, library = folder / "module.c", folder / "module.so"
        source.write_text("\n".join(parts))
        options = ["-O1", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC", "-w"]
        made = subprocess.run(
            [need_compiler(), "-x", "c", *options, source, "-o", library, "-lm"], capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        self._library = ctypes.CDLL(str(library))

    def run(
        self, name: str, grid: int, block: int, arguments: Sequence[int | float], memory: Sequence[tuple[int, int]]
    ) -> None:
        """Run a kernel.

        Args:
            name: of the kernel
            grid: blocks
            block: threads of a block
            arguments: of the kernel
            memory: start and end of each piece of memory that it may use, in order

        Raises:
            AssertionError: the kernel used other memory.
        """
        kinds = {"u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "f32": ctypes.c_float}
        values = [kinds[kind](value) for kind, value in zip(self.parameters[name], arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        pieces = np.array(memory, np.uint64).reshape(-1, 2)
        table = _Memory(pieces.ctypes.data, len(pieces), 0, 0)
        getattr(self._library, name)(grid, block, pointers, ctypes.byref(table))
        assert not table.size, f"{name} used {table.size} bytes at {table.wrong:#x}, which are not the device's"


def _function(name: str, parameters: list[str], body: str) -> str:
    registers = "".join(
        f"    {TYPES[kind]} {prefix}[{count}];\n"
        for kind, prefix, count in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", body)
    )
    taken = "".join(
        f"    {TYPES[kind]} {name}_param_{i} = *({TYPES[kind]} *)arguments[{i}];\n" for i, kind in enumerate(parameters)
    )
    lines = [line.strip() for line in re.sub(r"//.*", "", body).splitlines()]
    code = [_line(line) for line in lines if line and not line.startswith((".reg", ".pragma"))]
    return (
        f"static int {name}_thread(uint32_t grid, uint32_t block, uint32_t at, uint32_t thread, void **arguments, "
        f"Memory *memory) {{\n{registers}{taken}    " + "\n    ".join(code) + "\n    return 1;\n}\n"
        f"void {name}(uint32_t grid, uint32_t block, void **arguments, Memory *memory) {{\n"
        "    for (uint32_t at = 0; at < grid; ++at)\n"
        "        for (uint32_t thread = 0; thread < block; ++thread)\n"
        f"            if (!{name}_thread(grid, block, at, thread, arguments, memory)) return;\n}}\n"
    )


def _line(line: str) -> str:
    """Return a line of PTX as C."""
    if label := re.fullmatch(r"\$(\w+):", line):
        return f"{label[1]}:;"
    matched = re.fullmatch(r"(?:@(!?)%p(\d+)\s+)?([\w.]+)(?:\s+(.*))?;", line)
    assert matched, f"no line of PTX: {line}"
    negated, predicate, operation, rest = matched.groups()
    given = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest or "")
    done = _instruction(operation.split("."), given, line)
    return f"if ({negated}p[{predicate}]) {{ {done} }}" if predicate else done


def _instruction(operation: list[str], given: list[str], line: str) -> str:
    what, *words, kind = [*operation, ""] if len(operation) == 1 else operation
    if what == "ret":
        return "return 1;"
    if what == "bra":
        return f"goto {given[0].removeprefix('$')};"
    if what in ("ld", "st"):
        return _access(what, words, kind, given, line)
    to, *sources = given
    if what == "mov" and to.startswith("{"):
        low, high = (_operand(part, "b32") for part in to.strip("{}").split(","))
        return f"{low} = (uint32_t){_operand(sources[0], 'b64')}; {high} = {_operand(sources[0], 'b64')} >> 32;"
    target = _operand(to, kind)
    if what == "setp":
        return f"{target} = {_comparison(words, kind, sources)};"
    if what == "selp":
        first, second = (_operand(source, kind) for source in sources[:2])
        return f"{target} = {_operand(sources[2], 'pred')} ? {first} : {second};"
    return f"{target} = {_value(what, words, kind, sources, to, line)};"


def _value(what: str, words: list[str], kind: str, sources: list[str], to: str, line: str) -> str:
    values = [_operand(source, kind) for source in sources]
    value = values[0]
    if what == "mov":
        if to.startswith("%fd") and value.startswith("rd["):
            return f"f64_of({value})"
        return f"bits_of({value})" if to.startswith("%rd") and value.startswith("fd[") else value
    if what == "cvta":
        return value
    if what in ("shl", "shr"):
        assert kind[0] != "s", line
        return f"({TYPES[kind]}){value} {'<<' if what == 'shl' else '>>'} {values[1]}"
    if what == "mul" and words == ["wide"]:
        assert kind == "u32", line
        return f"(uint64_t){value} * {values[1]}"
    if what in BINARY and set(words) <= ROUNDED:
        assert kind[0] != "f" or "rn" in words, f"the driver may fuse it: {line}"
        return f"({TYPES[kind]}){value} {BINARY[what]} ({TYPES[kind]}){values[1]}"
    if what == "neg" and not words:
        return f"-{value}"
    suffix = "f" if kind == "f32" else ""
    if what in ("abs", "min", "max") and not words:
        return f"f{what}{suffix}({', '.join(values)})"
    if what == "sqrt" and words == ["rn"]:
        return f"sqrt{suffix}({value})"
    if what == "cvt":
        return _conversion(words, kind, sources[0], line)
    raise AssertionError(f"this instruction has no translation: {line}")


def _conversion(words: list[str], source_kind: str, source: str, line: str) -> str:
    *rounding, to = words
    value = _operand(source, source_kind)
    if rounding == ["rni"]:
        return f"rintf({value})"
    known = rounding in ([], ["rn"], ["rzi"])  # to nearest, and integers cut off: what C does
    assert known, line
    return f"({TYPES[to]})({TYPES[source_kind]}){value}"


def _comparison(words: list[str], kind: str, sources: list[str]) -> str:
    (how,) = words
    first, second = (f"({TYPES[kind]}){_operand(source, kind)}" for source in sources)
    if how.endswith("u") and how != "u":  # true for NaN too
        opposite = {"gtu": "<=", "geu": "<", "ltu": ">=", "leu": ">", "equ": "!=", "neu": "=="}[how]
        return f"!({first} {opposite} {second})"
    return f"{first} {COMPARE[how]} {second}"


def _access(what: str, words: list[str], kind: str, given: list[str], line: str) -> str:
    to, source = given if what == "ld" else reversed(given)
    place = (source if what == "ld" else to if to.startswith("[") else source).strip("[]")
    register = to if what == "ld" else next(each for each in given if not each.startswith("["))
    if words == ["param"]:
        return f"{_operand(register, kind)} = {place};"
    assert words == ["global"], line
    base, _, offset = place.partition("+")
    address = f"{_operand(base, 'b64')} + {offset or 0}"
    check = f"if (!allowed(memory, {address}, sizeof({TYPES[kind]}))) return 0;"
    memory = f"*({TYPES[kind]} *)({address})"
    if what == "ld":
        return f"{check} {_operand(register, kind)} = {memory};"
    return f"{check} {memory} = {_operand(register, kind)};"


def _operand(text: str, kind: str) -> str:
    if text in SPECIAL:
        return SPECIAL[text]
    if register := re.fullmatch(r"%([a-z]+)(\d+)", text):
        return f"{register[1]}[{register[2]}]"
    if bits := re.fullmatch(r"0d([0-9A-F]{16})", text):
        return f"f64_of(0x{bits[1]}ull)"
    if bits := re.fullmatch(r"0f([0-9A-F]{8})", text):
        return f"f32_of(0x{bits[1]}u)"
    assert re.fullmatch(r"-?\d+", text), f"no operand: {text}"
    return f"({TYPES[kind]}){text}ll" if kind in TYPES else text
