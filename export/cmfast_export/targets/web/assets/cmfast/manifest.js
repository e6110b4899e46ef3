// SPDX-License-Identifier: MIT
// What a model file says about itself: the manifest in an ONNX file's metadata_props["cmfast"], both of its schemas.
// The keys are explained in docs/format.md; cmfast/formats/manifest.py is the reference.

import { CmfastError, shown } from "./errors.js";

const SCHEMAS = ["cmfast/1", "cmfast/2"];
const KINDS = ["denoiser", "sampler", "server"];
const DTYPES = ["float32", "tf32", "float16", "bfloat16"];
const METADATA = 14; // ModelProto.metadata_props, of key = 1 and value = 2
const MAX_CHARACTERS = 64_000;

/** Return the manifest of the bytes of an ONNX file. */
export function readOnnx(bytes) {
  const found = [];
  for (const field of fields(bytes)) {
    if (field.number !== METADATA || field.bytes === null) continue;
    const entry = { 1: "", 2: "" };
    for (const part of fields(field.bytes)) {
      if (part.bytes !== null && part.number in entry) entry[part.number] = new TextDecoder().decode(part.bytes);
    }
    if (entry[1] === "cmfast") found.push(entry[2]);
  }
  if (found.length > 1) throw new CmfastError("the file holds two manifests; export the model again");
  if (found.length === 1) return parseManifest(found[0]);
  throw new CmfastError("an ONNX file without a cmfast manifest; make one that has it: cmfast-export model.pt");
}

/**
 * Return a manifest from its JSON, with the names of schema "cmfast/2" also where the text has "cmfast/1"; `sigmas`
 * becomes a Map {steps: noise levels}. Unknown keys stay, an unknown schema and wrong values are refused.
 */
export function parseManifest(text) {
  let read = null;
  try {
    read = text.length <= MAX_CHARACTERS ? JSON.parse(text) : null;
  } catch {
    read = null;
  }
  if (!isObject(read)) throw new CmfastError("the manifest is not a JSON object; export the model again");
  const twice = repeatedKey(text);
  if (twice !== null) {
    throw new CmfastError(`the manifest has the key ${shown(twice)} twice; export the model again`);
  }
  if (!SCHEMAS.includes(read.schema)) {
    throw new CmfastError(`the manifest has schema ${shown(read.schema)}, this page reads ${SCHEMAS.join(" and ")}`);
  }
  const old = read.shape === undefined && read.image !== undefined ? ofFirstSchema(read) : {};
  const manifest = { dtype: "float32", second_time: false, ...read, ...old };
  need(KINDS.includes(manifest.kind), "kind", manifest.kind);
  const whole = (side) => Number.isInteger(side) && side >= 1 && side <= 65536;
  need(isList(manifest.shape, whole) && manifest.shape.length >= 1 && manifest.shape.length <= 4, "shape", read.shape);
  need(["image", "array"].includes(manifest.data), "data", manifest.data);
  need(DTYPES.includes(manifest.dtype), "dtype", manifest.dtype);
  need(manifest.data === "array" || manifest.shape.length === 3, "shape", manifest.shape);
  need(["sqrt", "plain", "ddim"].includes(manifest.renoise), "renoise", manifest.renoise);
  for (const key of ["sigma_min", "sigma_max", "sigma_data"]) {
    need(Number.isFinite(manifest[key]) && manifest[key] > 0, key, manifest[key]);
  }
  for (const key of ["second_time", "clip"]) need(typeof manifest[key] === "boolean", key, manifest[key]);
  need(manifest.sigma_min < manifest.sigma_max, "sigma_min", manifest.sigma_min);
  need(Array.isArray(manifest.conditions), "conditions", manifest.conditions);
  manifest.conditions = manifest.conditions.map(condition);
  manifest.sigmas = levels(manifest);
  const tested = manifest.selftest;
  need(tested === undefined || isSelftest(tested), "selftest", tested);
  return manifest;
}

/** Return the name of the graph's output. */
export function outputOf(manifest) {
  return manifest.kind === "denoiser" ? "denoised" : manifest.data === "image" ? "images" : "samples";
}

/** Return how many values a sample has. */
export function sizeOf(manifest) {
  return manifest.shape.reduce((product, side) => product * side, 1);
}

/** Return how many numbers a class condition may have, that of no class included. */
export function entriesOf(condition) {
  return condition.null === undefined ? condition.classes : Math.max(condition.classes, condition.null + 1);
}

