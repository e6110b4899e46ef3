// SPDX-License-Identifier: MIT
// What the Python tests call: each command reads standard input or arguments and writes bytes or lines.
#include <cmfast/cmfast.hpp>
#include <cmfast/plan.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "bytes.hpp"

namespace {

std::atomic<long> allocations{0};

std::vector<double> levels_of(const std::string& text) {
    std::vector<double> levels;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t comma = std::min(text.find(',', at), text.size());
        levels.push_back(std::stod(text.substr(at, comma - at)));
        at = comma + 1;
    }
    return levels;
}

std::string described(const cmfast::Manifest& m) {
    std::string out = cmfast::detail::listed(m.spec.shape) + " " + m.spec.data + " " + m.output() + " " + m.spec.renoise;
    out += cmfast::detail::text(" ", m.spec.sigma_min, " ", m.spec.sigma_max, " ", m.spec.clip, m.spec.second_time);
    for (const auto& [steps, levels] : m.spec.sigmas) out += cmfast::detail::text(" ", steps, cmfast::detail::listed(levels));
    for (const auto& each : m.spec.conditions) {
        out += " " + each.name + ": " + each.in_words();
        if (each.null) out += cmfast::detail::text(" (null ", *each.null, ", ", each.entries(), " entries)");
    }
    return out;
}

// manifests, heads, orts, irs and plans < (uint32 length, bytes)*: a line each, "ok ..." or "no ..."
template <class Read>
void each_of(Read&& read) {
    const std::string in = all_input();
    for (std::size_t at = 0; at + 4 <= in.size();) {
        std::uint32_t length = 0;
        std::memcpy(&length, in.data() + at, 4);
        const std::string one = in.substr(at + 4, length);
        at += 4 + length;
        try {
            const std::string found = described(read(one));
            std::cout << "ok " << found << "\n";
        } catch (const cmfast::ArtifactError& error) {
            std::cout << "no " << error.what() << "\n";
        }
    }
}

// sample MANIFEST LEVELS SEED FIRST BATCH [< noise]: with the denoiser x / (1 + sigma), of a flow map minus sigma_next / 8
void sample(int n, char** a) {
    const cmfast::Manifest manifest = cmfast::parse_manifest(a[0], "argument");
    const std::size_t batch = std::stoull(a[4]);
    cmfast::Sampler sampler(manifest.spec, levels_of(a[1]), batch);
    std::vector<float> out(batch * manifest.spec.size());
    const std::size_t count = out.size();
    const auto once = [count](const float* x, float sigma, float* x0) {
        for (std::size_t i = 0; i < count; ++i) x0[i] = x[i] / (1.0f + sigma);
    };
    const auto flow_map = [count](const float* x, float sigma, float next, float* x0) {
        for (std::size_t i = 0; i < count; ++i) x0[i] = x[i] / (1.0f + sigma) - next / 8.0f;
    };
    const auto run = [&](const auto& denoise) {
        if (n > 5) {
            const auto z = values_of<float>(all_input());
            sampler.from_noise(denoise, z.data(), out.data());
        } else {
            sampler.sample(denoise, std::stoull(a[2]), std::stoull(a[3]), out.data());
            const long before = allocations;
            sampler.sample(denoise, std::stoull(a[2]), std::stoull(a[3]), out.data());
            if (allocations != before) throw cmfast::CheckFailed("the sampler allocated memory at its second call");
        }
    };
    manifest.spec.second_time ? run(flow_map) : run(once);
    write(out);
}

// pixels MANIFEST < float32 [n, C, H, W]: uint8 [n, H, W, C]
void pixels(char** a) {
    const cmfast::Manifest manifest = cmfast::parse_manifest(a[0], "argument");
    const auto in = values_of<float>(all_input());
    std::vector<std::uint8_t> out(in.size());
    cmfast::to_uint8(in.data(), in.size() / manifest.spec.size(), manifest.spec, out.data());
    write(out);
}

}  // namespace

// Not inlined: GCC would take free for the wrong partner of new.
__attribute__((noinline)) void* operator new(std::size_t size) {
    ++allocations;
    if (void* memory = std::malloc(size ? size : 1)) return memory;
    throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main(int count, char** arguments) {
    const std::string command = count > 1 ? arguments[1] : "";
    char** rest = arguments + 2;
    try {
        if (command == "manifests") each_of([](const auto& b) { return cmfast::parse_manifest(b, "given"); });
        else if (command == "heads") each_of([](const auto& b) { return cmfast::parse_onnx_manifest(b, "given"); });
        else if (command == "orts") each_of([](const auto& b) { return cmfast::parse_ort_manifest(b, "given"); });
        else if (command == "irs") each_of([](const auto& b) { return cmfast::parse_ir_manifest(b, "", "given"); });
        else if (command == "plans") each_of([](const auto& b) { return cmfast::parse_plan_manifest(b, "given"); });
        else if (command == "file" && count == 3) std::cout << described(cmfast::read_manifest(rest[0])) << "\n";
        else if (command == "sample" && count >= 7) sample(count - 2, rest);
        else if (command == "pixels" && count == 3) pixels(rest);
        else return std::fputs("what?\n", stderr), 64;
    } catch (const cmfast::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
    return 0;
}
