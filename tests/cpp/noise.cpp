// SPDX-License-Identifier: MIT
// The noise for the Python tests: each command reads standard input or arguments and writes bytes.
#include <cmfast/noise.hpp>

#include <string>
#include <vector>

#include "bytes.hpp"

namespace {

// noise SEED FIRST N STEP COUNT: float32 [N, COUNT]
void noise(char** a) {
    const std::uint64_t seed = std::stoull(a[0]), first = std::stoull(a[1]), n = std::stoull(a[2]);
    const std::size_t count = std::stoull(a[4]);
    std::vector<float> out(n * count);
    for (std::uint64_t i = 0; i < n; ++i) {
        cmfast::gaussian(seed, first + i, static_cast<std::uint32_t>(std::stoul(a[3])), count, out.data() + i * count);
    }
    write(out);
}

// labels SEED FIRST N CLASSES: int64 [N]
void labels(char** a) {
    std::vector<std::int64_t> out;
    for (std::uint64_t i = 0, n = std::stoull(a[2]); i < n; ++i) {
        out.push_back(cmfast::drawn_label(std::stoull(a[0]), std::stoull(a[1]) + i, std::stoll(a[3])));
    }
    write(out);
}

// quantile < uint32 [N]: float64 [N]
void quantile() {
    std::vector<double> out;
    for (const auto bits : values_of<std::uint32_t>(all_input())) out.push_back(cmfast::normal_quantile(bits));
    write(out);
}

// philox < uint32 [N, 6], counter and key: uint32 [N, 4]
void philox() {
    const auto in = values_of<std::uint32_t>(all_input());
    std::vector<std::uint32_t> out;
    for (std::size_t i = 0; i + 6 <= in.size(); i += 6) {
        for (const auto word : cmfast::philox({in[i], in[i + 1], in[i + 2], in[i + 3]}, {in[i + 4], in[i + 5]})) {
            out.push_back(word);
        }
    }
    write(out);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string command = count > 1 ? arguments[1] : "";
    char** rest = arguments + 2;
    if (command == "noise" && count == 7) noise(rest);
    else if (command == "labels" && count == 6) labels(rest);
    else if (command == "quantile") quantile();
    else if (command == "philox") philox();
    else return 64;
    return 0;
}
