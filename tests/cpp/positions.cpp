// SPDX-License-Identifier: MIT
// The positions in OrtApi that cmfast/onnxruntime.hpp relies on, compared with the library's own header.
#include <cmfast/onnxruntime.hpp>

#include <onnxruntime_c_api.h>

#include <cstddef>

#define SAME(ours, theirs) \
    static_assert(cmfast::onnxruntime::abi::ours::position == offsetof(OrtApi, theirs) / sizeof(void*), #theirs)

SAME(GetErrorMessage, GetErrorMessage);
SAME(CreateEnv, CreateEnv);
SAME(DisableTelemetryEvents, DisableTelemetryEvents);
SAME(CreateSessionFromArray, CreateSessionFromArray);
SAME(Run, Run);
SAME(CreateSessionOptions, CreateSessionOptions);
SAME(SetSessionLogSeverityLevel, SetSessionLogSeverityLevel);
SAME(SetIntraOpNumThreads, SetIntraOpNumThreads);
SAME(SessionGetInputCount, SessionGetInputCount);
SAME(SessionGetOutputCount, SessionGetOutputCount);
SAME(SessionGetInputTypeInfo, SessionGetInputTypeInfo);
SAME(SessionGetOutputTypeInfo, SessionGetOutputTypeInfo);
SAME(SessionGetInputName, SessionGetInputName);
SAME(SessionGetOutputName, SessionGetOutputName);
SAME(CreateTensorWithDataAsOrtValue, CreateTensorWithDataAsOrtValue);
SAME(CastTypeInfoToTensorInfo, CastTypeInfoToTensorInfo);
SAME(GetTensorElementType, GetTensorElementType);
SAME(GetDimensionsCount, GetDimensionsCount);
SAME(GetDimensions, GetDimensions);
SAME(CreateCpuMemoryInfo, CreateCpuMemoryInfo);
SAME(AllocatorFree, AllocatorFree);
SAME(GetAllocatorWithDefaultOptions, GetAllocatorWithDefaultOptions);
SAME(ReleaseEnv, ReleaseEnv);
SAME(ReleaseStatus, ReleaseStatus);
SAME(ReleaseMemoryInfo, ReleaseMemoryInfo);
SAME(ReleaseSession, ReleaseSession);
SAME(ReleaseValue, ReleaseValue);
SAME(ReleaseTypeInfo, ReleaseTypeInfo);
SAME(ReleaseSessionOptions, ReleaseSessionOptions);
SAME(AddSessionConfigEntry, AddSessionConfigEntry);
SAME(AppendTensorRt, SessionOptionsAppendExecutionProvider_TensorRT_V2);
SAME(CreateTensorRtOptions, CreateTensorRTProviderOptions);
SAME(UpdateTensorRtOptions, UpdateTensorRTProviderOptions);
SAME(ReleaseTensorRtOptions, ReleaseTensorRTProviderOptions);
SAME(AppendCuda, SessionOptionsAppendExecutionProvider_CUDA_V2);
SAME(CreateCudaOptions, CreateCUDAProviderOptions);
SAME(UpdateCudaOptions, UpdateCUDAProviderOptions);
SAME(ReleaseCudaOptions, ReleaseCUDAProviderOptions);

static_assert(cmfast::onnxruntime::abi::float32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(cmfast::onnxruntime::abi::int64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(cmfast::onnxruntime::abi::log_fatal == ORT_LOGGING_LEVEL_FATAL);
static_assert(cmfast::onnxruntime::abi::device_allocator == OrtDeviceAllocator);
static_assert(cmfast::onnxruntime::abi::default_memory == OrtMemTypeDefault);
static_assert(offsetof(OrtApiBase, GetVersionString) == sizeof(void*));

int main() { return 0; }
