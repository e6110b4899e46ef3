// SPDX-License-Identifier: MIT
// ONNX Runtime as a backend, through its C interface, loaded at run time: nothing of it at compile or link time.
//
//   cmfast::Model model = cmfast::onnxruntime::load("model.onnx");
//
// The library     options.library, a file or a folder (a release archive, site-packages/onnxruntime/capi); else
//                 $CMFAST_ONNXRUNTIME; else libonnxruntime.so.1 where the system finds it. Version 1.17 or later
// No headers      OrtApi is a table of functions that only ever grows at its end, so a position in it is a fact of the
//                 ABI: onnxruntime_abi.hpp has those that are used
// Devices         cpu, cuda, tensorrt; there is no fallback from one to another
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "model.hpp"
#include "onnxruntime_abi.hpp"
#include "ort_head.hpp"

namespace cmfast::onnxruntime {

struct Options {
    std::filesystem::path library;                         // file or folder; empty: see above
    std::string device = "cpu";                            // cpu, cuda or tensorrt
    int threads = 0;                                       // CPU threads; 0: the library's choice
    std::map<std::string, std::string> provider_options{};  // of the CUDA or TensorRT provider, by its own names
};

/// A graph on ONNX Runtime.
class OnnxRuntimeBackend final : public Backend {
 public:
    OnnxRuntimeBackend(const std::filesystem::path& path, const Options& options)
        : OnnxRuntimeBackend(path.string(), detail::read_file(path), options) {}

    /// The same of the bytes of a file; `where` names it in errors.
    OnnxRuntimeBackend(const std::string& where, const std::string& bytes, const Options& options)
        : where_(where),
          manifest_(is_ort(bytes) ? parse_ort_manifest(bytes, where) : parse_onnx_manifest(bytes, where)),
          api_(std::make_shared<abi::Api>(options.library)) {
        name_ = "ONNX Runtime " + options.device;
        check_device(options);
        if (is_ort(bytes) && options.device != "cpu") {
            throw Error(where + ": an .ort file is optimised for the CPU; open it on the device cpu, or the .onnx file");
        }
        api_->call<abi::CreateEnv>(abi::log_fatal, "cmfast", env_.out());
        api_->call<abi::DisableTelemetryEvents>(constant(env_.get()));
        abi::Owned<abi::SessionOptions, abi::ReleaseSessionOptions> session_options(api_);
        api_->call<abi::CreateSessionOptions>(session_options.out());
        api_->call<abi::SetSessionLogSeverityLevel>(session_options.get(), abi::log_fatal);
        api_->call<abi::AddSessionConfigEntry>(session_options.get(), "session.load_model_format",
                                              is_ort(bytes) ? "ORT" : "ONNX");
        if (options.threads) api_->call<abi::SetIntraOpNumThreads>(session_options.get(), options.threads);
        add_provider(session_options.get(), options);
        const std::string message = api_->attempt<abi::CreateSessionFromArray>(
            constant(env_.get()), static_cast<const void*>(bytes.data()), bytes.size(), constant(session_options.get()),
            session_.out());
        if (!message.empty()) throw ArtifactError(where_ + ": ONNX Runtime " + api_->version() + " cannot open it: " + message);
        api_->call<abi::CreateCpuMemoryInfo>(abi::device_allocator, abi::default_memory, memory_.out());
        check_graph();
    }

    const Manifest& manifest() const override { return manifest_; }
    const std::string& name() const override { return name_; }
    std::size_t batch() const override { return batch_; }

    void bind(std::vector<Tensor>& inputs, Tensor& output) override {
        values_.clear();
        input_names_.clear();
        input_values_.clear();
        for (auto& input : inputs) {
            values_.push_back(value(input));
            input_names_.push_back(input.name.c_str());
            input_values_.push_back(values_.back().get());
        }
        values_.push_back(value(output));
        output_name_ = output.name.c_str();
        output_value_ = values_.back().get();
    }

