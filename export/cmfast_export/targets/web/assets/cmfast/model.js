// SPDX-License-Identifier: MIT
// A model on onnxruntime-web: samples from seeds, equal to those of cmfast.Model in Python up to rounding.
//
//   const model = await Model.open(bytes, { ort, providers: ["wasm"] });     // bytes of an exported .onnx file
//   const x0 = await model.draw({ seed: 0n, sample: 0n, steps: 2, conditions: { label: 7 } });
//   const pixels = toUint8(x0, model.manifest.shape);

import { CmfastError, shown } from "./errors.js";
import { entriesOf, outputOf, readOnnx, sizeOf } from "./manifest.js";
import { LABEL_STEP, drawnLabel, gaussian } from "./noise.js";
import { between, finish, sample } from "./sampler.js";

const DYNAMIC = 16; // size of the dynamic axes in a self-test

export class Model {
  /** Open a file. ort: the module of onnxruntime-web; providers: ["wasm"] or ["webgpu"], nothing else in their place. */
  static async open(bytes, { ort, providers }) {
    const manifest = readOnnx(bytes);
    if (manifest.kind === "server") throw new CmfastError("a file of kind server is for Triton; export a denoiser");
    const session = await ort.InferenceSession.create(bytes, {
      executionProviders: providers,
      logSeverityLevel: 3, // errors: warnings would go to the console
    });
    return new Model(manifest, session, ort);
  }

  constructor(manifest, session, ort) {
    this.manifest = manifest;
    this.session = session;
    this.ort = ort;
  }

  /** Return the noise levels of so many steps; without a number those of the fewest. */
  levels(steps = undefined) {
    const { sigmas } = this.manifest;
    const found = steps === undefined ? sigmas.values().next().value : sigmas.get(steps);
    if (found) return found;
    const have = [...sigmas.keys()].join(", ") || "none";
    throw new CmfastError(`this model has default noise levels for these numbers of steps: ${have}; got ${shown(steps)}`);
  }

  /**
   * Return a sample, Float32Array [*shape] in data units: sample number `sample` of a seed, both BigInt.
   *
   * steps       network calls, with the model's default levels; left out: the fewest
   * conditions  by name: a class number, or numbers of a tensor, flat or nested. A label left out is drawn from the seed
   * towards     { seed, t }: noise on the way to that of another seed, t from 0 to 1
   */
  async draw({ seed, sample: index = 0n, steps = undefined, conditions = {}, towards = null }) {
    const { manifest, ort } = this;
    const sigmas = this.levels(steps);
    const inputs = this.inputs(seed, index, conditions);
    const size = sizeOf(manifest);
    const noise = (step) => {
      const own = gaussian(seed, index, step, new Float32Array(size));
      if (!towards || towards.t <= 0) return own;
      return between(own, gaussian(towards.seed, index, step, new Float32Array(size)), towards.t);
    };
    if (manifest.kind === "sampler") {
      const all = new Float32Array(sigmas.length * size);
      for (let step = 0; step < sigmas.length; step++) all.set(noise(step), step * size);
      const tensor = new ort.Tensor("float32", all, [sigmas.length, 1, ...manifest.shape]);
      const images = await this.run({ noise: tensor, ...inputs });
      finish(images, false, sigmas[0]);
      return images;
    }
    const denoise = (x, sigma, sigmaNext) => {
      const level = (value) => new ort.Tensor("float32", Float32Array.of(value), [1]);
      const next = manifest.second_time ? { sigma_next: level(sigmaNext) } : {};
      return this.run({
        x: new ort.Tensor("float32", x, [1, ...manifest.shape]), sigma: level(sigma), ...next, ...inputs,
      });
    };
    return sample(denoise, noise, sigmas, manifest);
  }

