// SPDX-License-Identifier: MIT
// A model on a backend: samples from seeds, or the raw denoiser. As cmfast.Model in Python.
//
//   cmfast::Model model = cmfast::onnxruntime::load("model.onnx");     // or cmfast::openvino::load
//   model.steps(2);
//   model.set("label", 3);                                             // else drawn from the seed, as in Python
//   std::vector<float> images(16 * model.spec().size());
//   model.sample(16, /*seed*/ 0, images.data());                       // float32 [16, *shape]
//
// Memory      the caller's output, and buffers that the first call of a batch size makes; later calls allocate nothing
// Threads     one Model per thread
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "noise.hpp"
#include "sampling.hpp"
#include "spec.hpp"

namespace cmfast {

/// A few-step model on a backend.
class Model {
 public:
    explicit Model(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {
        given_.resize(spec().conditions.size());
        sigmas_ = spec().sigmas_for();
    }

    const Manifest& manifest() const { return backend_->manifest(); }
    const Spec& spec() const { return backend_->manifest().spec; }
    const std::string& name() const { return backend_->name(); }

    /// Noise levels of the next calls: the model's default ones for so many network calls; 0: for the fewest.
    void steps(int steps) { sigmas(spec().sigmas_for(steps)); }

    /// Noise levels of the next calls, data units, decreasing.
    void sigmas(std::vector<double> sigmas) {
        if (manifest().kind != Manifest::Kind::denoiser && sigmas != spec().sigmas_for()) {
            throw Error(detail::text("this file is a sampler of ", spec().sigmas_for().size(), " step(s), at ",
                                     detail::listed(spec().sigmas_for(), "", ""), ", and runs no others; a denoiser runs "
                                     "any: cmfast-export model.pt --kind denoiser"));
        }
        if (sigmas == sigmas_) return;
        sigmas_ = spec().sigmas_for(sigmas);
        bound_ = 0;
    }
    const std::vector<double>& sigmas() const { return sigmas_; }

    /// Samples at a time, at most; changes memory and speed, not the samples.
    void batch(std::size_t samples) {
        if (samples < 1 || samples > max_batch) {
            throw Error(detail::text("batch must be from 1 to ", max_batch, ", got ", samples));
        }
        batch_ = samples;
    }

    /// The class of all samples, by number, until it is set again.
    void set(std::string_view condition, std::int64_t number) { set(condition, &number, 1); }

    /// The class of all samples, by name.
    void set(std::string_view condition, std::string_view class_name) {
        const Condition& wanted = spec().conditions[index(condition, Condition::Kind::class_number)];
        const auto& names = wanted.class_names;
        const auto found = std::find(names.begin(), names.end(), class_name);
        if (found == names.end()) {
            throw Error(detail::text(wanted.name, " ", detail::in_quotes(std::string(class_name)), " is not a class of this "
                                     "model; it has ", names.empty() ? "numbers only" : detail::listed(names, "", "")));
        }
        set(condition, std::int64_t{found - names.begin()});
    }

    /// Classes: one for all samples, or one each.
    void set(std::string_view condition, const std::int64_t* numbers, std::size_t count) {
        const std::size_t at = index(condition, Condition::Kind::class_number);
        const Condition& wanted = spec().conditions[at];
        for (std::size_t i = 0; i < count; ++i) {
            if (numbers[i] < 0 || numbers[i] >= wanted.entries()) {
                throw Error(detail::text(wanted.name, " ", numbers[i], " is out of range; this model has the classes 0 "
                                         "to ", wanted.entries() - 1));
            }
        }
        given_[at].value.numbers.assign(numbers, numbers + count);
        given_[at].samples = count;
    }

    /// A tensor of a fixed shape: `count` values, [*shape] for all samples or [n, *shape].
    void set(std::string_view condition, const float* values, std::size_t count) {
        const std::size_t at = index(condition, Condition::Kind::tensor);
        const Condition& wanted = spec().conditions[at];
        std::size_t size = 1;
        for (const auto side : wanted.shape) {
            if (side < 0) throw Error(detail::text("condition ", wanted.name, " has a size that varies: pass its shape"));
            size *= static_cast<std::size_t>(side);
        }
        if (count == 0 || count % size != 0) {
            throw Error(detail::text("condition ", wanted.name, " must be ", wanted.in_words(), ", so ", size,
                                     " values for each sample; got ", count));
        }
        keep(given_[at], wanted, values, count, size);
        given_[at].value.shape = wanted.shape;
    }

    /// A tensor of this shape: [*shape] for all samples or [n, *shape].
    void set(std::string_view condition, const float* values, const std::vector<std::int64_t>& shape) {
        const std::size_t at = index(condition, Condition::Kind::tensor);
        const Condition& wanted = spec().conditions[at];
        const std::size_t rank = wanted.shape.size();
        const std::size_t skip = shape.size() == rank + 1 ? 1 : 0;
        bool fits = shape.size() == rank + skip && (skip == 0 || shape[0] > 0);
        std::size_t size = 1;
        for (std::size_t i = 0; fits && i < rank; ++i) {
            const std::int64_t side = shape[skip + i];
            fits = side > 0 && (wanted.shape[i] < 0 || wanted.shape[i] == side);
            if (fits) size *= static_cast<std::size_t>(side);
        }
        if (!fits) {
            throw Error(detail::text("condition ", wanted.name, " must be ", wanted.in_words(), " or one of it for all "
                                     "samples; got ", detail::listed(shape)));
        }
        keep(given_[at], wanted, values, size * (skip ? static_cast<std::size_t>(shape[0]) : 1), size);
        std::vector<std::int64_t>& known = given_[at].value.shape;
        if (!std::equal(known.begin(), known.end(), shape.begin() + static_cast<std::ptrdiff_t>(skip), shape.end())) {
            known.assign(shape.begin() + static_cast<std::ptrdiff_t>(skip), shape.end());
            bound_ = 0;
        }
    }

    /// Forget a condition; a label is then drawn from the seed again.
    void unset(std::string_view condition) {
        for (std::size_t i = 0; i < given_.size(); ++i) {
            if (spec().conditions[i].name == condition) given_[i].samples = 0;
        }
    }

    /// Draw n samples of a seed, from index `first` on; out: float32 [n, *shape], data units.
    void sample(std::size_t n, std::uint64_t seed, float* out, std::uint64_t first = 0) {
        const std::size_t size = spec().size();
        in_batches(n, [&](std::size_t start, std::size_t some) {
            fill_conditions(start, n, &seed, first);
            draw(some, out + start * size, [&](std::size_t step, std::size_t i, float* z) {
                gaussian(seed, first + start + i, static_cast<std::uint32_t>(step), size, z);
            });
        });
    }

    /// Samples from unit noise [steps, n, *shape]; out: float32 [n, *shape].
    void from_noise(const float* noise, std::size_t n, float* out) {
        const std::size_t size = spec().size();
        in_batches(n, [&](std::size_t start, std::size_t some) {
            fill_conditions(start, n, nullptr, 0);
            draw(some, out + start * size, [&](std::size_t step, std::size_t i, float* z) {
                std::copy_n(noise + (step * n + start + i) * size, size, z);
            });
        });
    }

    /// f(x, sigma), not clipped: the raw contract. x and out: float32 [n, *shape]; sigma_next: of a flow map.
    void denoise(const float* x, double sigma, std::size_t n, float* out, double sigma_next = 0.0) {
        if (manifest().kind != Manifest::Kind::denoiser) {
            throw Error("a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser");
        }
        const double most = std::sqrt(2.0) * spec().sigma_max;  // where Heun's churn goes
        if (!(sigma >= static_cast<double>(FLT_MIN) && sigma <= most * (1 + 1e-6))) {
            throw Error(detail::text("noise level ", sigma, " cannot be denoised: this model was trained for ",
                                     spec().sigma_min, " to ", spec().sigma_max, ", and denoise takes 0 < sigma <= ", most));
        }
        if (!(sigma_next >= 0 && sigma_next <= sigma)) {
            throw Error(detail::text("sigma_next must be from 0 to sigma, got ", sigma_next));
        }
        const std::size_t size = spec().size();
        in_batches(n, [&](std::size_t start, std::size_t some) {
            fill_conditions(start, n, nullptr, 0);
            call(x + start * size, some, static_cast<float>(sigma), static_cast<float>(sigma_next));
            detail::check_finite(output_.floats.data(), some * size, sigma, name());
            std::copy_n(output_.floats.data(), some * size, out + start * size);
        });
    }

 private:
    struct Given {
        Tensor value;             // shape: of one sample
        std::size_t samples = 0;  // 0: not set, 1: for all, n: one each
    };

    std::size_t index(std::string_view name, Condition::Kind kind) const {
        const auto& conditions = spec().conditions;
        for (std::size_t i = 0; i < conditions.size(); ++i) {
            if (conditions[i].name != name) continue;
            if (conditions[i].kind == kind) return i;
            throw Error(detail::text("condition ", name, " is ", conditions[i].in_words()));
        }
        spec().condition(std::string(name));  // throws
        return 0;
    }

    static void keep(Given& given, const Condition& wanted, const float* values, std::size_t count, std::size_t size) {
        for (std::size_t i = 0; i < count; ++i) {
            if (!std::isfinite(values[i])) {
                throw Error(detail::text("condition ", wanted.name, " has values that are not finite (NaN or infinity)"));
            }
        }
        given.value.floats.assign(values, values + count);
        given.samples = count / size;
    }

    /// Call body(start, some) for each batch, with buffers bound for it.
    template <class Body>
    void in_batches(std::size_t n, Body&& body) {
        if (n > std::numeric_limits<std::size_t>::max() / sizeof(float) / spec().size()) {
            throw Error(detail::text(n, " samples are more than memory has addresses for"));
        }
        const std::size_t fixed = backend_->batch();
        const std::size_t most = fixed ? fixed : std::min(batch_, backend_->most());
        for (std::size_t start = 0; start < n; start += most) {
            const std::size_t some = std::min(most, n - start);
            bind(fixed ? fixed : some);
            body(start, some);
        }
    }

    void bind(std::size_t batch) {
        if (bound_ == batch) return;
        bound_ = 0;
        const Spec& model = spec();
        const auto b = static_cast<std::int64_t>(batch);
        const auto steps = static_cast<std::int64_t>(sigmas_.size());
        const bool denoiser = manifest().kind == Manifest::Kind::denoiser, server = manifest().kind == Manifest::Kind::server;
        const std::size_t before = denoiser ? model.second_time ? 3 : 2 : 1;
        inputs_.resize(before + model.conditions.size());
        const auto input = [&](std::size_t at, const std::string& name, std::vector<std::int64_t> shape, bool number) {
            inputs_[at].name = name;
            inputs_[at].shape = std::move(shape);
            inputs_[at].is_number = number;
            inputs_[at].resize();
        };
        std::vector<std::int64_t> first = denoiser ? std::vector<std::int64_t>{b}
                                          : server ? std::vector<std::int64_t>{b, steps}
                                                   : std::vector<std::int64_t>{steps, b};
        first.insert(first.end(), model.shape.begin(), model.shape.end());
        input(0, denoiser ? "x" : "noise", std::move(first), false);
        if (denoiser) input(1, "sigma", {b}, false);
        if (before == 3) input(2, "sigma_next", {b}, false);
        for (std::size_t i = 0; i < model.conditions.size(); ++i) {
            const Condition& each = model.conditions[i];
            const bool number = each.kind == Condition::Kind::class_number;
            if (!number) need(i);
            std::vector<std::int64_t> shape = {b};
            if (number && server) shape.push_back(1);
            if (!number) shape.insert(shape.end(), given_[i].value.shape.begin(), given_[i].value.shape.end());
            input(before + i, each.name, std::move(shape), number);
        }
        check_sides();
        output_.name = manifest().output();
        output_.shape = {b};
        output_.shape.insert(output_.shape.end(), model.shape.begin(), model.shape.end());
        output_.resize();
        if (denoiser) sampler_.emplace(model, sigmas_, batch);
        backend_->bind(inputs_, output_);
        bound_ = batch;
    }

    [[noreturn]] void missing(const Condition& condition) const {
        throw Error(detail::text("this model needs the condition ", condition.name, ": ", condition.in_words()));
    }

    void need(std::size_t i) const {
        if (given_[i].samples == 0) missing(spec().conditions[i]);
    }

    /// Axes of the same name have the same size.
    void check_sides() const {
        const auto& all = spec().conditions;
        for (std::size_t a = 0; a < all.size(); ++a) {
            for (std::size_t b = 0; b <= a; ++b) {
                for (std::size_t i = 0; i < all[a].sides.size(); ++i) {
                    for (std::size_t j = 0; j < all[b].sides.size(); ++j) {
                        const auto one = given_[a].value.shape[i], other = given_[b].value.shape[j];
                        if (all[a].sides[i].empty() || all[a].sides[i] != all[b].sides[j] || one == other) continue;
                        throw Error(detail::text("condition ", all[a].name, " has ", all[a].sides[i], " = ", one, ", and ",
                                                 all[b].name, " has ", other, "; the two must be the same"));
                    }
                }
            }
        }
    }

    /// Write the conditions of the samples from `start` on, of n; where the batch is larger, the last one again.
    void fill_conditions(std::size_t start, std::size_t n, const std::uint64_t* seed, std::uint64_t first) {
        const auto& conditions = spec().conditions;
        const std::size_t before = inputs_.size() - conditions.size();
        for (std::size_t c = 0; c < conditions.size(); ++c) {
            const Given& given = given_[c];
            const bool drawn = given.samples == 0 && seed && conditions[c].name == "label";
            if (!drawn) need(c);
            if (given.samples > 1 && given.samples != n) {
                throw Error(detail::text("condition ", conditions[c].name, " was set for ", given.samples,
                                         " samples, and ", n, " are drawn; set one for all or ", n));
            }
            Tensor& tensor = inputs_[before + c];
            const std::size_t size = tensor.is_number ? 1 : tensor.floats.size() / bound_;
            for (std::size_t i = 0; i < bound_; ++i) {
                const std::size_t sample = std::min(start + i, n - 1), from = given.samples == 1 ? 0 : sample;
                if (drawn) {
                    tensor.numbers[i] = drawn_label(*seed, first + sample, conditions[c].classes);
                } else if (tensor.is_number) {
                    tensor.numbers[i] = given.value.numbers[from];
                } else {
                    std::copy_n(given.value.floats.data() + from * size, size, tensor.floats.data() + i * size);
                }
            }
        }
    }

    /// Run the whole loop on a bound batch; noise(step, i, z) writes the unit noise of its i-th sample.
    template <class Noise>
    void draw(std::size_t some, float* out, Noise&& noise) {
        const std::size_t size = spec().size();
        if (manifest().kind == Manifest::Kind::denoiser) {
            float* x0 = bound_ == some ? out : scratch();
            sampler_->draw(
                [&](const float* x, float sigma, float sigma_next, float* to) {
                    call(x, bound_, sigma, sigma_next);
                    std::copy_n(output_.floats.data(), bound_ * size, to);
                },
                x0, [&](std::size_t step, float* z) {
                    for (std::size_t i = 0; i < bound_; ++i) noise(step, std::min(i, some - 1), z + i * size);
                });
            if (x0 != out) std::copy_n(x0, some * size, out);
            return;
        }
        const bool server = manifest().kind == Manifest::Kind::server;
        const std::size_t steps = sigmas_.size();
        for (std::size_t step = 0; step < steps; ++step) {
            for (std::size_t i = 0; i < bound_; ++i) {
                const std::size_t slot = server ? i * steps + step : step * bound_ + i;
                noise(step, std::min(i, some - 1), inputs_[0].floats.data() + slot * size);
            }
        }
        backend_->run();
        detail::check_finite(output_.floats.data(), some * size, sigmas_.front(), name());
        std::copy_n(output_.floats.data(), some * size, out);
    }

    /// Run the graph of a denoiser on x [some, *shape].
    void call(const float* x, std::size_t some, float sigma, float sigma_next) {
        const std::size_t size = spec().size();
        for (std::size_t i = 0; i < bound_; ++i) {
            std::copy_n(x + std::min(i, some - 1) * size, size, inputs_[0].floats.data() + i * size);
        }
        std::fill(inputs_[1].floats.begin(), inputs_[1].floats.end(), sigma);
        if (spec().second_time) std::fill(inputs_[2].floats.begin(), inputs_[2].floats.end(), sigma_next);
        backend_->run();
    }

    /// Room for a whole batch of a file with a fixed batch, where fewer samples are wanted.
    float* scratch() {
        scratch_.resize(bound_ * spec().size());
        return scratch_.data();
    }

    std::unique_ptr<Backend> backend_;
    std::vector<double> sigmas_;
    std::vector<Given> given_;
    std::size_t batch_ = 64;
    std::size_t bound_ = 0;  // the batch size that the buffers are bound for; 0: none
    std::vector<Tensor> inputs_;
    Tensor output_;
    std::optional<Sampler> sampler_;
    std::vector<float> scratch_;
};

}  // namespace cmfast