    void run() override {
        abi::Value* output = output_value_;
        abi::Status* status = api_->plain<abi::Run>(session_.get(), static_cast<const abi::RunOptions*>(nullptr),
                                                    input_names_.data(), input_values_.data(), input_names_.size(),
                                                    &output_name_, std::size_t{1}, &output);
        if (!status) return;
        const std::string message = api_->plain<abi::GetErrorMessage>(constant(status));
        api_->plain<abi::ReleaseStatus>(status);
        throw BackendError(name_ + " failed; if memory is short, try a smaller batch: " + message.substr(0, 300));
    }

 private:
    using OwnedValue = abi::Owned<abi::Value, abi::ReleaseValue>;

    template <class T>
    static const T* constant(T* pointer) {
        return pointer;
    }

    OwnedValue value(Tensor& tensor) {
        OwnedValue value(api_);
        void* data = tensor.is_number ? static_cast<void*>(tensor.numbers.data()) : tensor.floats.data();
        const std::size_t bytes = tensor.is_number ? tensor.numbers.size() * sizeof(std::int64_t)
                                                   : tensor.floats.size() * sizeof(float);
        api_->call<abi::CreateTensorWithDataAsOrtValue>(constant(memory_.get()), data, bytes,
                                                        constant(tensor.shape.data()), tensor.shape.size(),
                                                        tensor.is_number ? abi::int64 : abi::float32, value.out());
        return value;
    }

    void check_device(const Options& options) const {
        if (options.device != "cpu" && options.device != "cuda" && options.device != "tensorrt") {
            throw Error("device must be one of cpu, cuda, tensorrt, got " + detail::in_quotes(options.device));
        }
        const auto flavour = manifest_.made_by.find("flavour");
        if (flavour != manifest_.made_by.end() && options.device != "cuda") {
            throw ArtifactError(where_ + ": a graph of the flavour " + flavour->second + ", for ONNX Runtime's CUDA "
                                "provider, not for " + options.device + "; use the device cuda, or export the checkpoint "
                                "again with --format onnx");
        }
        const char* tf32 = std::getenv("NVIDIA_TF32_OVERRIDE");
        if (options.device == "tensorrt" && manifest_.dtype == "float32" && !(tf32 && std::string_view(tf32) == "0")) {
            throw BackendError(where_ + ": a float32 file, and ONNX Runtime's TensorRT provider multiplies float32 as "
                               "TensorFloat-32; set NVIDIA_TF32_OVERRIDE=0 in the environment, or export with "
                               "--precision tf32");
        }
    }

    void add_provider(abi::SessionOptions* session_options, const Options& options) const {
        if (options.device == "cpu") return;
        if (options.device == "tensorrt") {
            abi::Owned<abi::TensorRtOptions, abi::ReleaseTensorRtOptions> tensorrt(api_);
            append<abi::CreateTensorRtOptions, abi::UpdateTensorRtOptions, abi::AppendTensorRt>(
                session_options, tensorrt, options.provider_options);
        }
        abi::Owned<abi::CudaOptions, abi::ReleaseCudaOptions> cuda(api_);
        auto given = options.device == "cuda" ? options.provider_options : std::map<std::string, std::string>();
        given.emplace("use_tf32", manifest_.dtype == "float32" ? "0" : "1");  // float32 stays float32
        append<abi::CreateCudaOptions, abi::UpdateCudaOptions, abi::AppendCuda>(session_options, cuda, given);
    }

    template <class Create, class Update, class Append, class Provider>
    void append(abi::SessionOptions* session_options, Provider& provider,
                const std::map<std::string, std::string>& given) const {
        std::vector<const char*> keys, values;
        for (const auto& [key, value] : given) {
            keys.push_back(key.c_str());
            values.push_back(value.c_str());
        }
        std::string message = api_->attempt<Create>(provider.out());
        if (message.empty() && !keys.empty()) {
            message = api_->attempt<Update>(provider.get(), constant(keys.data()), constant(values.data()), keys.size());
        }
        if (message.empty()) message = api_->attempt<Append>(session_options, constant(provider.get()));
        if (!message.empty()) {
            throw BackendError("the device was requested, but ONNX Runtime " + api_->version() + " has no such provider "
                               "here: " + message + "; replace it: pip uninstall onnxruntime && pip install "
                               "'cmfast[gpu]'");
        }
    }