  /** Draw the sample that the exporter recorded and compare: { maxAbs, atol, passed }. */
  async selftest() {
    const recorded = this.manifest.selftest;
    if (!recorded?.at) throw new CmfastError("this file has no self-test; export the model again with cmfast-export");
    const seed = BigInt(recorded.seed);
    const conditions = {};
    this.manifest.conditions.forEach((each, index) => {
      const stream = each.name === "label" ? LABEL_STEP : LABEL_STEP - 1 - index;
      if (each.kind === "class") {
        conditions[each.name] = drawnLabel(seed, 0n, each.classes, stream);
      } else {
        const sides = each.shape.map((side) => (typeof side === "string" ? DYNAMIC : side));
        conditions[each.name] = nested(gaussian(seed, 0n, stream, new Float32Array(product(sides))), sides);
      }
    });
    const x0 = await this.draw({ seed, conditions: { ...conditions, ...recorded.conditions } });
    const differences = recorded.at.map((at, i) => Math.abs(x0[at] - recorded.values[i])); // NaN where there is no value
    const maxAbs = differences.reduce((most, value) => (value <= most ? most : value), 0);
    return { maxAbs, atol: recorded.atol, passed: maxAbs <= recorded.atol };
  }

  async run(feeds) {
    const results = await this.session.run(feeds);
    const output = results[outputOf(this.manifest)];
    if (output?.type !== "float32" || output.data.length !== sizeOf(this.manifest)) {
      throw new CmfastError("the graph has another output than its manifest promises; export the model again");
    }
    return output.data;
  }

  /** Return the tensors of the conditions of one sample. */
  inputs(seed, index, given) {
    const { conditions } = this.manifest;
    const unknown = Object.keys(given).find((name) => !conditions.some((each) => each.name === name));
    if (unknown !== undefined) throw new CmfastError(`this model has no condition ${shown(unknown)}`);
    const sizes = new Map();
    const tensors = {};
    for (const each of conditions) {
      const { name } = each;
      let value = given[name];
      if (value === undefined && name === "label") value = drawnLabel(seed, index, each.classes);
      if (value === undefined || value === null) throw new CmfastError(`this model needs the condition ${name}`);
      if (each.kind === "class") {
        if (!Number.isInteger(value) || value < 0 || value >= entriesOf(each)) {
          throw new CmfastError(`${name} ${shown(value)} is out of range; this model has 0 to ${each.classes - 1}`);
        }
        tensors[name] = new this.ort.Tensor("int64", BigInt64Array.of(BigInt(value)), [1]);
      } else {
        const { data, shape } = numbers(each, value, sizes);
        tensors[name] = new this.ort.Tensor("float32", data, [1, ...shape]);
      }
    }
    return tensors;
  }
}

/** Return the numbers of a tensor condition and its shape; `sizes` holds what dynamic sizes are already known. */
function numbers(condition, value, sizes) {
  const need = `[${condition.shape.join(", ")}]`;
  const wrong = (got) => new CmfastError(`condition ${condition.name} must be ${need}, got ${got}`);
  const fixed = condition.shape.every((side) => typeof side === "number");
  const flat = fixed && Array.isArray(value) && value.length > 0 && value.every((each) => typeof each === "number");
  const shape = flat && value.length === product(condition.shape) ? condition.shape : shapeOf(value);
  const data = Float32Array.from([value].flat(Infinity));
  if (shape.length !== condition.shape.length || data.length !== product(shape)) throw wrong(`[${shape.join(", ")}]`);
  condition.shape.forEach((side, axis) => {
    const known = typeof side === "number" ? side : sizes.get(side);
    if (known !== undefined && known !== shape[axis]) throw wrong(`[${shape.join(", ")}]`);
    if (typeof side === "string") sizes.set(side, shape[axis]);
  });
  if (!data.every(Number.isFinite)) throw wrong("values that are not finite float32 numbers");
  return { data, shape };
}

function shapeOf(value) {
  return Array.isArray(value) ? [value.length, ...(value.length ? shapeOf(value[0]) : [])] : [];
}

function nested(flat, sides) {
  if (sides.length === 0) return flat[0];
  const part = flat.length / sides[0];
  return Array.from({ length: sides[0] }, (_, i) => nested(flat.subarray(i * part, (i + 1) * part), sides.slice(1)));
}

function product(sides) {
  return sides.reduce((all, side) => all * side, 1);
}
