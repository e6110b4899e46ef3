// SPDX-License-Identifier: MIT
// Whether this machine computes what the exporter recorded in the file: docs/format.md, cmfast/formats/selftest.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "model.hpp"
#include "noise.hpp"

namespace cmfast {

/// How far this machine is from the values that the exporter recorded in the file.
struct SelftestResult {
    double max_abs = 0;  // largest difference, data units
    double atol = 0;     // allowed
    bool passed = false;
};

/// Draw the sample that the file's manifest records values of, and compare: docs/format.md. Throws where it has none.
///
/// Conditions and noise levels of the model are those of the test afterwards.
inline SelftestResult selftest(Model& model) {
    const Selftest& test = model.manifest().selftest;
    if (!test.present) {
        throw Error("this file has no self-test; export the model again with cmfast-export");
    }
    model.steps(0);
    const auto& conditions = model.spec().conditions;
    for (std::size_t i = 0; i < conditions.size(); ++i) {
        const Condition& each = conditions[i];
        const auto given = test.conditions.find(each.name);
        if (each.kind == Condition::Kind::class_number) {
            std::int64_t number = drawn_label(
                test.seed, 0, each.classes,
                each.name == "label" ? label_step : label_step - 1 - static_cast<std::uint32_t>(i));
            if (given != test.conditions.end()) {
                const double value = given->second.size() == 1 ? given->second[0] : -1;
                if (!(value >= 0 && value < 0x1p31)) throw Error("selftest.conditions has no class for " + each.name);
                number = static_cast<std::int64_t>(value);
            }
            model.set(each.name, number);
            continue;
        }
        std::vector<std::int64_t> shape = each.shape;
        std::size_t count = 1;
        for (auto& side : shape) {
            if (side < 0) side = 16;  // as cmfast.conditions.some_values
            count *= static_cast<std::size_t>(side);
        }
        std::vector<float> values(count);
        if (given == test.conditions.end()) {
            gaussian(test.seed, 0, label_step - 1 - static_cast<std::uint32_t>(i), count, values.data());
        } else {
            values.assign(given->second.begin(), given->second.end());
            if (values.size() != count) throw Error("selftest.conditions has too few or too many values of " + each.name);
        }
        model.set(each.name, values.data(), shape);
    }
    std::vector<float> sample(model.spec().size());
    model.sample(1, test.seed, sample.data());
    SelftestResult result;
    result.atol = test.atol;
    for (std::size_t i = 0; i < test.at.size(); ++i) {
        result.max_abs = std::max(result.max_abs, std::fabs(static_cast<double>(sample[test.at[i]]) - test.values[i]));
    }
    result.passed = result.max_abs <= result.atol;
    return result;
}

}  // namespace cmfast
