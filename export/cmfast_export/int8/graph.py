# SPDX-License-Identifier: MIT
"""A graph with int8 products, in the form that runtimes recognise (QDQ): float32 values rounded to 8 bits and back.

    x -> QuantizeLinear -> DequantizeLinear -> Conv(., DequantizeLinear(weight)) -> QuantizeLinear -> DequantizeLinear

ONNX Runtime and OpenVINO turn that into one convolution of 8-bit integers; a runtime that does not computes the same in
float32. Data are uint8 with a zero point, weights int8 with a scale for each output channel: 32-bit sums are exact on
CPUs with VNNI.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from cmfast_export.int8.products import Product, products_of

Ranges = Mapping[str, tuple[float, float]]  # least and largest number, by the name of a value
LEVELS = 255  # of uint8, beside 0
MOST_BIAS = 2.0**30  # of an int32; sums of products need the rest
SWITCHES = "int8.switches"  # input of `switched`


def quantized(model: ir.Model, names: Collection[str], ranges: Ranges) -> ir.Model:
    """Return a graph in which the products of these names are int8; `model` is left as it is."""
    return _Quantizing(model, names, ranges, switches=False).run()


def switched(model: ir.Model, names: Collection[str], ranges: Ranges) -> ir.Model:
    """Return the graph with one more input, SWITCHES bool [N]: product i of `names` is int8 where switch i is true."""
    return _Quantizing(model, names, ranges, switches=True).run()


class _Quantizing:
    """One conversion."""

    def __init__(self, model: ir.Model, names: Collection[str], ranges: Ranges, *, switches: bool) -> None:
        self.model, self.ranges, self.names = model.clone(), ranges, list(names)
        self.graph = self.model.graph
        self.pairs: dict[ir.Value, ir.Value] = {}  # what a value is after rounding
        self.chosen: dict[ir.Value, ir.Value] = {}  # with switches: the result of which product a choice stands for
        self.switches: ir.Value | None = None
        if switches:
            shape = ir.Shape([len(self.names)])
            self.switches = ir.Value(name=SWITCHES, type=ir.TensorType(ir.DataType.BOOL), shape=shape)

    def run(self) -> ir.Model:
        found = {product.name: product for group in products_of(self.graph) for product in group}
        for index, name in enumerate(self.names):
            self._quantize(found[name], index)
        if self.switches is not None:
            self.graph.inputs.append(self.switches)
        passes.RemoveUnusedNodesPass()(self.model)  # the float32 weights
        return self.model

    def _quantize(self, product: Product, index: int) -> None:
        node, data = product.node, product.data
        on = self._switch(node, index)
        rounded = self._rounded(data, node)
        scale = self._scale(data)
        node.replace_input_with(0, self._either(on, rounded, data, node, f"{product.name}.data"))
        weight, scales = self._weight(product, scale)
        node.replace_input_with(1, self._either(on, weight, product.weight, node, f"{product.name}.weight"))
        if (bias := product.bias) is not None and on is None:
            node.replace_input_with(2, self._bias(product, bias, scale * scales))
        result = product.result
        users = [(user, place) for user, place in result.uses()]
        after = self._rounded(result, None)
        if on is not None:
            after = self._either(on, after, result, None, f"{product.name}.result")
            self.chosen[after] = result
        for user, place in users:
            user.replace_input_with(place, after)

    def _rounded(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        """Return a value after rounding to uint8, by nodes behind the one that makes it."""
        maker = value.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            return value  # the result of another product
        if value not in self.pairs:
            low, _ = self._range(value)
            scale = self._scale(value)
            zero = np.uint8(np.clip(np.round(-low / scale), 0, LEVELS))
            name = value.name or ""
            numbers = [self._constant(f"{name}.scale", scale), self._constant(f"{name}.zero", zero)]
            narrow = ir.node("QuantizeLinear", [value, *numbers], name=f"{name}.quantize")
            wide = ir.node("DequantizeLinear", [narrow.outputs[0], *numbers], name=f"{name}.dequantize")
            _name(narrow, f"{name}.uint8", ir.DataType.UINT8, value.shape)
            _name(wide, f"{name}.rounded", ir.DataType.FLOAT, value.shape)
            if maker is not None:
                self.graph.insert_after(maker, [narrow, wide])
            else:
                self.graph.insert_before(self.graph[0], [narrow, wide])
            self.pairs[value] = wide.outputs[0]
        return self.pairs[value]

    def _scale(self, value: ir.Value) -> np.float32:
        maker = value.producer()
        if maker is not None and maker.op_type == "DequantizeLinear":
            given = maker.inputs[1]
            assert given is not None
            assert given.const_value is not None
            return np.float32(given.const_value.numpy())
        low, high = self._range(value)
        return np.float32((high - low) / LEVELS)

    def _range(self, value: ir.Value) -> tuple[float, float]:
        return self.ranges[self.chosen.get(value, value).name or ""]

    def _weight(self, product: Product, scale: np.float32) -> tuple[ir.Value, npt.NDArray[np.float32]]:
        """Return the weight as int8 behind a DequantizeLinear, and the scales of its channels."""
        assert product.weight.const_value is not None
        weight = product.weight.const_value.numpy()
        others = tuple(axis for axis in range(weight.ndim) if axis != product.axis)
        scales = np.abs(weight).max(axis=others) / 127
        if product.bias is not None and product.bias.const_value is not None:  # of a channel of zeros, whose bias stays
            scales = np.maximum(scales, np.abs(product.bias.const_value.numpy()) / (scale * MOST_BIAS))
        scales = np.maximum(scales, np.finfo(np.float32).tiny * 2.0**30).astype(np.float32)
        numbers = np.clip(np.round(weight / np.expand_dims(scales, others)), -127, 127).astype(np.int8)
        zeros = np.zeros(len(scales), np.int8)
        return self._dequantized(product, product.weight, numbers, scales, zeros, product.axis), scales

    def _bias(self, product: Product, bias: ir.Value, scales: npt.NDArray[np.float32]) -> ir.Value:
        """Return the bias as int32 in the unit of the sums, as ONNX Runtime wants it."""
        assert bias.const_value is not None
        numbers = np.round(bias.const_value.numpy() / scales.astype(np.float64)).astype(np.int32)
        return self._dequantized(product, bias, numbers, scales, np.zeros(len(scales), np.int32), 0)

    def _dequantized(
        self,
        product: Product,
        old: ir.Value,
        numbers: npt.NDArray[np.int8] | npt.NDArray[np.int32],
        scales: npt.NDArray[np.float32],
        zeros: npt.NDArray[np.int8] | npt.NDArray[np.int32],
        axis: int,
    ) -> ir.Value:
        name = f"{product.name}.{'weight' if numbers.dtype == np.int8 else 'bias'}"
        inputs = [
            self._constant(f"{name}.{numbers.dtype}", numbers),
            self._constant(f"{name}.scales", scales),
            self._constant(f"{name}.zeros", zeros),
        ]
        node = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}.dequantize")
        _name(node, f"{name}.rounded", ir.DataType.FLOAT, old.shape)
        self.graph.insert_before(product.node, node)
        return node.outputs[0]

    def _switch(self, before: ir.Node, index: int) -> ir.Value | None:
        if self.switches is None:
            return None
        place = self._constant(f"int8.switch.{index}", np.int64(index))
        node = ir.node("Gather", [self.switches, place], {"axis": 0}, name=f"int8.switch.{index}.of")
        _name(node, f"int8.switch.{index}.value", ir.DataType.BOOL, ir.Shape([]))
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _either(
        self, on: ir.Value | None, rounded: ir.Value, old: ir.Value, before: ir.Node | None, name: str
    ) -> ir.Value:
        """Return the rounded value; with switches a choice of it and the old one."""
        if on is None:
            return rounded
        node = ir.node("Where", [on, rounded, old], name=f"{name}.either")
        _name(node, f"{name}.chosen", ir.DataType.FLOAT, old.shape)
        maker = rounded.producer()
        if before is not None:
            self.graph.insert_before(before, node)
        else:
            assert maker is not None
            self.graph.insert_after(maker, node)
        return node.outputs[0]

    def _constant(self, name: str, content: npt.NDArray[np.generic] | np.generic) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.asarray(content), name=name)
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _name(node: ir.Node, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(dtype), shape
