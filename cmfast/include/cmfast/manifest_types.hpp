// SPDX-License-Identifier: MIT
// The manifest's types: what a model file says of itself. cmfast/manifest.hpp reads one from a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "spec.hpp"

namespace cmfast {

/// A sample that the exporter drew: what `cmfast::selftest` (cmfast/selftest.hpp) compares with.
struct Selftest {
    bool present = false;
    std::uint64_t seed = 0;
    std::map<std::string, std::vector<double>> conditions;  // of one sample, flat
    std::vector<std::size_t> at;                            // flat indices into the sample
    std::vector<double> values;                             // what stands there
    double atol = 0;                                        // largest difference allowed, data units
};

/// What built a TensorRT engine, for what: cmfast/plan.hpp.
struct Engine {
    std::string library;              // "tensorrt" or "tensorrt_rtx"; "": this is no engine
    std::string version;              // of the library
    std::string plan_sha256;          // of the file, these 64 digits counted as zeros
    std::int64_t batch[3] = {0, 0, 0};  // least, usual, most
};

/// A model file's description of itself.
struct Manifest {
    enum class Kind { denoiser, sampler, server };

    Kind kind = Kind::denoiser;
    Spec spec;
    std::string dtype = "float32";               // what the network computes in; inputs and outputs are float32
    std::map<std::string, std::string> made_by;  // versions; "flavour": which runtime the nodes are for
    std::string graph_sha256;
    Selftest selftest;
    Engine engine;

    /// The name of the graph's output.
    std::string output() const {
        return kind == Kind::denoiser ? "denoised" : spec.data == "image" ? "images" : "samples";
    }
};

}  // namespace cmfast
