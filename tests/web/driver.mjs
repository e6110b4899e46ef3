// SPDX-License-Identifier: MIT
// Runs the page's modules in Node.js: reads a list of calls from stdin, [name, argument], and writes their results, or
// {error}, as one JSON list. Arrays of numbers go as base64 of their bytes.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

const [assets, dist] = process.argv.slice(2);
const noise = await import(`${assets}/cmfast/noise.js`);
const sampler = await import(`${assets}/cmfast/sampler.js`);
const { parseManifest, readOnnx } = await import(`${assets}/cmfast/manifest.js`);
const { Model } = await import(`${assets}/cmfast/model.js`);

const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");
const aligned = (text) => new Uint8Array(Buffer.from(text, "base64")).buffer;
const floats = (text) => new Float32Array(aligned(text));
let ort = null;

async function runtime() {
  if (ort === null) {
    ort = await import(`${dist}/ort.wasm.min.mjs`);
    ort.env.wasm.wasmPaths = `file://${dist}/`;
    ort.env.wasm.numThreads = 1;
  }
  return ort;
}

const calls = {
  philox: (rows) => rows.map((row) => {
    const out = new Uint32Array(4);
    noise.philox(...row, out);
    return [...out];
  }),
  quantile: (bits) => base64(Float64Array.from(new Uint32Array(aligned(bits)), noise.normalQuantile)),
  noise: ({ seed, sample, step, count }) =>
    base64(noise.gaussian(BigInt(seed), BigInt(sample), step, new Float32Array(count))),
  digest: ({ seed, first, samples, step, count }) => {
    const hash = createHash("sha256");
    for (let i = 0; i < samples; i++) {
      hash.update(noise.gaussian(BigInt(seed), BigInt(first) + BigInt(i), step, new Float32Array(count)));
    }
    return hash.digest("hex");
  },
  label: ({ seed, sample, classes }) => noise.drawnLabel(BigInt(seed), BigInt(sample), classes),
  seed: (seed) => base64(noise.gaussian(seed, 0, 0, new Float32Array(1))),
  // f(x, sigma) = x / (1 + sigma) - sigma_next / 8, in float32
  sample: async ({ slices, sigmas, spec }) => {
    const f32 = Math.fround;
    const denoise = async (x, sigma, next) =>
      x.map((value) => f32(value / f32(1 + f32(sigma))) - (spec.second_time ? f32(next / 8) : 0));
    return base64(await sampler.sample(denoise, (step) => floats(slices[step]), sigmas, spec));
  },
  between: ({ a, b, t }) => base64(sampler.between(floats(a), floats(b), t)),
  uint8: ({ values, shape }) => base64(sampler.toUint8(floats(values), shape)),
  onnx: (file) => ({ ...readOnnx(new Uint8Array(readFileSync(file))), sigmas: undefined }),
  manifest: (text) => {
    const manifest = parseManifest(text);
    return { ...manifest, sigmas: Object.fromEntries(manifest.sigmas) };
  },
  draw: async ({ file, seed, other, ...request }) => {
    const bytes = new Uint8Array(readFileSync(file));
    const model = await Model.open(bytes, { ort: await runtime(), providers: ["wasm"] });
    const towards = other === undefined ? null : { seed: BigInt(other), t: request.t };
    return base64(await model.draw({ ...request, seed: BigInt(seed), sample: BigInt(request.sample ?? 0), towards }));
  },
  selftest: async (file) => {
    const bytes = new Uint8Array(readFileSync(file));
    return (await Model.open(bytes, { ort: await runtime(), providers: ["wasm"] })).selftest();
  },
};

const results = [];
for (const [name, argument] of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    results.push((await calls[name](argument)) ?? null);
  } catch (error) {
    results.push({ error: `${error.name}: ${error.message}` });
  }
}
process.stdout.write(JSON.stringify(results));
