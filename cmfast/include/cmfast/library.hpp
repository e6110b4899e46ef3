// SPDX-License-Identifier: MIT
// A shared library opened at run time: no link step, no version of it in the build. Never closed: its threads may live.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "errors.hpp"

#if defined(_WIN32)  // this branch is not compiled by the tests
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace cmfast::detail {

/// Where a backend's library may be.
struct LibraryNames {
    const char* what;                 // in errors
    const char* variable;             // of the environment: a file or a folder
    std::string stem;                 // in a folder: the library whose name begins so
    std::vector<std::string> system;  // names that the system searches for
    const char* fix;                  // what to type
};

class Library {
 public:
    /// Open `wanted`, a file or a folder that has it; where it is empty, what the environment or the system has.
    Library(const std::filesystem::path& wanted, const LibraryNames& names) {
        std::filesystem::path place = wanted;
        const char* variable = std::getenv(names.variable);
        if (place.empty() && variable) place = variable;
        if (!place.empty()) {
            open(in_folder(place, names));
        } else {
            for (const auto& name : names.system) {
                if (!handle_) open(name);
            }
        }
        if (!handle_) {
            throw BackendError(text("cannot load ", names.what, place.empty() ? "" : " from ", place.string(), ": ", why_,
                                    "; ", names.fix));
        }
    }

    /// A function of the library, or null.
    template <class Function>
    Function find(const char* name) const {
#if defined(_WIN32)
        return reinterpret_cast<Function>(reinterpret_cast<void (*)()>(GetProcAddress(handle_, name)));
#else
        return reinterpret_cast<Function>(dlsym(handle_, name));
#endif
    }

    const std::string& name() const { return name_; }

 private:
    static std::filesystem::path in_folder(const std::filesystem::path& place, const LibraryNames& names) {
        std::error_code ignored;
        if (!std::filesystem::is_directory(place, ignored)) return place;
        std::filesystem::path best;
        for (const auto& folder : {place, place / "lib", place / "lib64", place / "capi", place / "bin"}) {
            for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
                const std::string name = entry.path().filename().string();
                const bool library = name.find(".so") != std::string::npos || entry.path().extension() == ".dylib" ||
                                     entry.path().extension() == ".dll";
                const std::string after = name.compare(0, names.stem.size(), names.stem) == 0
                                              ? name.substr(names.stem.size(), 1) : "_";
                // Not libonnxruntime_providers_shared.so; of links to one file any.
                if (library && (after == "." || after.empty()) && (best.empty() || entry.path() < best)) best = entry.path();
            }
            if (!best.empty()) return best;
        }
        return place / (names.stem + ".so");  // whose absence the system puts into words
    }

#if defined(_WIN32)
    void open(const std::filesystem::path& path) {
        handle_ = LoadLibraryExW(path.c_str(), nullptr, path.is_absolute() ? LOAD_WITH_ALTERED_SEARCH_PATH : 0);
        if (!handle_) why_ = std::error_code(static_cast<int>(GetLastError()), std::system_category()).message();
        name_ = path.string();
    }
    HMODULE handle_ = nullptr;
#else
    void open(const std::filesystem::path& path) {
        handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!handle_) {
            const char* why = dlerror();
            if (why_.empty()) why_ = why ? why : "unknown";
        }
        name_ = path.string();
    }
    void* handle_ = nullptr;
#endif

    std::string name_, why_;
};

}  // namespace cmfast::detail