    /// An input or output of the graph: its name, element type and shape, -1 where a size is free.
    struct Port {
        std::string name;
        int type = 0;
        std::vector<std::int64_t> shape;
    };

    template <class GetName, class GetType>
    Port port(std::size_t index) const {
        Port port;
        abi::Allocator* allocator = nullptr;
        api_->call<abi::GetAllocatorWithDefaultOptions>(&allocator);
        char* name = nullptr;
        api_->call<GetName>(constant(session_.get()), index, allocator, &name);
        port.name = name;
        api_->call<abi::AllocatorFree>(allocator, static_cast<void*>(name));
        abi::Owned<abi::TypeInfo, abi::ReleaseTypeInfo> type(api_);
        api_->call<GetType>(constant(session_.get()), index, type.out());
        const abi::TensorInfo* info = nullptr;  // owned by `type`; null where it is not a tensor
        api_->call<abi::CastTypeInfoToTensorInfo>(constant(type.get()), &info);
        if (!info) return port;
        api_->call<abi::GetTensorElementType>(info, &port.type);
        std::size_t rank = 0;
        api_->call<abi::GetDimensionsCount>(info, &rank);
        port.shape.resize(rank);
        api_->call<abi::GetDimensions>(info, port.shape.data(), rank);
        return port;
    }

    [[noreturn]] void wrong(const std::string& what) const { throw ArtifactError(where_ + ": the graph's " + what); }

    /// Throw unless the graph takes and gives what the manifest says; find its fixed batch size, if it has one.
    void check_graph() {
        const std::vector<std::string> wanted = detail::input_names(manifest_);
        std::size_t count = 0;
        api_->call<abi::SessionGetInputCount>(constant(session_.get()), &count);
        std::vector<Port> inputs;
        std::vector<std::string> found;
        for (std::size_t i = 0; i < count; ++i) {
            inputs.push_back(port<abi::SessionGetInputName, abi::SessionGetInputTypeInfo>(i));
            found.push_back(inputs.back().name);
        }
        detail::check_names(wanted, found, where_);
        for (const Port& input : inputs) {
            const bool number = detail::is_class(manifest_, input.name);
            if (input.type != (number ? abi::int64 : abi::float32)) {
                wrong(input.name + (number ? " is not int64" : " is not float32"));
            }
            if (input.name == wanted[0]) batch_ = detail::fixed_batch(manifest_, input.name, input.shape, where_);
        }
        api_->call<abi::SessionGetOutputCount>(constant(session_.get()), &count);
        if (count != 1) wrong(detail::text("outputs are ", count, "; its manifest needs one"));
        const Port output = port<abi::SessionGetOutputName, abi::SessionGetOutputTypeInfo>(0);
        if (output.name != manifest_.output()) wrong("output is " + output.name + ", not " + manifest_.output());
        if (output.type != abi::float32) wrong("output is not float32");
    }

    std::string where_, name_;
    Manifest manifest_;
    std::shared_ptr<const abi::Api> api_;
    std::size_t batch_ = 0;
    // In the order of their making: what is made later goes first.
    abi::Owned<abi::Env, abi::ReleaseEnv> env_{api_};
    abi::Owned<abi::Session, abi::ReleaseSession> session_{api_};
    abi::Owned<abi::MemoryInfo, abi::ReleaseMemoryInfo> memory_{api_};
    std::vector<OwnedValue> values_;
    std::vector<const char*> input_names_;
    std::vector<const abi::Value*> input_values_;
    const char* output_name_ = nullptr;
    abi::Value* output_value_ = nullptr;
};

/// Open an ONNX file on ONNX Runtime.
inline Model load(const std::filesystem::path& path, const Options& options = {}) {
    return Model(std::make_unique<OnnxRuntimeBackend>(path, options));
}

}  // namespace cmfast::onnxruntime
