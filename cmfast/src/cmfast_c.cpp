// SPDX-License-Identifier: MIT
// The C interface, one shared library: c++ -std=c++17 -shared -fPIC -fvisibility=hidden -I../include cmfast_c.cpp -ldl
#include <cmfast/cmfast.h>
#include <cmfast/cmfast.hpp>
#include <cmfast/onnxruntime.hpp>
#include <cmfast/openvino.hpp>

#include <algorithm>
#include <cstring>

struct cmfast_model {
    cmfast::Model model;
};

namespace {

cmfast_status failed(cmfast_error* error, cmfast_status status, const char* message) {
    if (error) {
        const std::size_t length = std::min(std::strlen(message), sizeof error->message - 1);
        std::memcpy(error->message, message, length);
        error->message[length] = '\0';
    }
    return status;
}

/// Run a body and turn what it throws into a status: no exception leaves the library.
template <class Body>
cmfast_status guarded(cmfast_error* error, Body&& body) noexcept {
    try {
        body();
        return failed(error, CMFAST_OK, "");
    } catch (const cmfast::ArtifactError& err) {
        return failed(error, CMFAST_ARTIFACT, err.what());
    } catch (const cmfast::BackendError& err) {
        return failed(error, CMFAST_BACKEND, err.what());
    } catch (const cmfast::CheckFailed& err) {
        return failed(error, CMFAST_CHECK, err.what());
    } catch (const cmfast::Error& err) {
        return failed(error, CMFAST_REQUEST, err.what());
    } catch (const std::bad_alloc&) {
        return failed(error, CMFAST_OTHER, "no memory; draw fewer samples at a time");
    } catch (const std::exception& err) {
        return failed(error, CMFAST_OTHER, err.what());
    } catch (...) {
        return failed(error, CMFAST_OTHER, "unknown error");
    }
}

template <class Pointer>
void need(Pointer* pointer, const char* name) {
    if (!pointer) throw cmfast::Error(std::string(name) + " must not be NULL");
}

std::string or_else(const char* given, const char* otherwise) { return given ? given : otherwise; }

cmfast::Model opened(const char* path, const cmfast_options& given) {
    const std::string backend = or_else(given.backend, "onnxruntime");
    if (backend == "onnxruntime") {
        cmfast::onnxruntime::Options options;
        options.library = or_else(given.library, "");
        options.device = or_else(given.device, "cpu");
        options.threads = given.threads;
        return cmfast::onnxruntime::load(path, options);
    }
    if (backend == "openvino") {
        cmfast::openvino::Options options;
        options.library = or_else(given.library, "");
        options.device = or_else(given.device, "CPU");
        options.threads = given.threads;
        return cmfast::openvino::load(path, options);
    }
    throw cmfast::Error("backend must be onnxruntime or openvino, got " + cmfast::detail::in_quotes(backend));
}

}  // namespace

int cmfast_c_version(void) { return CMFAST_C_VERSION; }

cmfast_status cmfast_open(const char* path, const cmfast_options* options, cmfast_model** out, cmfast_error* error) {
    return guarded(error, [&] {
        need(path, "path");
        need(out, "out");
        *out = nullptr;
        cmfast_options given{};
        if (options) {
            if (options->size < offsetof(cmfast_options, backend) + sizeof given.backend) {
                throw cmfast::Error("options.size must be sizeof(cmfast_options)");
            }
            std::memcpy(&given, options, std::min(options->size, sizeof given));
        }
        *out = new cmfast_model{opened(path, given)};
    });
}

void cmfast_close(cmfast_model* model) { delete model; }

size_t cmfast_rank(const cmfast_model* model) { return model ? model->model.spec().shape.size() : 0; }

const int64_t* cmfast_dims(const cmfast_model* model) { return model ? model->model.spec().shape.data() : nullptr; }

size_t cmfast_condition_count(const cmfast_model* model) { return model ? model->model.spec().conditions.size() : 0; }

cmfast_status cmfast_get_condition(const cmfast_model* model, size_t index, cmfast_condition* out, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(out, "out");
        const auto& all = model->model.spec().conditions;
        if (index >= all.size()) throw cmfast::Error(cmfast::detail::text("there are ", all.size(), " conditions"));
        const auto& each = all[index];
        const cmfast_condition found = {out->size, each.name.c_str(), each.classes, each.shape.size(), each.shape.data()};
        std::memcpy(out, &found, std::min(out->size, sizeof found));
    });
}

cmfast_status cmfast_set_steps(cmfast_model* model, int steps, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        model->model.steps(steps);
    });
}

cmfast_status cmfast_set_sigmas(cmfast_model* model, const double* sigmas, size_t count, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(sigmas, "sigmas");
        model->model.sigmas(std::vector<double>(sigmas, sigmas + count));
    });
}

cmfast_status cmfast_set_batch(cmfast_model* model, size_t samples, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        model->model.batch(samples);
    });
}

cmfast_status cmfast_set_class(cmfast_model* model, const char* name, const int64_t* numbers, size_t count,
                               cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(name, "name");
        need(numbers, "numbers");
        model->model.set(name, numbers, count);
    });
}

cmfast_status cmfast_set_tensor(cmfast_model* model, const char* name, const float* values, const int64_t* dims,
                                size_t rank, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(name, "name");
        need(values, "values");
        if (rank) need(dims, "dims");
        model->model.set(name, values, std::vector<std::int64_t>(dims, dims + rank));
    });
}

void cmfast_unset(cmfast_model* model, const char* name) {
    if (model && name) model->model.unset(name);
}

cmfast_status cmfast_sample(cmfast_model* model, size_t n, uint64_t seed, uint64_t first, float* out,
                            cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(out, "out");
        model->model.sample(n, seed, out, first);
    });
}

cmfast_status cmfast_from_noise(cmfast_model* model, const float* noise, size_t n, float* out, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(noise, "noise");
        need(out, "out");
        model->model.from_noise(noise, n, out);
    });
}

cmfast_status cmfast_denoise(cmfast_model* model, const float* x, double sigma, double sigma_next, size_t n, float* out,
                             cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(x, "x");
        need(out, "out");
        model->model.denoise(x, sigma, n, out, sigma_next);
    });
}

cmfast_status cmfast_to_uint8(const cmfast_model* model, const float* samples, size_t n, uint8_t* out,
                              cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        need(samples, "samples");
        need(out, "out");
        cmfast::to_uint8(samples, n, model->model.spec(), out);
    });
}

cmfast_status cmfast_selftest(cmfast_model* model, double* max_abs, double* atol, cmfast_error* error) {
    return guarded(error, [&] {
        need(model, "model");
        const auto result = cmfast::selftest(model->model);
        if (max_abs) *max_abs = result.max_abs;
        if (atol) *atol = result.atol;
        if (!result.passed) {
            throw cmfast::CheckFailed(cmfast::detail::text("the self-test differs by ", result.max_abs, ", and ",
                                                           result.atol, " is allowed: this machine computes something "
                                                           "else than the exporter did"));
        }
    });
}

cmfast_status cmfast_gaussian(uint64_t seed, uint64_t sample, uint32_t step, size_t count, float* out,
                              cmfast_error* error) {
    return guarded(error, [&] {
        if (count) need(out, "out");
        cmfast::gaussian(seed, sample, step, count, out);
    });
}