function ofFirstSchema(read) {
  need(Number.isInteger(read.classes) && read.classes >= 0, "classes", read.classes);
  const names = read.class_names ?? [];
  const label = { name: "label", kind: "class", classes: read.classes, ...(names.length ? { class_names: names } : {}) };
  return { shape: read.image, data: "image", conditions: read.classes ? [label] : [] };
}

function condition(read) {
  need(isObject(read) && isName(read.name), "conditions", read);
  const where = `condition ${read.name}`;
  const least = read.null === null ? undefined : read.null;
  if (read.kind === "class") {
    need(Number.isInteger(read.classes) && read.classes >= 1 && read.classes < 2 ** 31, where, read.classes);
    const names = read.class_names ?? [];
    need(isList(names, (name) => typeof name === "string"), where, names);
    need(names.length === 0 || names.length === read.classes, where, names);
    need(least === undefined || (Number.isInteger(least) && least >= 0 && least <= read.classes), where, least);
    return { name: read.name, kind: "class", classes: read.classes, names, null: least };
  }
  const side = (value) => value === null || isName(value) || (Number.isInteger(value) && value >= 1);
  const shape = read.shape ?? [];
  need(read.kind === "tensor" && isList(shape, side) && shape.length <= 6, where, read.kind);
  const named = shape.map((value, axis) => value ?? `${read.name}_${axis}`);
  return { name: read.name, kind: "tensor", shape: named, null: least };
}

function levels(manifest) {
  need(isObject(manifest.sigmas), "sigmas", manifest.sigmas);
  const found = new Map();
  for (const [steps, list] of Object.entries(manifest.sigmas)) {
    need(/^[1-9]\d{0,4}$/.test(steps) && isList(list, Number.isFinite) && list.length === Number(steps), "sigmas", list);
    const inside = list.every((sigma, i) => sigma > manifest.sigma_min && sigma <= (list[i - 1] ?? manifest.sigma_max));
    need(inside, "sigmas", list);
    found.set(Number(steps), list);
  }
  need(manifest.kind === "denoiser" || found.size === 1, "sigmas", manifest.sigmas);
  return new Map([...found].sort(([a], [b]) => a - b));
}

function isSelftest(read) {
  const index = (value) => Number.isSafeInteger(value) && value >= 0;
  return (
    isObject(read) &&
    (Object.keys(read).length === 0 ||
      (index(read.seed) &&
        isObject(read.conditions) &&
        isList(read.at, index) &&
        isList(read.values, Number.isFinite) &&
        read.at.length >= 1 &&
        read.at.length === read.values.length &&
        read.atol >= 0))
  );
}

/** Return a key that an object of valid JSON has twice, else null: JSON.parse keeps the last one and says nothing. */
function repeatedKey(text) {
  const open = []; // the keys of each object that is open, null for a list
  const tokens = /"(?:[^"\\]|\\.)*"|[{}[\]]/g;
  for (let token = tokens.exec(text); token !== null; token = tokens.exec(text)) {
    const [word] = token;
    if (word === "{" || word === "[") open.push(word === "{" ? new Set() : null);
    else if (word === "}" || word === "]") open.pop();
    else if (/^\s*:/.test(text.slice(tokens.lastIndex))) {
      const key = JSON.parse(word); // "a" and "\u0061" are one key
      if (open.at(-1).has(key)) return key;
      open.at(-1).add(key);
    }
  }
  return null;
}

function isName(value) {
  return typeof value === "string" && /^[A-Za-z_]\w{0,99}$/.test(value);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isList(value, fits) {
  return Array.isArray(value) && value.every(fits);
}

function need(fits, key, value) {
  if (!fits) throw new CmfastError(`the manifest has a wrong ${key}: ${shown(value)}; export the model again`);
}

/** Yield the fields of a protobuf message: {number, bytes}, bytes of a length-delimited one, else null. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 1; at < bytes.length && shift <= 2 ** 63; shift *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * shift; // lengths are exact up to 2**53
      if (byte < 128) return value;
    }
    throw new CmfastError("not a whole ONNX file; export the model again");
  };
  while (at < bytes.length) {
    const tag = varint();
    const [number, wire] = [Math.floor(tag / 8), tag % 8];
    const length = { 1: 8, 2: 0, 5: 4 }[wire];
    if (wire === 0) {
      varint();
      yield { number, bytes: null };
      continue;
    }
    const end = wire === 2 ? varint() : length;
    if (length === undefined || at + end > bytes.length) {
      throw new CmfastError("not a whole ONNX file; export the model again");
    }
    yield { number, bytes: wire === 2 ? bytes.subarray(at, at + end) : null };
    at += end;
  }
}
