// SPDX-License-Identifier: MIT
// The page: reads the controls, asks the worker, shows what it draws and how long that took.

import { Sheet } from "./sheet.js";

const at = (id) => document.getElementById(id);
const MOST_ZEROS = 64; // numbers of a tensor condition that are filled in

/** A worker whose messages are answered in order; `seen` gets the samples that come before an answer. */
class Client {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #last = 0;

  constructor() {
    this.#worker.addEventListener("message", ({ data }) => {
      const { resolve, reject, seen } = this.#waiting.get(data.id);
      if (data.index !== undefined) return seen(data);
      this.#waiting.delete(data.id);
      return data.error === undefined ? resolve(data) : reject(new Error(data.error));
    });
    this.#worker.addEventListener("error", (event) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(event.message || "the worker did not start"));
    });
  }

  call(type, request = {}, seen = () => {}) {
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, seen });
      this.#worker.postMessage({ ...request, id, type });
    });
  }

  end() {
    this.#worker.terminate();
  }
}

let client = null; // of the provider in use
let manifest = null;
let site = null;
let sheet = null;
let drawing = null; // a promise, while samples are drawn
let again = false; // the controls changed in the meantime

async function start() {
  const answer = await fetch("site.json");
  if (!answer.ok) throw new Error(`site.json was not found on this server (${answer.status}); copy the whole folder`);
  site = await answer.json();
  at("time").textContent = `Opening the model, ${(site.bytes / 1e6).toFixed(1)} MB`;
  document.title = at("title").textContent = site.title;
  client = new Client();
  const opened = await client.call("open", { provider: "wasm", site });
  manifest = opened.manifest;
  sheet = new Sheet(at("canvas"), manifest);
  describe();
  backend("WebAssembly", opened);
  at("webgpu-row").hidden = !site.webgpu;
  at("fields").disabled = false;
  await draw();
  await test();
}

/** Fill in what the model says of itself. */
function describe() {
  const { shape, data, sigmas, conditions } = manifest;
  const what = data === "image" ? `${shape[2]} × ${shape[1]} images` : `samples [${shape.join(", ")}]`;
  at("about").textContent = `Draws ${what} in ${[...sigmas.keys()].join(", ")} network calls.`;
  for (const [steps, levels] of sigmas) {
    at("steps").add(new Option(`${steps} at noise ${levels.join(", ")}`, steps));
  }
  if (data === "array") at("count").value = "4";
  for (const each of conditions) {
    const control = each.kind === "class" ? classControl(each) : tensorControl(each);
    control.id = `condition-${each.name}`;
    const label = Object.assign(document.createElement("label"), { htmlFor: control.id, textContent: each.name });
    const row = Object.assign(document.createElement("div"), { className: "row" });
    row.append(label, control);
    at("conditions").append(row);
  }
}

function classControl({ name, classes, names, null: none }) {
  const many = classes > 2000; // too many for a list
  const control = document.createElement(many ? "input" : "select");
  if (many) return Object.assign(control, { value: name === "label" ? "" : "0", inputMode: "numeric" });
  if (name === "label") control.add(new Option("from the seed", ""));
  for (let i = 0; i < classes; i++) control.add(new Option(names[i] ?? i, i));
  if (none !== undefined && none >= classes) control.add(new Option("none", none));
  return control;
}

function tensorControl({ shape }) {
  const control = document.createElement("textarea");
  const size = shape.reduce((all, side) => all * (typeof side === "number" ? side : Infinity), 1);
  control.placeholder = `[${shape.join(", ")}] as JSON`;
  control.value = size <= MOST_ZEROS ? JSON.stringify(new Array(size).fill(0)) : "";
  return control;
}

/** Return the values of the conditions; a label left out is drawn from the seed. */
function conditions() {
  const values = {};
  for (const each of manifest.conditions) {
    const text = at(`condition-${each.name}`).value.trim();
    if (text === "" && each.name === "label") continue;
    try {
      values[each.name] = JSON.parse(text);
    } catch {
      throw new Error(`${each.name} must be ${each.kind === "class" ? "a number" : "numbers as JSON: [0, 0.5, 1]"}`);
    }
  }
  return values;
}

