// SPDX-License-Identifier: MIT
// What runs a model file: the interface that backends implement, and what they check of a graph.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "sampling.hpp"

namespace cmfast {

/// A buffer that a graph reads or writes: float32, or int64 where the input is a class.
struct Tensor {
    std::string name;
    std::vector<std::int64_t> shape;
    std::vector<float> floats;
    std::vector<std::int64_t> numbers;
    bool is_number = false;

    /// Make room for the shape.
    void resize() {
        std::size_t count = 1;
        for (const auto side : shape) count *= static_cast<std::size_t>(side);
        is_number ? numbers.resize(count) : floats.resize(count);
    }
};

/// What runs a model file. Opening is slow, calling is not.
class Backend {
 public:
    virtual ~Backend() = default;
    virtual const Manifest& manifest() const = 0;
    virtual const std::string& name() const = 0;  // backend and device in words
    virtual std::size_t batch() const = 0;        // the only batch size that it takes; 0: any
    virtual std::size_t most() const { return max_batch; }  // samples of a call

    /// Let `run` read these inputs and write this output, in the order of the manifest, until the next call.
    virtual void bind(std::vector<Tensor>& inputs, Tensor& output) = 0;
    virtual void run() = 0;
};

namespace detail {  // what backends check of a graph that they opened

/// Names of the inputs that a manifest promises, the noisy one first.
inline std::vector<std::string> input_names(const Manifest& manifest) {
    const bool denoiser = manifest.kind == Manifest::Kind::denoiser;
    std::vector<std::string> names = {denoiser ? "x" : "noise"};
    if (denoiser) names.push_back("sigma");
    if (denoiser && manifest.spec.second_time) names.push_back("sigma_next");
    for (const auto& each : manifest.spec.conditions) names.push_back(each.name);
    return names;
}

inline bool is_class(const Manifest& manifest, const std::string& name) {
    for (const auto& each : manifest.spec.conditions) {
        if (each.name == name) return each.kind == Condition::Kind::class_number;
    }
    return false;
}

inline void check_names(std::vector<std::string> wanted, std::vector<std::string> found, const std::string& where) {
    const std::string said = listed(wanted);
    std::sort(wanted.begin(), wanted.end());
    std::sort(found.begin(), found.end());
    if (found == wanted) return;
    throw ArtifactError(where + ": the graph's inputs are " + listed(found) + ", its manifest says " + said);
}

/// Compare the shape of x or noise with the manifest; return the batch size where it is fixed, else 0.
inline std::size_t fixed_batch(const Manifest& manifest, const std::string& name, const std::vector<std::int64_t>& found,
                               const std::string& where) {
    const auto& shape = manifest.spec.shape;
    const std::size_t before = manifest.kind == Manifest::Kind::denoiser ? 1 : 2;
    const auto from = static_cast<std::ptrdiff_t>(before);
    if (found.size() != before + shape.size() || !std::equal(shape.begin(), shape.end(), found.begin() + from)) {
        throw ArtifactError(where + ": the graph's " + name + " is " + listed(found) + ", its manifest says samples of " +
                            listed(shape));
    }
    const std::int64_t batch = found[manifest.kind == Manifest::Kind::sampler ? 1 : 0];
    if (batch == 0 || batch > static_cast<std::int64_t>(max_batch)) {
        throw ArtifactError(text(where, ": the graph's batch size is fixed at ", batch, "; at most ", max_batch, " are run"));
    }
    return batch > 0 ? static_cast<std::size_t>(batch) : 0;
}

}  // namespace detail

}  // namespace cmfast
