// SPDX-License-Identifier: MIT
// TensorRT as a backend: an engine file is deserialized, its work captured once as a CUDA graph and replayed.
//
//   cmfast::Model model = cmfast::tensorrt::load("model.engine");
//
// NEVER COMPILED AGAINST THE SDK by cmfast's tests, which have none: no package registry carries NvInfer.h. Written to
// the documentation of TensorRT 10 and 11. Before you rely on it, run cmfast::selftest.
//
// What it needs   NvInfer.h, libnvinfer and the CUDA runtime; CMake: find_package(cmfast COMPONENTS tensorrt)
// Trust           an engine is native code: open only files that you trust. A truncated or altered one is refused before
//                 it is deserialized (cmfast/plan.hpp); getEngineValidity does not detect that
// Threads         one Model a thread, each with a stream of its own
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "model.hpp"
#include "plan.hpp"

namespace cmfast::tensorrt {

struct Options {
    int device = 0;          // CUDA's number of the GPU
    bool cuda_graph = true;  // replay one launch a call instead of enqueueing every kernel
};

namespace detail {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw BackendError(std::string("CUDA, ") + what + ": " + cudaGetErrorString(status));
}

/// Keeps the last error that TensorRT reports, as one line.
class Log final : public nvinfer1::ILogger {
 public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
        std::size_t i = 0;
        for (; message[i] && i + 1 < sizeof last_; ++i) last_[i] = message[i] == '\n' ? ' ' : message[i];
        last_[i] = '\0';
    }
    const char* last() const { return last_[0] ? last_ : "no reason given"; }

 private:
    char last_[300] = "";
};

/// Memory on the GPU.
class Buffer {
 public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "allocating memory"); }
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }
    void* get() const { return data_; }

 private:
    void* data_ = nullptr;
};

struct Stream {
    Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "making a stream"); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(handle); }
    cudaStream_t handle = nullptr;
};

}  // namespace detail

/// An engine on TensorRT.
class TensorRtBackend final : public Backend {
 public:
    TensorRtBackend(const std::filesystem::path& path, const Options& options)
        : TensorRtBackend(path.string(), cmfast::detail::read_file(path), options) {}

    /// The same of the bytes of a file; `where` names it in errors.
    TensorRtBackend(const std::string& where, const std::string& bytes, const Options& options)
        : where_(where), manifest_(parse_plan_manifest(bytes, where)), options_(options), on_(options.device) {
        if (manifest_.engine.library != "tensorrt") {
            throw ArtifactError(where_ + ": an engine of " + manifest_.engine.library + ", which TensorRT does not run");
        }
        runtime_.reset(nvinfer1::createInferRuntime(log_));
        if (!runtime_) throw BackendError(std::string("TensorRT cannot start: ") + log_.last());
        engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
        if (!engine_) {
            throw ArtifactError(where_ + ": TensorRT cannot open it, which was built by " + manifest_.engine.version + ": " +
                                log_.last() + "; build it on this machine: cmfast-export model.onnx --format engine");
        }
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw BackendError(std::string("TensorRT cannot start: ") + log_.last());
        check_graph();
    }

    ~TensorRtBackend() override { forget_graph(); }
    TensorRtBackend(const TensorRtBackend&) = delete;
    TensorRtBackend& operator=(const TensorRtBackend&) = delete;

    const Manifest& manifest() const override { return manifest_; }
    const std::string& name() const override { return name_; }
    std::size_t most() const override { return static_cast<std::size_t>(manifest_.engine.batch[2]); }
    std::size_t batch() const override {
        return manifest_.engine.batch[0] == manifest_.engine.batch[2] ? most() : 0;
    }

    void bind(std::vector<Tensor>& inputs, Tensor& output) override {
        on_.use();
        forget_graph();
        inputs_.clear();
        for (Tensor& input : inputs) {
            nvinfer1::Dims dims{};
            dims.nbDims = static_cast<std::int32_t>(input.shape.size());
            for (std::size_t i = 0; i < input.shape.size(); ++i) dims.d[i] = input.shape[i];
            if (!context_->setInputShape(input.name.c_str(), dims)) {
                throw BackendError(where_ + ": it was built for batches of " + std::to_string(manifest_.engine.batch[0]) +
                                   " to " + std::to_string(most()) + ", and " + input.name + " is " +
                                   cmfast::detail::listed(input.shape));
            }
            inputs_.push_back(placed(input));
        }
        output_ = placed(output);
    }

