// SPDX-License-Identifier: MIT
// ONNX Runtime as a backend, through its C interface, loaded at run time: nothing of it at compile or link time.
//
//   cmfast::Model model = cmfast::onnxruntime::load("model.onnx");
//
// The library     options.library, a file or a folder (a release archive, site-packages/onnxruntime/capi); else
//                 $CMFAST_ONNXRUNTIME; else libonnxruntime.so.1 where the system finds it. Version 1.17 or later
// No headers      OrtApi is a table of functions that only ever grows at its end, so a position in it is a fact of the
//                 ABI. Those that are used stand below; tests/cpp compares them with onnxruntime_c_api.h
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
#include "library.hpp"
#include "manifest.hpp"
#include "model.hpp"
#include "ort_head.hpp"

#if defined(_WIN32)
#define CMFAST_ORT_CALL __stdcall
#else
#define CMFAST_ORT_CALL
#endif

namespace cmfast::onnxruntime {

struct Options {
    std::filesystem::path library;                         // file or folder; empty: see above
    std::string device = "cpu";                            // cpu, cuda or tensorrt
    int threads = 0;                                       // CPU threads; 0: the library's choice
    std::map<std::string, std::string> provider_options{};  // of the CUDA or TensorRT provider, by its own names
};

namespace abi {

inline constexpr std::uint32_t version = 17;  // of the table: the oldest that has everything below

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct MemoryInfo;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct Allocator;
struct CudaOptions;
struct TensorRtOptions;
struct RunOptions;

/// A function at a position of OrtApi.
template <std::size_t Position, class Signature>
struct Function;
template <std::size_t Position, class Result, class... Arguments>
struct Function<Position, Result(Arguments...)> {
    static constexpr std::size_t position = Position;
    using Pointer = Result(CMFAST_ORT_CALL*)(Arguments...);
};

using GetErrorMessage = Function<2, const char*(const Status*)>;
using CreateEnv = Function<3, Status*(int, const char*, Env**)>;
using DisableTelemetryEvents = Function<6, Status*(const Env*)>;
using CreateSessionFromArray =
    Function<8, Status*(const Env*, const void*, std::size_t, const SessionOptions*, Session**)>;
using Run = Function<9, Status*(Session*, const RunOptions*, const char* const*, const Value* const*, std::size_t,
                                const char* const*, std::size_t, Value**)>;
using CreateSessionOptions = Function<10, Status*(SessionOptions**)>;
using SetSessionLogSeverityLevel = Function<22, Status*(SessionOptions*, int)>;
using SetIntraOpNumThreads = Function<24, Status*(SessionOptions*, int)>;
using SessionGetInputCount = Function<30, Status*(const Session*, std::size_t*)>;
using SessionGetOutputCount = Function<31, Status*(const Session*, std::size_t*)>;
using SessionGetInputTypeInfo = Function<33, Status*(const Session*, std::size_t, TypeInfo**)>;
using SessionGetOutputTypeInfo = Function<34, Status*(const Session*, std::size_t, TypeInfo**)>;
using SessionGetInputName = Function<36, Status*(const Session*, std::size_t, Allocator*, char**)>;
using SessionGetOutputName = Function<37, Status*(const Session*, std::size_t, Allocator*, char**)>;
using CreateTensorWithDataAsOrtValue = Function<49, Status*(const MemoryInfo*, void*, std::size_t, const std::int64_t*,
                                                            std::size_t, int, Value**)>;
using CastTypeInfoToTensorInfo = Function<55, Status*(const TypeInfo*, const TensorInfo**)>;
using GetTensorElementType = Function<60, Status*(const TensorInfo*, int*)>;
using GetDimensionsCount = Function<61, Status*(const TensorInfo*, std::size_t*)>;
using GetDimensions = Function<62, Status*(const TensorInfo*, std::int64_t*, std::size_t)>;
using CreateCpuMemoryInfo = Function<69, Status*(int, int, MemoryInfo**)>;
using AllocatorFree = Function<76, Status*(Allocator*, void*)>;
using GetAllocatorWithDefaultOptions = Function<78, Status*(Allocator**)>;
using ReleaseEnv = Function<92, void(Env*)>;
using ReleaseStatus = Function<93, void(Status*)>;
using ReleaseMemoryInfo = Function<94, void(MemoryInfo*)>;
using ReleaseSession = Function<95, void(Session*)>;
using ReleaseValue = Function<96, void(Value*)>;
using ReleaseTypeInfo = Function<98, void(TypeInfo*)>;
using ReleaseSessionOptions = Function<100, void(SessionOptions*)>;
using AddSessionConfigEntry = Function<130, Status*(SessionOptions*, const char*, const char*)>;
using AppendTensorRt = Function<170, Status*(SessionOptions*, const TensorRtOptions*)>;
using CreateTensorRtOptions = Function<171, Status*(TensorRtOptions**)>;
using UpdateTensorRtOptions =
    Function<172, Status*(TensorRtOptions*, const char* const*, const char* const*, std::size_t)>;
using ReleaseTensorRtOptions = Function<174, void(TensorRtOptions*)>;
using AppendCuda = Function<204, Status*(SessionOptions*, const CudaOptions*)>;
using CreateCudaOptions = Function<205, Status*(CudaOptions**)>;
using UpdateCudaOptions = Function<206, Status*(CudaOptions*, const char* const*, const char* const*, std::size_t)>;
using ReleaseCudaOptions = Function<208, void(CudaOptions*)>;

inline constexpr int float32 = 1, int64 = 7;                      // ONNXTensorElementDataType
inline constexpr int log_fatal = 4;                               // OrtLoggingLevel
inline constexpr int device_allocator = 0, default_memory = 0;    // OrtAllocatorType, OrtMemType

struct Base {  // OrtApiBase
    const void*(CMFAST_ORT_CALL* GetApi)(std::uint32_t);
    const char*(CMFAST_ORT_CALL* GetVersionString)();
};

/// The table, and what its functions return turned into exceptions.
class Api {
 public:
    explicit Api(const std::filesystem::path& wanted) : library_(wanted, names()) {
        const auto get_base = library_.find<const Base*(CMFAST_ORT_CALL*)()>("OrtGetApiBase");
        if (!get_base) throw BackendError(library_.name() + ": not ONNX Runtime, it has no OrtGetApiBase");
        const Base* base = get_base();
        version_ = base->GetVersionString();
        table_ = static_cast<void (*const*)()>(base->GetApi(abi::version));
        if (!table_) {
            throw BackendError(detail::text(library_.name(), ": ONNX Runtime ", version_, " is too old; 1.", abi::version,
                                            " or later is needed: pip install -U onnxruntime"));
        }
    }

