/* SPDX-License-Identifier: MIT */
/* cmfast.h - the C interface: few-step sampling from exported models, for other languages. Built from src/cmfast_c.cpp.
 *
 *   cmfast_error error;
 *   cmfast_model* model = NULL;
 *   if (cmfast_open("model.onnx", NULL, &model, &error) != CMFAST_OK) { puts(error.message); return 1; }
 *   cmfast_set_steps(model, 2, &error);
 *   cmfast_sample(model, 16, 0, 0, images, &error);            // float32 [16, *shape], the caller's memory
 *   cmfast_close(model);
 *
 * Every call returns CMFAST_OK or what is wrong, and writes one line to `error` (which may be NULL). Nothing is global;
 * one thread at a time uses a model. Structs begin with their size, so that they can grow: set it to sizeof.
 */
#ifndef CMFAST_H
#define CMFAST_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define CMFAST_API __declspec(dllexport)
#else
#define CMFAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define CMFAST_C_VERSION 1

typedef struct cmfast_model cmfast_model;

typedef enum cmfast_status {
    CMFAST_OK = 0,
    CMFAST_REQUEST = 1,  /* an argument does not fit */
    CMFAST_ARTIFACT = 2, /* the file is missing, damaged or of the wrong kind */
    CMFAST_BACKEND = 3,  /* the backend or the device is not available, or failed */
    CMFAST_CHECK = 4,    /* values that are not finite */
    CMFAST_OTHER = 5     /* no memory, say */
} cmfast_status;

typedef struct cmfast_error {
    char message[1024]; /* one line, UTF-8; "" after CMFAST_OK */
} cmfast_error;

typedef struct cmfast_options {
    size_t size;         /* sizeof(cmfast_options) */
    const char* backend; /* "onnxruntime" (NULL) or "openvino" */
    const char* library; /* its shared library, or the folder of it; NULL: environment, system */
    const char* device;  /* NULL: the CPU */
    int threads;         /* CPU threads; 0: the library's choice */
} cmfast_options;

typedef struct cmfast_condition {
    size_t size;       /* sizeof(cmfast_condition) */
    const char* name;  /* the model's memory */
    int64_t classes;   /* of a class; 0: a tensor */
    size_t rank;       /* of a tensor, without the batch */
    const int64_t* dims; /* -1: differs from call to call */
} cmfast_condition;

CMFAST_API int cmfast_c_version(void);

CMFAST_API cmfast_status cmfast_open(const char* path, const cmfast_options* options, cmfast_model** out,
                                     cmfast_error* error);
CMFAST_API void cmfast_close(cmfast_model* model);

/* What the model is. Pointers stay valid until it is closed. */
CMFAST_API size_t cmfast_rank(const cmfast_model* model);
CMFAST_API const int64_t* cmfast_dims(const cmfast_model* model); /* of one sample */
CMFAST_API size_t cmfast_condition_count(const cmfast_model* model);
CMFAST_API cmfast_status cmfast_get_condition(const cmfast_model* model, size_t index, cmfast_condition* out,
                                              cmfast_error* error);

/* What the next calls do. */
CMFAST_API cmfast_status cmfast_set_steps(cmfast_model* model, int steps, cmfast_error* error); /* 0: the fewest */
CMFAST_API cmfast_status cmfast_set_sigmas(cmfast_model* model, const double* sigmas, size_t count, cmfast_error* error);
CMFAST_API cmfast_status cmfast_set_batch(cmfast_model* model, size_t samples, cmfast_error* error);
/* Classes: one for all samples, or one each. A label that is not set is drawn from the seed. */
CMFAST_API cmfast_status cmfast_set_class(cmfast_model* model, const char* name, const int64_t* numbers, size_t count,
                                          cmfast_error* error);
/* A tensor: dims [*shape] for all samples, or [n, *shape]. */
CMFAST_API cmfast_status cmfast_set_tensor(cmfast_model* model, const char* name, const float* values,
                                           const int64_t* dims, size_t rank, cmfast_error* error);
CMFAST_API void cmfast_unset(cmfast_model* model, const char* name);

/* Samples [n, *shape], data units: from a seed, or from unit noise [steps, n, *shape]. */
CMFAST_API cmfast_status cmfast_sample(cmfast_model* model, size_t n, uint64_t seed, uint64_t first, float* out,
                                       cmfast_error* error);
CMFAST_API cmfast_status cmfast_from_noise(cmfast_model* model, const float* noise, size_t n, float* out,
                                           cmfast_error* error);
/* f(x, sigma), not clipped; sigma_next: of a flow map, else 0. */
CMFAST_API cmfast_status cmfast_denoise(cmfast_model* model, const float* x, double sigma, double sigma_next, size_t n,
                                        float* out, cmfast_error* error);
/* Images [n, C, H, W] as bytes [n, H, W, C]. */
CMFAST_API cmfast_status cmfast_to_uint8(const cmfast_model* model, const float* samples, size_t n, uint8_t* out,
                                         cmfast_error* error);
/* Compare with the values that the exporter recorded: CMFAST_CHECK where max_abs is above atol. */
CMFAST_API cmfast_status cmfast_selftest(cmfast_model* model, double* max_abs, double* atol, cmfast_error* error);

/* Portable unit noise: `count` values of one sample at one step, equal to Python's to the bit. */
CMFAST_API cmfast_status cmfast_gaussian(uint64_t seed, uint64_t sample, uint32_t step, size_t count, float* out,
                                         cmfast_error* error);

#ifdef __cplusplus
}
#endif

#endif