    void run() override {
        on_.use();
        for (const Place& input : inputs_) {
            detail::check(cudaMemcpyAsync(input.device.get(), input.host, input.bytes, cudaMemcpyHostToDevice, stream_.handle),
                          "copying to the GPU");
        }
        if (graph_) {
            detail::check(cudaGraphLaunch(graph_, stream_.handle), "replaying a graph");
        } else {
            enqueue();  // the first call may allocate, which cannot be captured; its result is the one that is returned
            if (options_.cuda_graph) capture();
        }
        detail::check(cudaMemcpyAsync(output_.host, output_.device.get(), output_.bytes, cudaMemcpyDeviceToHost, stream_.handle),
                      "copying from the GPU");
        detail::check(cudaStreamSynchronize(stream_.handle), "waiting");
    }

 private:
    struct Place {
        detail::Buffer device;
        void* host = nullptr;
        std::size_t bytes = 0;
    };

    struct Device {  // selected before anything is made on it
        explicit Device(int device) : number(device) { use(); }
        void use() const { detail::check(cudaSetDevice(number), "selecting the GPU"); }
        int number;
    };

    Place placed(Tensor& tensor) {
        Place place;
        place.host = tensor.is_number ? static_cast<void*>(tensor.numbers.data()) : tensor.floats.data();
        place.bytes = tensor.is_number ? tensor.numbers.size() * sizeof(std::int64_t) : tensor.floats.size() * sizeof(float);
        place.device = detail::Buffer(place.bytes);
        if (!context_->setTensorAddress(tensor.name.c_str(), place.device.get())) {
            throw BackendError(where_ + ": TensorRT does not take " + tensor.name + ": " + log_.last());
        }
        return place;
    }

    void enqueue() {
        if (!context_->enqueueV3(stream_.handle)) throw BackendError(name_ + " failed: " + log_.last());
    }

    /// Capture a call as a graph. Thread-local, so that other threads may use CUDA meanwhile.
    void capture() {
        detail::check(cudaStreamBeginCapture(stream_.handle, cudaStreamCaptureModeThreadLocal), "capturing a graph");
        const bool enqueued = context_->enqueueV3(stream_.handle);
        cudaGraph_t graph = nullptr;
        const cudaError_t ended = cudaStreamEndCapture(stream_.handle, &graph);
        if (!enqueued || ended != cudaSuccess) {
            cudaGraphDestroy(graph);
            throw BackendError(name_ + " cannot be captured as a CUDA graph (" + log_.last() + "); set cuda_graph to false");
        }
        const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
        cudaGraphDestroy(graph);
        detail::check(made, "making a graph");
    }

    void forget_graph() {
        if (graph_) cudaGraphExecDestroy(graph_);
        graph_ = nullptr;
    }

    [[noreturn]] void wrong(const std::string& what) const { throw ArtifactError(where_ + ": the engine's " + what); }

    /// Throw unless the engine takes and gives what the manifest says.
    void check_graph() const {
        const std::vector<std::string> wanted = cmfast::detail::input_names(manifest_);
        std::vector<std::string> found;
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const std::string name = engine_->getIOTensorName(i);
            const bool number = cmfast::detail::is_class(manifest_, name);
            if (engine_->getTensorDataType(name.c_str()) != (number ? nvinfer1::DataType::kINT64 : nvinfer1::DataType::kFLOAT)) {
                wrong(name + (number ? " is not int64" : " is not float32"));
            }
            if (engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kOUTPUT) {
                if (name != manifest_.output()) wrong("output is " + name + ", not " + manifest_.output());
                continue;
            }
            found.push_back(name);
            if (name != wanted[0]) continue;
            const nvinfer1::Dims dims = engine_->getTensorShape(name.c_str());
            cmfast::detail::fixed_batch(manifest_, name, std::vector<std::int64_t>(dims.d, dims.d + dims.nbDims), where_);
        }
        cmfast::detail::check_names(wanted, found, where_);
    }

    std::string where_, name_ = "TensorRT";
    Manifest manifest_;
    Options options_;
    Device on_;
    // In the order of their making: what is made later goes first.
    detail::Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    detail::Stream stream_;
    std::vector<Place> inputs_;
    Place output_;
    cudaGraphExec_t graph_ = nullptr;
};

/// Open an engine file on TensorRT.
inline Model load(const std::filesystem::path& path, const Options& options = {}) {
    return Model(std::make_unique<TensorRtBackend>(path, options));
}

}  // namespace cmfast::tensorrt
