// SPDX-License-Identifier: MIT
// The page's worker: opens the model and draws, so that the page stays responsive. Every message has an id and is
// answered by { id, ... } or { id, error }; samples are sent one by one as they are drawn.

import { toUint8 } from "./cmfast/sampler.js";
import { Model } from "./cmfast/model.js";

const RUNTIMES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.jspi.min.mjs" };
// An ONNX file of one node, y = Identity(x).
const IDENTITY = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=";
const HERE = new URL(".", import.meta.url).href;
let bytes = null; // of the model's file
let model = null;
let stopped = false; // by the page, which wants other samples

addEventListener("message", async ({ data }) => {
  try {
    postMessage({ id: data.id, ...(await { open, draw, stop, selftest }[data.type](data)) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message ?? String(error) });
  }
});

/** Open the model on "wasm" or "webgpu"; return its manifest, the threads and how long that took. */
async function open({ provider, site }) {
  const begun = performance.now();
  if (provider === "webgpu") await needWebgpu();
  const [ort, file] = await Promise.all([start(provider), download(site)]);
  bytes = file;
  model = await Model.open(bytes, { ort, providers: [provider] });
  return { manifest: model.manifest, threads: threads(), isolated: crossOriginIsolated, ms: performance.now() - begun };
}

/** Return onnxruntime-web with its WASM file loaded and compiled, which it does for the first session only. */
async function start(provider) {
  const ort = await import(`${HERE}onnxruntime-web/${RUNTIMES[provider]}`);
  ort.env.wasm.wasmPaths = `${HERE}onnxruntime-web/`;
  ort.env.wasm.numThreads = threads();
  ort.env.logLevel = "error";
  await ort.InferenceSession.create(Uint8Array.from(atob(IDENTITY), (letter) => letter.charCodeAt(0)));
  return ort;
}

/** Draw samples of a seed, and post each: pixels [H, W, C] of an image, else its numbers. */
async function draw({ id, count, seed, first = 0n, ...request }) {
  const { data, shape } = model.manifest;
  const times = [];
  stopped = false;
  for (let i = 0; i < count && !stopped; i++) {
    const begun = performance.now();
    const x0 = await model.draw({ ...request, seed, sample: first + BigInt(i) });
    times.push(performance.now() - begun);
    postMessage({ id, index: i, values: data === "image" ? toUint8(x0, shape) : x0 });
    await new Promise((resolve) => setTimeout(resolve)); // lets a message in
  }
  return { times };
}

/** End the drawing in progress after the sample that is being computed. */
function stop() {
  stopped = true;
  return {};
}

async function selftest() {
  return { result: await model.selftest() };
}

/** Return the model's file, put together from its parts and compared with what was exported. */
async function download(site) {
  if (bytes) return bytes;
  const parts = await Promise.all(site.model.map(async (name) => {
    const answer = await fetch(HERE + name);
    if (!answer.ok) throw new Error(`${name} was not found on this server (${answer.status}); copy the whole folder`);
    return new Uint8Array(await answer.arrayBuffer());
  }));
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  // Only pages of https and of this machine have crypto.subtle.
  const found = crypto.subtle ? hex(await crypto.subtle.digest("SHA-256", whole)) : site.sha256;
  if (whole.length !== site.bytes || found !== site.sha256) {
    throw new Error("the model differs from the one that was exported: clear the cache, or copy the whole folder again");
  }
  return whole;
}

async function needWebgpu() {
  if (!("Suspending" in WebAssembly)) {
    throw new Error("WebGPU needs JavaScript Promise Integration here, which this browser lacks; Chrome 137 has it");
  }
  if (!(await navigator.gpu?.requestAdapter())) throw new Error("this browser offers no WebGPU adapter");
}

/** Return the number of threads: WebAssembly shares memory between threads on cross-origin isolated pages only. */
function threads() {
  return crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
}

function hex(buffer) {
  return [...new Uint8Array(buffer)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
