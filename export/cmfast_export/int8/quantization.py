# SPDX-License-Identifier: MIT
"""A float32 denoiser graph made int8, as much of it as stays accurate enough."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cmfast.backends import Backend
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.onnxruntime_library import import_onnxruntime
from cmfast.conditions import some_values
from cmfast.errors import CheckFailed, CmfastError
from cmfast.formats.manifest import Manifest, rounding
from cmfast.model import Model
from cmfast_export.graphs import writer
from cmfast_export.graphs.sampler import Guidance, sampler_graph
from cmfast_export.int8.calibration import observe
from cmfast_export.int8.graph import SWITCHES, quantized, switched
from cmfast_export.int8.options import Calibration
from cmfast_export.int8.products import products_of
from cmfast_export.request import GraphRequest
from cmfast_export.verify import SIZES, Case, Given, denoiser_cases, verify

WORST, WORST_SAMPLES = 4, 2  # calls by which products are ordered, and samples of each
ATTEMPTS = 8  # files that are compared before int8 is given up
SPARE = 0.95  # of the error that is allowed, while it is predicted as a sum


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """An int8 graph and what of it is int8.

    Attributes:
        model: the denoiser graph.
        products: names of the int8 products.
        ends: names of the first and last, which stay float32.
        returned: names of those that were given back to float32, for accuracy.
        psnr_db: the worst of the comparisons with float32, dB.
        allowed_db: what was needed.
    """

    model: ir.Model
    products: tuple[str, ...]
    ends: tuple[str, ...]
    returned: tuple[str, ...]
    psnr_db: float
    allowed_db: float

    @property
    def machine(self) -> str:
        """What there is to know about this machine, which verified the file; "": nothing."""
        if has_vnni() is not False:
            return ""
        return (
            "this CPU has no VNNI, so int8 products are slower here and OpenVINO's may saturate; compare with "
            "cmfast-bench and cmfast-info --selftest"
        )

    @property
    def in_words(self) -> str:
        """What the manifest records."""
        total = len(self.products) + len(self.ends) + len(self.returned)
        back = f", {len(self.returned)} for accuracy" if self.returned else ""
        return f"{len(self.products)} of {total} products int8; float32: {len(self.ends)} first and last{back}"


def quantize(
    model: ir.Model,
    manifest: Manifest,
    request: GraphRequest,
    sigmas: Sequence[float],
    guidance: Guidance | None,
    references: Sequence[Backend],
    given: Given | None,
) -> Quantized:
    """Return an int8 graph that is at least `request.tolerance_db` from the float32 one; `model` is left as it is.

    Args:
        model: a verified float32 denoiser graph.
        manifest: of its file.
        request: of the file that is made, with precision int8.
        sigmas: of a sampler its noise levels; () of a denoiser.
        guidance: of a sampler.
        references: PyTorch in float32.
        given: values of the conditions to compare with; None: random ones.

    Raises:
        CmfastError: nothing of the graph can be int8.
        CheckFailed: the graph is not accurate enough with any int8 product.
    """
    inside, ends = products_of(model.graph)
    names = [product.name for product in inside]
    if not names:
        raise CmfastError(
            "the network has no convolution or matrix product between its first and last that int8 would make faster; "
            "leave --precision int8 out"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = manifest.spec
        schedules = [sigmas] if sigmas else list(spec.sigmas.values()) or [spec.sigmas_for()]
        tensors = dict.fromkeys(value.name or "" for each in inside for value in (each.data, each.result))
        seen = observe(
            model, list(tensors), spec, schedules, folder, request.calibration or Calibration(), between=not sigmas,
            guidance=guidance, batch=request.batch,
        )  # fmt: skip
        compare = _Compare(model, manifest, folder, sigmas, guidance, references[:1], given)
        allowed, order, left, back = request.allowed_db, list[str](), np.zeros(0), 0
        for _ in range(ATTEMPTS):
            kept = [each for each in names if each not in order[:back]]
            made = quantized(model, kept, seen.ranges)
            psnr_db = compare(made)
            if psnr_db >= allowed:
                returned = tuple(each for each in names if each in order[:back])
                return Quantized(
                    model=made, products=tuple(kept), ends=tuple(each.name for each in ends), returned=returned,
                    psnr_db=psnr_db, allowed_db=allowed,
                )  # fmt: skip
            if len(kept) == 1:
                break
            if not order:
                order, left = _order(names, compare.errors(switched(model, names, seen.ranges), len(names)))
            back = _how_many(left, back, psnr_db, allowed)
    raise CheckFailed(
        f"int8 is {psnr_db:.1f} dB from float32 with {len(kept)} of {len(names)} products int8, and {allowed:g} dB are "
        "needed; pass a lower --tolerance-db, or another --precision; no file was written"
    )


class _Compare:
    """Compares int8 graphs with the float32 one on the inputs of the export's own verification."""

    def __init__(
        self,
        model: ir.Model,
        manifest: Manifest,
        folder: Path,
        sigmas: Sequence[float],
        guidance: Guidance | None,
        references: Sequence[Backend],
        given: Given | None,
    ) -> None:
        self.manifest = replace(manifest, kind="denoiser", parity={}, graph_sha256="", selftest={})
        self.folder, self.sigmas, self.guidance, self.given = folder, sigmas, guidance, given
        self.reference = self._opened(model, self.manifest, "float32.onnx")
        (parity,) = verify(self.reference, references, given=given, rounds=False)
        if failure := parity.failure(rounding("float32", "cpu")):
            raise CheckFailed(f"before anything of it is int8, the denoiser graph {failure}; no file was written")

    def __call__(self, model: ir.Model) -> float:
        """Return the worst of all comparisons, dB."""
        files = [self._opened(model, self.manifest, "int8.onnx")]
        if self.sigmas:
            spec = replace(self.manifest.spec, sigmas={len(self.sigmas): tuple(self.sigmas)})
            looped = sampler_graph(model, self.sigmas, spec, self.guidance)
            files.append(self._opened(looped, replace(self.manifest, kind="sampler", spec=spec), "loop.onnx"))
        return min(
            verify(file, [self.reference], guidance=self.guidance, given=self.given, rounds=True, drawn=True)[0].psnr_db
            for file in files
        )

    def errors(self, model: ir.Model, count: int) -> npt.NDArray[np.float64]:
        """Return the mean square error that each product alone makes, [products, calls], of the calls worst for all.

        Args:
            model: the graph with switches.
            count: of them.
        """
        file = self.folder / "switched.onnx"
        data = writer.write_data(model, file) if writer.weight_bytes(model) > writer.MAX_BYTES else None
        writer.write_model(model, file, data)
        ort = import_onnxruntime("exporting")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        read = {each.name for each in session.get_inputs()}

        def output(call: Case, on: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
            feed = {"x": call.x, "sigma": call.sigma, "sigma_next": call.sigma_next, SWITCHES: on, **call.conditions}
            (got,) = session.run(None, {name: value for name, value in feed.items() if name in read})
            result: npt.NDArray[np.float64] = got.astype(np.float64)
            return result

        def errors(call: Case, on: npt.NDArray[np.bool_], want: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            result: npt.NDArray[np.float64] = np.square(output(call, on) - want).reshape(len(want), -1).mean(1)
            return result

        one, none = np.eye(count, dtype=bool), np.zeros(count, bool)
        calls = [(call, output(call, none)) for call in self._calls()]
        calls.sort(key=lambda each: -float(errors(each[0], ~none, each[1]).mean()))
        chosen = [self._worst(call, want, errors(call, ~none, want)) for call, want in calls[:WORST]]
        return np.array([[errors(call, on, want).mean() for call, want in chosen] for on in one])

    def _worst(
        self, call: Case, want: npt.NDArray[np.float64], error: npt.NDArray[np.float64]
    ) -> tuple[Case, npt.NDArray[np.float64]]:
        """Return the WORST_SAMPLES of a call, which have most of its error; of a fixed batch all."""
        if self.reference.batch:
            return call, want
        at = np.argsort(-error)[:WORST_SAMPLES]
        after = None if call.sigma_next is None else call.sigma_next[at]
        some = {name: value[at] for name, value in call.conditions.items()}
        return Case(where=call.where, x=call.x[at], sigma=call.sigma[at], sigma_next=after, conditions=some), want[at]

    def _calls(self) -> Iterator[Case]:
        """Yield what denoisers are compared on, of the smallest batch."""
        spec, batch = self.manifest.spec, self.reference.batch or 1
        values = self.given or (lambda n, seed, size: some_values(spec.conditions, n, seed=seed, size=size))
        yield from denoiser_cases(spec, [batch], SIZES, values, Model(self.reference))

    def _opened(self, model: ir.Model, manifest: Manifest, name: str) -> OnnxRuntimeBackend:
        file = self.folder / name
        data = writer.write_data(model, file) if writer.weight_bytes(model) > writer.MAX_BYTES else None
        writer.write_with_manifest(model, manifest, file, data)
        return OnnxRuntimeBackend(file)


def has_vnni() -> bool | None:
    """Whether this CPU has VNNI, AVX512's or AVX's; None: it is not x86, or the system does not say."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return None if flags is None else not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def _order(names: Sequence[str], errors: npt.NDArray[np.float64]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Return the products in the order to give them back, and the worst error where the first k are, [products].

    Errors of products are taken to add up, and the next is the one with the most of the call that is worst by then.
    """
    rest, order, left = errors.sum(0), list[int](), list[float]()
    for _ in names:
        left.append(float(rest.max()))
        column = errors[:, rest.argmax()].copy()
        column[order] = -1
        order.append(int(column.argmax()))
        rest = rest - errors[order[-1]]
    return [names[i] for i in order], np.array(left)


def _how_many(left: npt.NDArray[np.float64], back: int, psnr_db: float, allowed: float) -> int:
    """Return how many products to give back, at least one more than now; one stays int8.

    Args:
        left: the worst error where the first k are, predicted.
        back: how many are now.
        psnr_db: what came out, dB, instead of the prediction.
        allowed: what is needed, dB.
    """
    goal = left[back] * 10 ** ((psnr_db - allowed) / 10) * SPARE
    fits = np.flatnonzero(left <= goal)
    return min(max(back + 1, int(fits[0]) if len(fits) else len(left)), len(left) - 1)
