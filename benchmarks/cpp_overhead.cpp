// SPDX-License-Identifier: MIT
// How much of a call of cmfast::Model is the backend's own: overhead FILE STEPS CALLS. Writes ms a call as JSON.
#include <cmfast/cmfast.hpp>
#include <cmfast/onnxruntime.hpp>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) {
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

/// Adds up the time that the library takes.
class Timed final : public cmfast::Backend {
 public:
    Timed(std::unique_ptr<cmfast::Backend> inner, double& total_ms) : inner_(std::move(inner)), total_ms_(total_ms) {}
    const cmfast::Manifest& manifest() const override { return inner_->manifest(); }
    const std::string& name() const override { return inner_->name(); }
    std::size_t batch() const override { return inner_->batch(); }
    void bind(std::vector<cmfast::Tensor>& inputs, cmfast::Tensor& output) override { inner_->bind(inputs, output); }
    void run() override {
        const auto begin = Clock::now();
        inner_->run();
        total_ms_ += ms_since(begin);
    }

 private:
    std::unique_ptr<cmfast::Backend> inner_;
    double& total_ms_;
};

}  // namespace

int main(int count, char** arguments) try {
    if (count < 4) throw cmfast::Error("overhead FILE STEPS CALLS");
    double library_ms = 0;
    cmfast::onnxruntime::Options options;
    options.threads = 1;
    auto backend = std::make_unique<cmfast::onnxruntime::OnnxRuntimeBackend>(arguments[1], options);
    cmfast::Model model(std::make_unique<Timed>(std::move(backend), library_ms));
    model.steps(std::atoi(arguments[2]));
    std::vector<float> out(model.spec().size());
    for (int i = 0; i < 3; ++i) model.sample(1, 0, out.data());
    std::printf("[");
    for (int call = 0; call < std::atoi(arguments[3]); ++call) {
        library_ms = 0;
        const auto begin = Clock::now();
        model.sample(1, static_cast<std::uint64_t>(call), out.data());
        const double all_ms = ms_since(begin);
        std::printf("%s[%.6f, %.6f]", call ? ", " : "", all_ms, library_ms);
    }
    std::printf("]\n");
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