/** Draw what the controls say; a change in the meantime stops this and draws once more. */
function draw() {
  again = drawing !== null;
  if (again) client.call("stop");
  drawing ??= drawAll().finally(() => (drawing = null));
  return drawing;
}

async function drawAll() {
  try {
    do {
      again = false;
      await drawOnce();
    } while (again);
    at("error").textContent = "";
  } catch (error) {
    at("error").textContent = error.message;
  }
}

async function drawOnce() {
  if (!at("controls").reportValidity()) return;
  const [seed, other, count, steps] = ["seed", "other", "count", "steps"].map((id) => at(id).value);
  const t = at("between").valueAsNumber / 100;
  const request = {
    count: Number(count), seed: BigInt(seed), steps: Number(steps), conditions: conditions(),
    towards: t > 0 ? { seed: BigInt(other), t } : null,
  };
  sheet.begin(request.count);
  const { times } = await client.call("draw", request, ({ index, values }) => {
    sheet.put(index, values);
    at("canvas").dataset.first ??= Math.round(performance.now()); // ms since the page was asked for
  });
  if (again) return;
  const noun = manifest.data === "image" ? "image" : "sample";
  const middle = [...times].sort((a, b) => a - b)[times.length >> 1];
  at("time").textContent = `${middle.toFixed(middle < 10 ? 1 : 0)} ms per ${noun}`;
  const way = t > 0 ? `, ${at("between").value} % on the way to seed ${other}` : "";
  at("canvas").setAttribute("aria-label", `${count} ${noun}s of seed ${seed}${way}`);
  at("canvas").dataset.drawn = `${seed} ${steps} ${count} ${t}`;
}

function backend(name, { threads, isolated, ms }) {
  const why = isolated ? "" : ", because the page is not cross-origin isolated";
  const many = `${threads} thread${threads === 1 ? "" : "s"}`;
  const runs = name === "WebGPU" ? name : `${name}, ${many}${why}`;
  at("backend").textContent = `${runs}; the model was opened in ${Math.round(ms)} ms`;
}

/** Run the self-test of the model in use, and say how it went; return whether it passed. */
async function test(tested = client, name = "WebAssembly") {
  if (!manifest.selftest?.at) {
    at("selftest").textContent = "The file has no self-test.";
    return false;
  }
  const { maxAbs, atol, passed } = (await tested.call("selftest")).result;
  const words = `${name} differs by ${maxAbs.toExponential(1)} from what was recorded, and ${atol} is allowed.`;
  at("selftest").textContent = `Self-test ${passed ? "passed" : "failed"}: ${words}`;
  at("selftest").dataset.passed = passed;
  return passed;
}

/** Go over to another provider: WebGPU only after it computed the self-test as recorded. */
async function change(provider) {
  const name = provider === "webgpu" ? "WebGPU" : "WebAssembly";
  const next = new Client();
  at("fields").disabled = true;
  client.call("stop");
  await drawing;
  at("error").textContent = "";
  try {
    const opened = await next.call("open", { provider, site });
    const passed = await test(next, name);
    if (provider === "webgpu" && !passed) throw new Error("WebGPU is not used on this machine: see the self-test");
    client.end();
    client = next;
    backend(name, opened);
  } catch (error) {
    next.end();
    at("webgpu").checked = provider !== "webgpu";
    at("error").textContent = error.message;
    return;
  } finally {
    at("fields").disabled = false;
  }
  await draw();
  at("canvas").dataset.provider = provider;
}

at("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("controls").addEventListener("change", ({ target }) => (target.id === "webgpu" ? null : draw()));
at("between").addEventListener("input", () => {
  at("way").textContent = `${at("between").value} %`;
  draw();
});
at("another").addEventListener("click", () => {
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  draw();
});
at("webgpu").addEventListener("change", ({ target }) => change(target.checked ? "webgpu" : "wasm"));
at("save").addEventListener("click", () => sheet.save(`seed${at("seed").value}.png`));

start().catch((error) => {
  at("time").textContent = "";
  at("error").textContent = error.message;
});
