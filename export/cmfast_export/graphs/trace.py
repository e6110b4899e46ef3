# SPDX-License-Identifier: MIT
"""torch.export of a denoiser, sizes dynamic where requested; an obstacle is one line with its place.

`denoiser` turns what is traced here into an ONNX graph.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.errors import CmfastError, one_line
from cmfast_export.graphs.places import at, failed, is_foreign, line_of, module_that_fails, place, reason
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.precision import float32_weights

MOST = 2**20  # of every dynamic size
BATCH = "B"
LIBRARIES = frozenset(("torch", "sympy", "mpmath", *sys.stdlib_module_names))  # that no network's code is in
EXAMPLE_SIZE = 16  # of a condition's dynamic axis while it is traced, and where its cost is counted
Axes = Mapping[str, Mapping[int, str]]  # input: axis: name of its size; one name is one size everywhere


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A traced denoiser."""

    program: torch.export.ExportedProgram
    most: int | None  # the code has another branch for larger batches, which the trace does not have; None: it has none


def trace(denoiser: nn.Module, inputs: Mapping[str, Tensor], axes: Axes) -> Traced:
    """Trace a denoiser, or another module that is called by the names of its inputs, with these example inputs.

    Raises:
        CmfastError: it cannot be traced, or its code makes a size constant that must be dynamic. The line names the
            module, the file and the code.
    """
    call, examples = _with_names(denoiser, tuple(inputs)), tuple(inputs.values())
    names = {name for sizes in axes.values() for name in sizes.values()}
    dims = {name: torch.export.Dim(name, max=MOST) for name in sorted(names)}
    with torch.inference_mode(False), quiet(), float32_weights():
        try:
            program = torch.export.export(call, examples, dynamic_shapes=_shapes(inputs, axes, dims))
            return Traced(program=program, most=None)
        except Exception as err:  # whatever the module's own code raises, and torch about it
            if "Constraints violated" not in str(err):
                raise _untraceable(denoiser, inputs, err) from None
        if isinstance(denoiser, Denoiser):
            _check_output(denoiser, inputs)
        # A size is not free. Without a demand the trace says what the code makes of it.
        free = dict.fromkeys(dims, torch.export.Dim.AUTO)
        try:
            program = torch.export.export(call, examples, dynamic_shapes=_shapes(inputs, axes, free))
        except Exception as err:
            raise _untraceable(denoiser, inputs, err) from None
        return Traced(program=program, most=_limit(program, denoiser, inputs, axes))


def unconvertible(program: torch.export.ExportedProgram, err: BaseException) -> CmfastError:
    """Return the error for a trace that torch.onnx cannot write: the operator, its module and its line."""
    reasons, cause = [], err
    while cause is not None and cause not in reasons:
        reasons.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = " ".join(str(each) for each in reasons)
    found = re.search(r"Error when translating node %(\w+)", text)
    nodes = list(program.graph.nodes)
    with contextlib.suppress(Exception):  # the exporter does so first
        nodes += program.run_decompositions().graph.nodes
    node = next((each for each in nodes if found and each.name == found[1]), None)
    if node is None:
        return CmfastError(f"the network cannot be written as ONNX: {one_line(reasons[-1], 300)}")
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    where = (modules[-1] if modules else "") or "network"
    line = line_of(node.meta.get("stack_trace") or "")
    return CmfastError(
        f"{where}: the operator {node.target} has no ONNX form{line and f', {line}'}; write it with others"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's own progress, graphs and deprecation notes off the terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    unseen = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _with_names(
    denoiser: nn.Module,
    names: tuple[str, ...],
    begin: Callable[[tuple[Tensor, ...]], object] = lambda _: None,
    end: Callable[[], object] = lambda: None,
) -> nn.Module:
    """Return the denoiser with its inputs by position: torch.export takes no dynamic sizes of **conditions."""
    call = copy.copy(denoiser)

    def forward(*values: Tensor) -> Tensor:
        begin(values)
        result: Tensor = type(denoiser).forward(denoiser, **dict(zip(names, values, strict=True)))
        end()
        return result

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    setattr(call, "forward", forward)  # noqa: B010  of this one object
    return call


