// SPDX-License-Identifier: MIT
// The few-step loop over any denoiser, Algorithm 1 of "Consistency Models" (arXiv:2303.01469), as cmfast/sampling.py:
// float32 operations in the same order, so that a page draws what Python draws.

import { CmfastError, shown } from "./errors.js";

const f32 = Math.fround;

/**
 * Draw one sample in sigmas.length network calls; return x0, a Float32Array in data units.
 *
 * denoise  async (x: Float32Array, sigma, sigmaNext) -> x0: Float32Array, which the loop may keep and change; sigmaNext
 *          is for flow maps (spec.second_time): with "ddim" the next level, 0 in the last call and with the others
 * noise    (step) -> unit Gaussian noise of that step, Float32Array; "ddim" takes that of step 0 only
 * sigmas   noise levels, data units, decreasing
 * spec     a manifest: sigma_min, renoise, clip
 */
export async function sample(denoise, noise, sigmas, spec) {
  const sameNoise = spec.renoise === "ddim"; // less of it: DDIM, and how flow maps go on
  let x = scaled(noise(0), sigmas[0]);
  let x0 = null;
  for (let step = 0; step < sigmas.length; step++) {
    const sigma = sigmas[step];
    if (x0 !== null) {
      if (sameNoise) less(x, x0, f32(sigma / sigmas[step - 1]));
      else x = renoised(x0, noise(step), f32(renoiseStd(sigma, spec)));
    }
    x0 = await denoise(x, sigma, sameNoise && step + 1 < sigmas.length ? sigmas[step + 1] : 0);
    finish(x0, spec.clip, sigma);
  }
  return x0;
}

/** Return how much fresh noise lifts x0 to noise level sigma: x0 already carries sigma_min, unless "plain". */
export function renoiseStd(sigma, spec) {
  return spec.renoise === "sqrt" ? Math.sqrt(sigma * sigma - spec.sigma_min * spec.sigma_min) : sigma;
}

/** Return an image [C, H, W] in [-1, 1] as bytes [H, W, C]: rounded to nearest, halves to even, clipped. */
export function toUint8(x0, [channels, height, width]) {
  const pixels = height * width;
  const bytes = new Uint8ClampedArray(x0.length); // which rounds just so: ECMAScript's ToUint8Clamp
  for (let channel = 0; channel < channels; channel++) {
    for (let i = 0; i < pixels; i++) {
      bytes[i * channels + channel] = f32(f32(x0[channel * pixels + i] + 1) * 127.5);
    }
  }
  return bytes;
}

/**
 * Return noise on the way from a to b, t from 0 to 1, spherically, so that its length stays that of noise:
 * sin((1 - t) psi) / sin(psi) a + sin(t psi) / sin(psi) b, psi the angle between the two (arXiv:2303.01469, appendix D).
 */
export function between(a, b, t) {
  if (t <= 0) return a;
  if (t >= 1) return b;
  let dot = 0;
  let aa = 0;
  let bb = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  const psi = Math.acos(Math.max(-1, Math.min(1, dot / Math.sqrt(aa * bb))));
  if (!(Math.sin(psi) > 1e-6)) return t < 0.5 ? a : b; // the same noise twice
  const ofA = Math.sin((1 - t) * psi) / Math.sin(psi);
  const ofB = Math.sin(t * psi) / Math.sin(psi);
  return a.map((value, i) => ofA * value + ofB * b[i]);
}

/** Clip to [-1, 1] where the spec says so. NaN and infinity are errors: clipping would turn infinity into white. */
export function finish(x0, clip, sigma) {
  for (let i = 0; i < x0.length; i++) {
    if (!Number.isFinite(x0[i])) {
      throw new CmfastError(
        `the model returned values that are not finite (NaN or infinity) at noise level ${shown(sigma)}; ` +
          "the weights are damaged, or the precision is too low: try it in fp32",
      );
    }
    if (clip) x0[i] = Math.min(1, Math.max(-1, x0[i]));
  }
}

function scaled(z, sigma) {
  const scale = f32(sigma);
  return z.map((value) => scale * value); // a product of two float32 is exact in float64 and rounded once, when stored
}

function renoised(x0, z, scale) {
  return x0.map((value, i) => value + f32(scale * z[i]));
}

function less(x, x0, ratio) {
  for (let i = 0; i < x.length; i++) x[i] = x0[i] + f32(ratio * f32(x[i] - x0[i]));
}
