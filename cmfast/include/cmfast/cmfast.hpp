// SPDX-License-Identifier: MIT
// cmfast.hpp - few-step sampling in C++17, the same samples as Python. Headers only, standard library only.
//
//   cmfast::Manifest manifest = cmfast::read_manifest("model.onnx");              // what the file says about itself
//   cmfast::Sampler sampler(manifest.spec, manifest.spec.sigmas_for(2));          // its noise levels for two steps
//   sampler.sample(denoise, /*seed*/ 0, /*first*/ 0, image);                      // cmfast/sampling.hpp
//
// With a backend, `denoise` comes from the file: see cmfast/model.hpp, cmfast/onnxruntime.hpp and cmfast/openvino.hpp.
//
// You bring   the denoiser: a lambda around your own runtime
// Memory      buffers are allocated by constructors and first calls; later calls allocate nothing
// Errors      exceptions, cmfast::Error and its children, with one line that names the file, key or shape
// Threads     one object per thread; nothing is global
// Flags       any, but not -ffast-math, which is refused: the noise is equal to Python's to the bit
// Python      docs/edge.md; tests/cpp compares the two
#pragma once

#include "backend.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "model.hpp"
#include "noise.hpp"
#include "plan.hpp"
#include "sampling.hpp"
#include "selftest.hpp"
#include "spec.hpp"
