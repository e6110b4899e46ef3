// SPDX-License-Identifier: MIT
// Spec: everything about a model that is not a weight, and the noise levels to sample it with.
//
// As cmfast/spec.py, cmfast/conditions.py and cmfast/schedule.py, with their words. The preconditioning (`scaling`,
// `c_noise`) is inside the graph, so it is only kept here, not interpreted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "errors.hpp"

namespace cmfast {

inline constexpr int max_steps = 10'000;  // network calls a sample

/// A named input of the denoiser beside x and sigma.
struct Condition {
    enum class Kind { class_number, tensor };

    std::string name;
    Kind kind = Kind::tensor;
    std::int64_t classes = 0;              // of a class
    std::vector<std::string> class_names;  // of the classes 0, 1, ..; empty: they have none
    std::vector<std::int64_t> shape;       // of a tensor, without the batch; -1: differs from call to call
    std::vector<std::string> sides;        // names of the sizes that differ, "" elsewhere; equal names are equal sizes
    std::optional<double> null;            // what stands for no condition: a class, at most `classes`, or what fills it

    /// Of a class: how many numbers it may have, that of no class included.
    std::int64_t entries() const {
        const bool more = kind == Kind::class_number && null;
        return more ? std::max(classes, static_cast<std::int64_t>(*null) + 1) : classes;
    }

    /// What it takes, for errors.
    std::string in_words() const {
        if (kind == Kind::class_number) return detail::text("a class from 0 to ", classes - 1);
        std::vector<std::string> axes = {"B"};
        for (std::size_t i = 0; i < shape.size(); ++i) {
            axes.push_back(shape[i] < 0 ? sides[i] : std::to_string(shape[i]));
        }
        return "float32 " + detail::listed(axes);
    }
};

/// Return noise levels, data units, if they strictly decrease inside the model's range; else throw.
inline const std::vector<double>& check_sigmas(const std::vector<double>& sigmas, double sigma_min, double sigma_max) {
    using detail::text;
    if (sigmas.empty()) {
        throw Error(text("no noise levels were given; give at least one, for example ", sigma_max));
    }
    if (sigmas.size() > max_steps) {
        throw Error(text("there are more than ", max_steps, " noise levels; each is a network call, so give fewer"));
    }
    if (!(sigma_min < sigmas[0] && sigmas[0] <= sigma_max)) {
        throw Error(text("the first noise level is ", sigmas[0], ", but this model was trained for ", sigma_min,
                         " < sigma <= ", sigma_max, "; start with ", sigma_max));
    }
    for (std::size_t i = 1; i < sigmas.size(); ++i) {
        if (!(sigma_min < sigmas[i] && sigmas[i] < sigmas[i - 1])) {
            throw Error(text("noise levels must strictly decrease and stay above ", sigma_min, ": ", sigmas[i],
                             " follows ", sigmas[i - 1]));
        }
    }
    return sigmas;
}

/// The conventions of one model. Noise levels are standard deviations in data units.
struct Spec {
    std::vector<std::int64_t> shape;    // of a sample, one to four axes: [C, H, W] images, [T, A] actions, ..
    std::string data = "image";         // "image": in [-1, 1]; "array": numbers
    std::vector<Condition> conditions;  // the named inputs beside x and sigma
    bool second_time = false;           // a flow map: the denoiser takes a second noise level, sigma_next
    double sigma_min = 0.002;           // the model is the identity here
    double sigma_max = 80.0;            // sampling starts here
    double sigma_data = 0.5;            // standard deviation of the data
    std::string scaling = "boundary";   // inside the graph
    std::string c_noise = "250ln";      // inside the graph
    std::string renoise = "sqrt";       // "sqrt", "plain" or "ddim": cmfast/sampling.hpp
    bool clip = true;                   // clip x0 to [-1, 1] after every call while sampling
    std::int64_t grid = 0;              // levels of the grid that it was trained on; 0: none
    std::map<int, std::vector<double>> sigmas = {{1, {80.0}}, {2, {80.0, 0.8}}};  // default levels, by steps

    /// Values of one sample, at most 2**34: what the noise of one step has numbers for.
    std::size_t size() const {
        std::uint64_t product = 1;
        for (const auto side : shape) {
            if (side < 1 || side > 65536) throw Error("shape must be sizes from 1 to 65536, got " + detail::listed(shape));
            product *= static_cast<std::uint64_t>(side);
            if (product > std::uint64_t{1} << 34) throw Error("a sample has at most 2**34 values, got " + detail::listed(shape));
        }
        if (shape.empty()) throw Error("shape must be one to four positive whole numbers, got none");
        return static_cast<std::size_t>(product);
    }

    /// The condition of this name; throws where there is none.
    const Condition& condition(const std::string& name) const {
        for (const auto& each : conditions) {
            if (each.name == name) return each;
        }
        std::vector<std::string> names;
        for (const auto& each : conditions) names.push_back(each.name);
        throw Error(detail::text("this model has no condition ", detail::in_quotes(name), "; it has ",
                                 names.empty() ? "none" : detail::listed(names, "", "")));
    }

    /// The default noise levels for so many network calls; 0: for the fewest that the model has defaults for.
    const std::vector<double>& sigmas_for(int steps = 0) const {
        if (steps < 0) throw Error(detail::text("the number of steps must be at least 1, got ", steps));
        const auto found = steps == 0 ? sigmas.begin() : sigmas.find(steps);
        if (found != sigmas.end()) return found->second;
        std::vector<int> have;
        for (const auto& each : sigmas) have.push_back(each.first);
        throw Error(detail::text("this model has default noise levels for these numbers of steps: ",
                                 have.empty() ? "none" : detail::listed(have, "", ""), "; for ",
                                 std::max(steps, 1), ", pass them"));
    }

    /// Given noise levels, checked.
    const std::vector<double>& sigmas_for(const std::vector<double>& given) const {
        return check_sigmas(given, sigma_min, sigma_max);
    }
};

}  // namespace cmfast