    const std::string& version() const { return version_; }

    /// Call a function that cannot fail.
    template <class Function, class... Arguments>
    auto plain(Arguments... arguments) const {
        return reinterpret_cast<typename Function::Pointer>(table_[Function::position])(arguments...);
    }

    /// Call a function; what it says where it fails, or "".
    template <class Function, class... Arguments>
    std::string attempt(Arguments... arguments) const {
        Status* status = plain<Function>(arguments...);
        if (!status) return {};
        std::string message = plain<GetErrorMessage>(static_cast<const Status*>(status));
        plain<ReleaseStatus>(status);
        for (char& c : message) c = c == '\n' || c == '\r' ? ' ' : c;
        return message.empty() ? "unknown error" : message.substr(0, 300);
    }

    /// Call a function, or throw what it says.
    template <class Function, class... Arguments>
    void call(Arguments... arguments) const {
        const std::string message = attempt<Function>(arguments...);
        if (!message.empty()) throw BackendError("ONNX Runtime " + version_ + ": " + message);
    }

 private:
    static detail::LibraryNames names() {
#if defined(_WIN32)
        return {"ONNX Runtime", "CMFAST_ONNXRUNTIME", "onnxruntime", {"onnxruntime.dll"}, fix};
#elif defined(__APPLE__)
        return {"ONNX Runtime", "CMFAST_ONNXRUNTIME", "libonnxruntime", {"libonnxruntime.dylib"}, fix};
#else
        return {"ONNX Runtime", "CMFAST_ONNXRUNTIME", "libonnxruntime", {"libonnxruntime.so.1", "libonnxruntime.so"}, fix};
#endif
    }
    static constexpr const char* fix =
        "set CMFAST_ONNXRUNTIME to the library or its folder: python -m cmfast --onnxruntime prints it";

    detail::Library library_;
    std::string version_;
    void (*const* table_)() = nullptr;
};

/// Something of the library's that is released with it.
template <class T, class Release>
class Owned {
 public:
    explicit Owned(std::shared_ptr<const Api> api) : api_(std::move(api)) {}
    Owned(Owned&& other) noexcept : api_(other.api_), pointer_(std::exchange(other.pointer_, nullptr)) {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    Owned& operator=(Owned&&) = delete;
    ~Owned() {
        if (pointer_) api_->template plain<Release>(pointer_);
    }
    T* get() const { return pointer_; }
    T** out() { return &pointer_; }

 private:
    std::shared_ptr<const Api> api_;
    T* pointer_ = nullptr;
};

}  // namespace abi

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
        const abi::TensorInfo* info = nullptr;  // owned by `type`; null where it is no tensor
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

#undef CMFAST_ORT_CALL
