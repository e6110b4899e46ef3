// SPDX-License-Identifier: MIT
// The readers of manifests, ONNX files, .ort files, OpenVINO's IR and plans on any bytes: they read, or throw
// cmfast::ArtifactError with one line.
//
// With clang++ -fsanitize=fuzzer it is a target of libFuzzer (benchmarks/fuzz_cpp.py). With -DINPUTS=20000 it is a program of its
// own: it mutates the files that are its arguments so many times, the same way in every run.
#include <cmfast/ir_head.hpp>
#include <cmfast/manifest.hpp>
#include <cmfast/noise.hpp>
#include <cmfast/plan.hpp>

#include <cstdio>
#include <cstdlib>

namespace {

template <class Read>
bool reads(Read&& read, std::string_view bytes) {
    try {
        read(bytes, "file");
        return true;
    } catch (const cmfast::ArtifactError& error) {
        const std::string_view words = error.what();
        if (words.substr(0, 6) != "file: " || words.size() > 2000 || words.find('\n') != std::string_view::npos) {
            std::fprintf(stderr, "not one line that names the file: %s\n", error.what());
            std::abort();
        }
        return false;
    }
}

bool either(std::string_view bytes) {
    const bool manifest = reads([](auto b, auto where) { cmfast::parse_manifest(b, where); }, bytes);
    const bool onnx = reads([](auto b, auto where) { cmfast::parse_onnx_manifest(b, where); }, bytes);
    const bool plan = reads([](auto b, auto where) { cmfast::parse_plan_manifest(b, where); }, bytes);
    const bool ort = reads([](auto b, auto where) { cmfast::parse_ort_manifest(b, where); }, bytes);
    const bool ir = reads([](auto b, auto where) { cmfast::parse_ir_manifest(b, "", where); }, bytes);
    return manifest || onnx || plan || ort || ir;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    either({reinterpret_cast<const char*>(data), size});
    return 0;
}

#if defined(INPUTS)
namespace {

struct Random {
    std::uint32_t count = 0;
    std::size_t below(std::size_t limit) {
        return cmfast::philox({count++, 0, 0, 0}, {1, 0})[0] % (limit ? limit : 1);
    }
};

void mutate(std::string& bytes, Random& random) {
    static const char* const words[] = {"1e999", "-1", "null", "[[[[", "{\"", "\\ud800", "\xff\xff\xff\xff\x0f", "9999999999"};
    for (std::size_t times = 1 + random.below(4); times-- > 0;) {
        const std::size_t at = random.below(bytes.size() + 1);
        const std::size_t some = std::min(random.below(16), bytes.size() - at);
        const std::string word = words[random.below(std::size(words))];
        switch (random.below(7)) {
            case 0: bytes.resize(at); break;
            case 1: bytes.erase(at, some); break;
            case 2: bytes.insert(at, bytes.substr(random.below(bytes.size() + 1), 40)); break;
            case 3: bytes.insert(at, word); break;
            case 4: bytes.replace(at, some, word); break;
            default:
                if (at < bytes.size()) bytes[at] = static_cast<char>(random.below(256));
        }
    }
}

}  // namespace

int main(int count, char** files) {
    Random random;
    int read = 0;
    for (int i = 0; i < INPUTS; ++i) {
        std::string bytes = cmfast::detail::read_file(files[1 + i % (count - 1)]);
        if (i < count - 1 && !either(bytes)) return std::fprintf(stderr, "%s is refused\n", files[1 + i]), 1;
        mutate(bytes, random);
        read += either(bytes);
    }
    std::printf("%d of %d are read\n", read, INPUTS);
    return 0;
}
#endif
