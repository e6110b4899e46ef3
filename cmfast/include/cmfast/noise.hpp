// SPDX-License-Identifier: MIT
// Portable Gaussian noise: the same numbers, to the bit, as cmfast/noise.py, on every compiler and machine.
//
//   (seed, sample, step, index) --Philox4x32-10--> 32 random bits --> uniform --inverse CDF--> float
//
// The quantile uses + - * / and sqrt in double only, which IEEE 754 rounds correctly; `detail::rounded` keeps compilers
// from fusing a multiplication with an addition, whatever -march and -ffp-contract say.
//
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// Quantile: Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988), PPND16.
#pragma once

#include <array>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "errors.hpp"

#if defined(__FAST_MATH__) || defined(_M_FP_FAST) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "cmfast: compile without -ffast-math (/fp:fast): it changes the noise and hides NaN from the checks"
#endif

namespace cmfast {

static_assert(std::numeric_limits<double>::is_iec559 && std::numeric_limits<float>::is_iec559, "needs IEEE 754");
static_assert(FLT_EVAL_METHOD == 0, "double must be evaluated as double: on 32-bit x86 pass -msse2 -mfpmath=sse");

inline constexpr std::uint32_t label_step = 0xFFFFFFFFu;  // the stream of the labels; no sampler has that many steps
inline constexpr std::size_t max_values = std::size_t{1} << 34;  // of one sample: four to a block, 2**32 blocks

/// Philox4x32-10 of one counter.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c[2];
        c = {static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(product1),
             static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(product0)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return c;
}

namespace detail {

/// A product as IEEE 754 rounds it: opaque to the compiler, so that no addition is fused with it.
template <class Float>
inline Float rounded(Float product) {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__SSE2_MATH__))
    __asm__("" : "+x"(product));
    return product;
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
    __asm__("" : "+w"(product));
    return product;
#else
    volatile Float stored = product;
    return stored;
#endif
}

/// Horner's rule, lowest power first. The order of rounding is part of the noise's definition.
template <std::size_t N>
inline double polynomial(const std::array<double, N>& coefficients, double x) {
    double total = coefficients[N - 1];
    for (std::size_t i = N - 1; i-- > 0;) total = rounded(total * x) + coefficients[i];
    return total;
}

inline constexpr std::array<double, 8> centre_top = {
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
inline constexpr std::array<double, 8> centre_bottom = {
    1.0,                     4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3};
inline constexpr std::array<double, 8> tail_top = {
    1.42343711074968357734e0, 4.63033784615654529590e0,  5.76949722146069140550e0,  3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
inline constexpr std::array<double, 8> tail_bottom = {
    1.0,                      2.05319162663775882187e0,  1.67638483018380384940e0,  6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9};
// 2 atanh(s) = s (2 + 2/3 s^2 + 2/5 s^4 + ...)
inline constexpr std::array<double, 11> atanh_series = {2.0 / 1,  2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9, 2.0 / 11,
                                                        2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};

/// ln(x) for 0 < x < 1 in plain arithmetic: x = m 2^e, ln(m) = 2 atanh((m - 1) / (m + 1)).
inline double log_of_fraction(double x) {
    int exponent = 0;
    double m = std::frexp(x, &exponent);
    if (m < 0.70710678118654752) {
        m *= 2.0;
        exponent -= 1;
    }
    const double s = (m - 1.0) / (m + 1.0);
    const double series = rounded(s * polynomial(atanh_series, rounded(s * s)));
    return rounded(exponent * 0.693147180559945309417) + series;
}

}  // namespace detail

/// The normal quantile at (bits + 1/2) / 2**32.
inline double normal_quantile(std::uint32_t bits) {
    using namespace detail;
    const double q = bits * 0x1p-32 + 0x1p-33 - 0.5;  // exact: 33 bits
    if (!(std::fabs(q) > 0.425)) {
        const double r = 0.180625 - rounded(q * q);
        return rounded(q * (polynomial(centre_top, r) / polynomial(centre_bottom, r)));
    }
    // 0.5 - |q| is the smaller tail's probability, exact.
    const double r = std::sqrt(-log_of_fraction(0.5 - std::fabs(q))) - 1.6;
    const double quantile = polynomial(tail_top, r) / polynomial(tail_bottom, r);
    return q < 0 ? -quantile : quantile;
}

/// Write `count` unit Gaussian numbers: those of one sample at one step, in C order.
///
/// sample  index of the sample of this seed; step: which network call the noise is for, from 0
inline void gaussian(std::uint64_t seed, std::uint64_t sample, std::uint32_t step, std::size_t count, float* out) {
    if (count > max_values) throw Error(detail::text("a sample has at most 2**34 values, got ", count));
    const std::array<std::uint32_t, 2> key = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    for (std::size_t start = 0; start < count; start += 4) {
        const auto words = philox({static_cast<std::uint32_t>(start / 4), step, static_cast<std::uint32_t>(sample),
                                   static_cast<std::uint32_t>(sample >> 32)},
                                  key);
        const std::size_t some = count - start < 4 ? count - start : 4;
        for (std::size_t i = 0; i < some; ++i) out[start + i] = static_cast<float>(normal_quantile(words[i]));
    }
}

/// The class of a sample of this seed, uniform over 0 .. classes - 1: what Python draws where no label is given.
inline std::int64_t drawn_label(std::uint64_t seed, std::uint64_t sample, std::int64_t classes,
                                std::uint32_t step = label_step) {
    if (classes < 1 || classes > (std::int64_t{1} << 32)) {
        throw Error(detail::text("the number of classes must be from 1 to 2**32, got ", classes));
    }
    const auto words = philox({0, step, static_cast<std::uint32_t>(sample), static_cast<std::uint32_t>(sample >> 32)},
                              {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
    if (classes == std::int64_t{1} << 32) return words[0];
    return static_cast<std::int64_t>((std::uint64_t{words[0]} * static_cast<std::uint64_t>(classes)) >> 32);
}

}  // namespace cmfast
