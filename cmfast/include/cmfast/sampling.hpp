// SPDX-License-Identifier: MIT
// Few-step sampling over any denoiser: Algorithm 1 of "Consistency Models" (arXiv:2303.01469), as cmfast/sampling.py.
//
//   cmfast::Spec spec;
//   spec.shape = {1, 8, 8};
//   cmfast::Sampler sampler(spec, spec.sigmas_for(2));                // buffers for one sample at a time
//   sampler.sample(denoise, /*seed*/ 0, /*first*/ 0, image);      // image: spec.size() floats, data units
//
// You bring   denoise  void(const float* x, float sigma, float* x0), for batch * spec.size() values; of a flow map
//                      (spec.second_time) void(const float* x, float sigma, float sigma_next, float* x0)
// Memory      allocated by the constructor; none later
// Errors      cmfast::Error, and what the denoiser throws
// Threads     one Sampler per thread
// Python      computes the same: noise equal to the bit, float32 operations in the same order
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "noise.hpp"
#include "spec.hpp"

namespace cmfast {

/// How much fresh noise lifts x0 to noise level sigma: x0 already carries sigma_min, unless "plain".
inline double renoise_std(double sigma, const Spec& spec) {
    if (spec.renoise != "sqrt") return sigma;
    return std::sqrt(detail::rounded(sigma * sigma) - detail::rounded(spec.sigma_min * spec.sigma_min));
}

namespace detail {

inline void check_finite(const float* values, std::size_t count, double sigma, const std::string& who) {
    for (std::size_t i = 0; i < count; ++i) {
        if (std::isfinite(values[i])) continue;
        throw CheckFailed(text(who, " returned values that are not finite (NaN or infinity) at noise level ", sigma,
                               "; the weights are damaged, or the precision is too low: try it in fp32"));
    }
}

}  // namespace detail

inline constexpr std::size_t max_batch = 65'536;  // samples that one call computes

/// The few-step loop for batches of one size.
class Sampler {
 public:
    /// sigmas: noise levels, data units, decreasing. batch: samples that the denoiser computes in one call.
    Sampler(Spec spec, std::vector<double> sigmas, std::size_t batch = 1)
        : spec_(std::move(spec)), sigmas_(std::move(sigmas)) {
        check_sigmas(sigmas_, spec_.sigma_min, spec_.sigma_max);
        if (batch < 1 || batch > max_batch) throw Error(detail::text("batch must be from 1 to ", max_batch, ", got ", batch));
        count_ = batch * spec_.size();
        x_.resize(count_);
        z_.resize(count_);
    }

    /// Draw the samples first, first + 1, .. of a seed; x0 is [batch, *shape], data units.
    template <class Denoise>
    void sample(Denoise&& denoise, std::uint64_t seed, std::uint64_t first, float* x0) {
        const std::size_t size = spec_.size();
        draw(denoise, x0, [&](std::size_t step, float* z) {
            for (std::size_t i = 0; i < count_ / size; ++i) {
                gaussian(seed, first + i, static_cast<std::uint32_t>(step), size, z + i * size);
            }
        });
    }

    /// The same from unit noise [steps, batch, *shape]; "ddim" uses the first slice only.
    template <class Denoise>
    void from_noise(Denoise&& denoise, const float* noise, float* x0) {
        draw(denoise, x0, [&](std::size_t step, float* z) { std::copy_n(noise + step * count_, count_, z); });
    }

    /// The same, with void noise(std::size_t step, float* z), which writes a slice [batch, *shape] of unit noise.
    template <class Denoise, class Noise>
    void draw(Denoise&& denoise, float* x0, Noise&& noise) {
        using detail::rounded;
        const bool same_noise = spec_.renoise == "ddim";  // less of it: DDIM, and how flow maps go on
        float *x = x_.data(), *z = z_.data();
        for (std::size_t step = 0; step < sigmas_.size(); ++step) {
            const double sigma = sigmas_[step];
            if (step == 0 || !same_noise) noise(step, z);
            if (step == 0) {
                const auto scale = static_cast<float>(sigma);
                for (std::size_t i = 0; i < count_; ++i) x[i] = scale * z[i];
            } else if (same_noise) {
                const auto ratio = static_cast<float>(sigma / sigmas_[step - 1]);
                for (std::size_t i = 0; i < count_; ++i) x[i] = x0[i] + rounded(ratio * (x[i] - x0[i]));
            } else {
                const auto scale = static_cast<float>(renoise_std(sigma, spec_));
                for (std::size_t i = 0; i < count_; ++i) x[i] = x0[i] + rounded(scale * z[i]);
            }
            const double next = same_noise && step + 1 < sigmas_.size() ? sigmas_[step + 1] : 0.0;
            call(denoise, x, static_cast<float>(sigma), static_cast<float>(next), x0);
            finish(x0, sigma);
        }
    }

 private:
    template <class Denoise>
    void call(Denoise& denoise, const float* x, float sigma, float sigma_next, float* x0) {
        constexpr bool takes_next = std::is_invocable_v<Denoise&, const float*, float, float, float*>;
        constexpr bool takes_one = std::is_invocable_v<Denoise&, const float*, float, float*>;
        static_assert(takes_next || takes_one, "denoise is void(const float* x, float sigma, float* x0)");
        if constexpr (takes_next) {
            if (spec_.second_time || !takes_one) return static_cast<void>(denoise(x, sigma, sigma_next, x0));
        }
        if constexpr (takes_one) {
            if (spec_.second_time) {
                throw Error("a flow map takes two noise levels: pass a denoiser (x, sigma, sigma_next, x0)");
            }
            denoise(x, sigma, x0);
        }
    }

    /// Clip to [-1, 1] where the spec says so. NaN and infinity are errors: clipping would turn infinity into white.
    void finish(float* x0, double sigma) const {
        detail::check_finite(x0, count_, sigma, "the denoiser");
        if (!spec_.clip) return;
        for (std::size_t i = 0; i < count_; ++i) x0[i] = x0[i] < -1.0f ? -1.0f : x0[i] > 1.0f ? 1.0f : x0[i];
    }

    Spec spec_;
    std::vector<double> sigmas_;
    std::size_t count_ = 0;
    std::vector<float> x_, z_;
};

/// Images [n, C, H, W] in [-1, 1] as bytes [n, H, W, C]: rounded to nearest, halves to even, clipped.
inline void to_uint8(const float* x0, std::size_t n, const Spec& spec, std::uint8_t* out) {
    if (spec.data != "image" || spec.shape.size() != 3) {
        throw Error("this needs a model of images; this one draws arrays of " + detail::listed(spec.shape));
    }
    const auto channels = static_cast<std::size_t>(spec.shape[0]);
    const std::size_t pixels = spec.size() / channels;
    for (std::size_t image = 0; image < n; ++image, x0 += spec.size()) {
        for (std::size_t pixel = 0; pixel < pixels; ++pixel) {
            for (std::size_t channel = 0; channel < channels; ++channel) {
                const float value = (x0[channel * pixels + pixel] + 1.0f) * 127.5f;
                const float inside = !(value > 0.0f) ? 0.0f : value > 255.0f ? 255.0f : value;
                *out++ = static_cast<std::uint8_t>(std::nearbyint(inside));
            }
        }
    }
}

}  // namespace cmfast
