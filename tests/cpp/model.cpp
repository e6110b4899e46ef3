// SPDX-License-Identifier: MIT
// A model file on a backend, for the Python tests:
//
//   model BACKEND FILE sample STEPS N SEED FIRST [NAME=VALUES ..]      float32 [N, *shape]
//   model BACKEND FILE noise STEPS N [NAME=VALUES ..] < noise          the same from given noise
//   model BACKEND FILE denoise SIGMA SIGMA_NEXT N [NAME=VALUES ..] < x
//   model BACKEND FILE selftest                                        a line
//
// VALUES: numbers 1,2,3; of a tensor with sizes that vary 2x3:1,2,3,4,5,6; a class also by its name, +NAME
#include <cmfast/cmfast.hpp>
#if defined(WITH_OPENVINO)
#include <cmfast/openvino.hpp>
#else
#include <cmfast/onnxruntime.hpp>
#endif

#include <atomic>
#include <cstdlib>
#include <new>

#include "bytes.hpp"

namespace {

std::atomic<long> allocations{0};

/// Passes everything on, and does not count what the library behind it allocates.
class Uncounted final : public cmfast::Backend {
 public:
    explicit Uncounted(std::unique_ptr<cmfast::Backend> inner) : inner_(std::move(inner)) {}
    const cmfast::Manifest& manifest() const override { return inner_->manifest(); }
    const std::string& name() const override { return inner_->name(); }
    std::size_t batch() const override { return inner_->batch(); }
    void bind(std::vector<cmfast::Tensor>& inputs, cmfast::Tensor& output) override { inner_->bind(inputs, output); }
    void run() override {
        const long before = allocations;
        inner_->run();
        allocations = before;
    }

 private:
    std::unique_ptr<cmfast::Backend> inner_;
};

std::unique_ptr<cmfast::Backend> open(const std::string& device, const std::string& file) {
#if defined(WITH_OPENVINO)
    cmfast::openvino::Options options;
    options.device = device;
    options.threads = 1;
    return std::make_unique<cmfast::openvino::OpenVinoBackend>(file, options);
#else
    cmfast::onnxruntime::Options options;
    options.device = device;
    options.threads = 1;
    return std::make_unique<cmfast::onnxruntime::OnnxRuntimeBackend>(file, options);
#endif
}

template <class T>
std::vector<T> split(const std::string& text, char by) {
    std::vector<T> values;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, by);) values.push_back(static_cast<T>(std::stod(part)));
    return values;
}

void set(cmfast::Model& model, const std::string& argument) {
    const std::size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals), text = argument.substr(equals + 1);
    if (text[0] == '+') return model.set(name, std::string_view(text).substr(1));
    if (model.spec().condition(name).kind == cmfast::Condition::Kind::class_number) {
        const auto numbers = split<std::int64_t>(text, ',');
        return numbers.size() == 1 ? model.set(name, numbers[0]) : model.set(name, numbers.data(), numbers.size());
    }
    const std::size_t colon = text.find(':');
    const auto values = split<float>(colon == std::string::npos ? text : text.substr(colon + 1), ',');
    if (colon == std::string::npos) return model.set(name, values.data(), values.size());
    model.set(name, values.data(), split<std::int64_t>(text.substr(0, colon), 'x'));
}

int run(int count, char** a) {
    cmfast::Model model(std::make_unique<Uncounted>(open(a[1], a[2])));
    const std::string command = a[3];
    if (command == "selftest") {
        const auto result = cmfast::selftest(model);
        std::printf("%s %.3g %.3g\n", result.passed ? "passed" : "failed", result.max_abs, result.atol);
        return result.passed ? 0 : 1;
    }
    const int named = command == "sample" ? 8 : command == "noise" ? 6 : 7;
    for (int i = named; i < count; ++i) set(model, a[i]);
    const std::size_t n = std::stoull(command == "denoise" ? a[6] : a[5]);
    std::vector<float> out(n * model.spec().size());
    const auto draw = [&](const std::vector<float>& given) {
        if (command == "sample") model.sample(n, std::stoull(a[6]), out.data(), std::stoull(a[7]));
        if (command == "noise") model.from_noise(given.data(), n, out.data());
        if (command == "denoise") model.denoise(given.data(), std::stod(a[4]), n, out.data(), std::stod(a[5]));
    };
    if (command != "denoise") model.steps(std::stoi(a[4]));
    const auto given = command == "sample" ? std::vector<float>() : values_of<float>(all_input());
    draw(given);
    for (int i = named; i < count; ++i) set(model, a[i]);  // a loop that observes again and again
    const long before = allocations;
    draw(given);
    if (allocations != before) throw cmfast::CheckFailed("the second call allocated memory");
    write(out);
    return 0;
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
    try {
        return run(count, arguments);
    } catch (const cmfast::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
