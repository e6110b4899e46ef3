// SPDX-License-Identifier: MIT
// A robot's loop at a fixed rate: policy model.onnx [RATE_HZ [STEPS_OF_THE_LOOP]]. Each step observes, draws a sequence
// of actions, and acts on the first; at the end it says how long the steps took.
//
// The model draws actions [T, A]. Its conditions are tensors: the first is the state [D], which a stand-in moves here,
// and others, such as an image, stay as they are. examples/policy trains one: policy.onnx.
#include <cmfast/cmfast.hpp>
#include <cmfast/onnxruntime.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int count, char** arguments) try {
    using Clock = std::chrono::steady_clock;
    if (count < 2) throw cmfast::Error("policy model.onnx [RATE_HZ [STEPS]]");
    const double rate_hz = count > 2 ? std::atof(arguments[2]) : 10.0;
    const int steps = count > 3 ? std::atoi(arguments[3]) : 100;

    cmfast::onnxruntime::Options options;
    options.threads = 1;  // threads that wait for each other make the worst case worse
    cmfast::Model model = cmfast::onnxruntime::load(arguments[1], options);
    const cmfast::Spec& spec = model.spec();
    if (spec.shape.size() != 2 || spec.conditions.empty() || spec.conditions[0].shape.size() != 1) {
        throw cmfast::Error("this example is for actions [T, A] on a state [D] and other tensors");
    }
    const std::string& state_name = spec.conditions[0].name;
    std::vector<float> state(static_cast<std::size_t>(spec.conditions[0].shape[0]), 0.0f);
    std::vector<std::vector<float>> others;
    for (std::size_t i = 1; i < spec.conditions.size(); ++i) {
        std::size_t size = 1;
        for (const auto side : spec.conditions[i].shape) size *= static_cast<std::size_t>(std::max<std::int64_t>(side, 1));
        others.emplace_back(size, 0.0f);
    }
    std::vector<float> actions(spec.size());
    const auto dimensions = static_cast<std::size_t>(spec.shape[1]);

    const auto act = [&](std::uint64_t step) {
        model.set(state_name, state.data(), state.size());
        for (std::size_t i = 0; i < others.size(); ++i) {  // where a camera's image comes from
            model.set(spec.conditions[i + 1].name, others[i].data(), others[i].size());
        }
        model.sample(1, /*seed*/ step, actions.data());  // a seed a step: the whole run can be repeated
        for (std::size_t i = 0; i < state.size(); ++i) {
            state[i] = 0.9f * state[i] + 0.1f * actions[i % dimensions];  // where a robot moves and its sensors are read
        }
    };
    act(0);  // the first call makes the buffers; the loop then allocates nothing of ours

    std::vector<double> took_ms;
    took_ms.reserve(static_cast<std::size_t>(steps));
    const auto period = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(1.0 / rate_hz));
    int late = 0;
    auto next = Clock::now();
    for (int step = 1; step <= steps; ++step) {
        const auto begin = Clock::now();
        act(static_cast<std::uint64_t>(step));
        took_ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
        next += period;
        late += Clock::now() > next;
        std::this_thread::sleep_until(next);
    }
    std::sort(took_ms.begin(), took_ms.end());
    const auto at = [&](double part) { return took_ms[static_cast<std::size_t>(part * (steps - 1))]; };
    std::printf("%d steps at %g Hz: p50 %.4f ms, p99 %.4f ms, worst %.4f ms, %d late\n", steps, rate_hz, at(0.5),
                at(0.99), took_ms.back(), late);
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
