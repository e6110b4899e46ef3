// SPDX-License-Identifier: MIT
// Portable Gaussian noise: the same numbers, to the bit, as cmfast/noise.py in Python and cmfast/noise.hpp in C++.
//
//   (seed, sample, step, index) --Philox4x32-10--> 32 random bits --> uniform --inverse CDF--> float32
//
// The quantile uses + - * / and sqrt of float64 only. JavaScript rounds each of them as IEEE 754 says and fuses none.
// The reference and the sources of Philox and of the quantile are in cmfast/noise.py.

import { CmfastError, shown } from "./errors.js";

export const LABEL_STEP = 0xffffffff; // the stream of the labels; no sampler has that many steps
const MAX_VALUES = 2 ** 34; // of one sample: four to a block, 2**32 blocks

/**
 * Write unit Gaussian noise into a Float32Array: what Python's gaussian(seed, sample, step, shape) returns, in C order.
 *
 * seed, sample: 0 to 2**64 - 1, as a BigInt or a whole number. step: which network call the noise is for, from 0.
 */
export function gaussian(seed, sample, step, out) {
  const key = words("seed", seed);
  const counter = words("sample", sample);
  if (out.length > MAX_VALUES) throw new CmfastError(`a sample has at most 2**34 values, got ${out.length}`);
  const block = new Uint32Array(4);
  for (let start = 0; start < out.length; start += 4) {
    philox(start / 4, step, counter[0], counter[1], key[0], key[1], block);
    const end = Math.min(4, out.length - start);
    for (let i = 0; i < end; i++) out[start + i] = normalQuantile(block[i]);
  }
  return out;
}

/** Return the class of a sample, uniform over 0 .. classes - 1: what Python's labels(seed, [sample], classes) returns. */
export function drawnLabel(seed, sample, classes, step = LABEL_STEP) {
  const key = words("seed", seed);
  const counter = words("sample", sample);
  const block = new Uint32Array(4);
  philox(0, step, counter[0], counter[1], key[0], key[1], block);
  return Number((BigInt(block[0]) * BigInt(classes)) >> 32n);
}

/** Write Philox4x32-10 of one counter into `out`, four 32-bit words. */
export function philox(c0, c1, c2, c3, k0, k1, out) {
  for (let round = 0; round < 10; round++) {
    const high0 = highWord(0xd2511f53, c0);
    const high1 = highWord(0xcd9e8d57, c2);
    const low0 = Math.imul(0xd2511f53, c0);
    const low1 = Math.imul(0xcd9e8d57, c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/** Return the upper 32 bits of a product of two 32-bit words, from halves whose products float64 holds exactly. */
function highWord(a, b) {
  const a1 = a >>> 16;
  const a0 = a & 0xffff;
  const b1 = b >>> 16;
  const b0 = b & 0xffff;
  const middle = a1 * b0 + a0 * b1 + ((a0 * b0) >>> 16); // below 2**34
  return (a1 * b1 + Math.floor(middle / 65536)) >>> 0;
}

// AS 241, PPND16: numerator and denominator, lowest power first.
const CENTRE = [
  [
    3.387132872796366608, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
  ],
  [
    1, 4.2313330701600911252e1, 6.871870074920579083e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
    3.930789580009271061e4, 2.8729085735721942674e4, 5.226495278852854561e3,
  ],
];
const TAIL = [
  [
    1.42343711074968357734, 4.6303378461565452959, 5.7694972214606914055, 3.64784832476320460504,
    1.27045825245236838258, 2.4178072517745061177e-1, 2.27238449892691845833e-2, 7.7454501427834140764e-4,
  ],
  [
    1, 2.05319162663775882187, 1.6763848301838038494, 6.8976733498510000455e-1, 1.4810397642748007459e-1,
    1.51986665636164571966e-2, 5.475938084995344946e-4, 1.05075007164441684324e-9,
  ],
];
const ATANH = Array.from({ length: 11 }, (_, i) => 2 / (2 * i + 1)); // 2 atanh(s) = s (2 + 2/3 s^2 + 2/5 s^4 + ..)

/** Return the normal quantile at (bits + 1/2) / 2**32, float64. */
export function normalQuantile(bits) {
  const q = bits * 2 ** -32 + 2 ** -33 - 0.5; // exact: 33 bits
  const distance = Math.abs(q);
  if (distance <= 0.425) {
    const r = 0.180625 - q * q;
    return q * (polynomial(CENTRE[0], r) / polynomial(CENTRE[1], r));
  }
  const r = Math.sqrt(-logOfFraction(0.5 - distance)) - 1.6; // 0.5 - |q| is the smaller tail's probability, exact
  const value = polynomial(TAIL[0], r) / polynomial(TAIL[1], r);
  return q < 0 ? -value : value;
}

/** Horner's rule, lowest power first. The order of rounding is part of the noise's definition. */
function polynomial(coefficients, x) {
  let total = coefficients[coefficients.length - 1];
  for (let i = coefficients.length - 2; i >= 0; i--) total = total * x + coefficients[i];
  return total;
}

/** ln(x) for 2**-33 <= x < 1 in plain arithmetic, because engines differ in Math.log: x = m 2^e, 0.7 < m < 1.5. */
function logOfFraction(x) {
  let m = x;
  let exponent = 0;
  while (m < 0.5) {
    m *= 2; // exact
    exponent -= 1;
  }
  if (m < 0.70710678118654752) {
    m *= 2;
    exponent -= 1;
  }
  const s = (m - 1) / (m + 1);
  return exponent * 0.693147180559945309417 + s * polynomial(ATANH, s * s);
}

/** Return a number below 2**64 as two 32-bit words, the lower one first. */
function words(name, value) {
  let whole = typeof value === "bigint" ? value : -1n;
  if (Number.isSafeInteger(value)) whole = BigInt(value);
  if (whole < 0n || whole >= 1n << 64n) {
    throw new CmfastError(`the ${name} must be a whole number from 0 to 2**64 - 1, got ${shown(value)}`);
  }
  return [Number(whole & 0xffffffffn), Number(whole >> 32n)];
}
