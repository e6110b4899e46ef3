// SPDX-License-Identifier: MIT
// SHA-256, for files that carry a digest of themselves: cmfast/plan.hpp, cmfast/ort_head.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace cmfast {

namespace detail {

/// SHA-256 (FIPS 180-4) of bytes that come in parts.
class Sha256 {
 public:
    void update(std::string_view bytes) {
        length_ += bytes.size();
        for (const char byte : bytes) {
            block_[used_++] = static_cast<unsigned char>(byte);
            if (used_ == block_.size()) compress();
        }
    }

    /// The digest as hex digits.
    std::string hex() {
        const std::uint64_t bits = 8 * length_;
        update(std::string_view("\x80", 1));
        while (used_ != 56) update(std::string_view("\0", 1));
        for (int shift = 56; shift >= 0; shift -= 8) block_[used_++] = static_cast<unsigned char>(bits >> shift);
        compress();
        std::string out;
        for (const std::uint32_t word : state_) {
            for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[word >> shift & 15];
        }
        return out;
    }

 private:
    static std::uint32_t turn(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

    /// The first 32 bits of the fractional part of a root of the n-th prime: 2 square, 3 cube.
    static std::array<std::uint32_t, 64> constants() {
        std::array<std::uint32_t, 64> out{};
        std::size_t found = 0;
        for (std::uint64_t n = 2; found < out.size(); ++n) {
            bool prime = true;
            for (std::uint64_t d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
            if (!prime) continue;
            std::uint64_t low = 0, high = std::uint64_t{8} << 32;  // the cube root of n in units of 2**-32, by halving
            while (high - low > 1) {
                const std::uint64_t middle = (low + high) / 2;
                (cube_is_at_most(middle, n) ? low : high) = middle;
            }
            out[found++] = static_cast<std::uint32_t>(low);
        }
        return out;
    }

    /// Whether (x / 2**32)**3 <= n, exactly: x**3 <= n 2**96, in limbs of 32 bits.
    static bool cube_is_at_most(std::uint64_t x, std::uint64_t n) {
        const std::uint64_t low = x & 0xFFFFFFFFu, high = x >> 32;  // high < 8
        // x**2 = a 2**64 + b 2**32 + c
        const std::uint64_t c2 = low * low, b2 = 2 * low * high + (c2 >> 32), a2 = high * high + (b2 >> 32);
        const std::uint64_t c = c2 & 0xFFFFFFFFu, b = b2 & 0xFFFFFFFFu;
        const std::uint64_t p0 = c * low;
        const std::uint64_t p1 = b * low + c * high + (p0 >> 32);
        const std::uint64_t p2 = a2 * low + b * high + (p1 >> 32);
        const std::uint64_t p3 = a2 * high + (p2 >> 32);
        const bool rest = (p0 & 0xFFFFFFFFu) || (p1 & 0xFFFFFFFFu) || (p2 & 0xFFFFFFFFu);
        return p3 < n || (p3 == n && !rest);
    }

    void compress() {
        static const std::array<std::uint32_t, 64> k = constants();
        std::array<std::uint32_t, 64> w{};
        for (std::size_t i = 0; i < 16; ++i) {
            for (std::size_t j = 0; j < 4; ++j) w[i] = w[i] << 8 | block_[4 * i + j];
        }
        for (std::size_t i = 16; i < 64; ++i) {
            const std::uint32_t s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
            const std::uint32_t s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state_;
        for (std::size_t i = 0; i < 64; ++i) {
            const std::uint32_t one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
            const std::uint32_t two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + one;
            d = c;
            c = b;
            b = a;
            a = one + two;
        }
        const std::array<std::uint32_t, 8> added = {a, b, c, d, e, f, g, h};
        for (std::size_t i = 0; i < 8; ++i) state_[i] += added[i];
        used_ = 0;
    }

    std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> block_{};
    std::size_t used_ = 0;
    std::uint64_t length_ = 0;
};

}  // namespace detail

}  // namespace cmfast
