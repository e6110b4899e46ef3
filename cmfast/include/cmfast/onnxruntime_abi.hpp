// SPDX-License-Identifier: MIT
// ONNX Runtime's C interface as cmfast/onnxruntime.hpp uses it: positions in its table of functions, and their errors.
//
// OrtApi only ever grows at its end, so a position in it is a fact of the ABI. tests/cpp compares those below with
// onnxruntime_c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "errors.hpp"
#include "library.hpp"

#if defined(_WIN32)
#define CMFAST_ORT_CALL __stdcall
#else
#define CMFAST_ORT_CALL
#endif

namespace cmfast::onnxruntime::abi {

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

}  // namespace cmfast::onnxruntime::abi

#undef CMFAST_ORT_CALL