def _shapes(inputs: Mapping[str, Tensor], axes: Axes, dims: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    return {name: {axis: dims[size] for axis, size in axes.get(name, {}).items()} for name in inputs}


def _limit(
    program: torch.export.ExportedProgram, denoiser: nn.Module, inputs: Mapping[str, Tensor], axes: Axes
) -> int | None:
    """Return the largest batch of a trace; raise where a size that must be dynamic has become a number."""
    specs = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    most: int | None = None
    for name, placeholder in zip(inputs, specs, strict=True):
        shape = nodes[str(placeholder)].meta["val"].shape
        for axis, size in axes.get(name, {}).items():
            number = _number(shape[axis])
            if number is not None:
                where = _what_fixed_it(denoiser, inputs, axes, name, axis)
                what = "the batch" if size == BATCH else f"axis {axis} of {name}"
                fix = "a fixed batch" if size == BATCH else f"a size for it in the condition {name}"
                raise CmfastError(
                    f"{what} must be dynamic, and the network's code makes it the constant {number}{where}; take "
                    f"the size from the tensor's shape there, or pass {fix}"
                )
            if size == BATCH:
                bound = program.range_constraints.get(shape[axis].node.expr)
                upper = getattr(bound, "upper", None)
                if upper is not None and upper < MOST:
                    most = int(upper)
    return most


def _check_output(denoiser: Denoiser, inputs: Mapping[str, Tensor]) -> None:
    """Raise CmfastError where the network returns another shape than x has, which broadcasting can hide."""
    given = {name: value for name, value in inputs.items() if name not in ("x", "sigma", "sigma_next")}
    with torch.inference_mode():
        output = denoiser.output(inputs["x"], inputs["sigma"], given, inputs.get("sigma_next"))
    if output.shape[1:] != inputs["x"].shape[1:]:
        raise wrong_output(output.shape[1:], denoiser)


def wrong_output(sizes: Iterable[object], denoiser: Denoiser) -> CmfastError:
    """Return the error for a network that returns other sizes than its samples have."""
    return CmfastError(
        f"the network returns [{', '.join(map(str, ('B', *sizes)))}], and the model's shape is "
        f"{list(denoiser.spec.shape)}; the two must be the same"
    )


def _number(size: Any) -> int | None:
    """Return a size that is a number, also one that torch found to be one; None: it is dynamic."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def _what_fixed_it(denoiser: nn.Module, inputs: Mapping[str, Tensor], axes: Axes, name: str, axis: int) -> str:
    """Return ": FILE:LINE: CODE" of what made a size a number: traced once more, and looked at line by line."""
    found: list[str] = []
    before = sys.gettrace()
    last = ("", 0)

    def begin(values: tuple[Tensor, ...]) -> None:
        tensor = values[tuple(inputs).index(name)]

        def line(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
            nonlocal last
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if found or package in LIBRARIES or not is_foreign(frame.f_code.co_filename):
                return None
            if _number(tensor.shape[axis]) is not None:
                found.append(place([(*last, "")]))
                return None
            while event == "return" and frame.f_back and not is_foreign(frame.f_back.f_code.co_filename):
                frame = frame.f_back  # torch's, between a module and the one that calls it
            at = frame.f_back if event == "return" and frame.f_back else frame
            if is_foreign(at.f_code.co_filename):
                last = (at.f_code.co_filename, at.f_lineno)
            return line

        sys.settrace(line)

    names = {size for sizes in axes.values() for size in sizes.values()}
    free = dict.fromkeys(names, torch.export.Dim.AUTO)
    try:
        call = _with_names(denoiser, tuple(inputs), begin, lambda: sys.settrace(before))
        with contextlib.suppress(Exception):  # without the line then
            torch.export.export(call, tuple(inputs.values()), dynamic_shapes=_shapes(inputs, axes, free))
    finally:
        sys.settrace(before)
    return f": {found[0]}" if found and found[0] else ""


def _untraceable(denoiser: nn.Module, inputs: Mapping[str, Tensor], err: BaseException) -> CmfastError:
    """Return the error for a denoiser that torch.export cannot follow: the module and the line where it stopped."""
    names = tuple(inputs)

    def run() -> None:
        with torch.inference_mode():
            denoiser(**inputs)

    where, eager = module_that_fails(denoiser, run)
    if eager is not None:  # it is the network itself that fails
        return failed(where, eager)
    with quiet():
        where, _ = module_that_fails(
            denoiser, lambda: torch.export.export(_with_names(denoiser, names), tuple(inputs.values()))
        )
    return CmfastError(
        f"{where} cannot be traced{at(err)}: {reason(err)}; a graph needs code that does not look at the values of "
        "tensors"
    )
