// SPDX-License-Identifier: MIT
// TensorRT's engine files: the manifest in a plan, found and checked without TensorRT and without a GPU.
//
// As cmfast/formats/tensorrt_plan.py: the manifest is the network's name, which a plan stores as text, and its key
// "engine" has the digest of the file, so that a truncated or altered file is refused before anything deserializes it.
// A digest inside is no signature: a plan is native code, so open only what you trust.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include "errors.hpp"
#include "ir_head.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "ort_head.hpp"
#include "sha256.hpp"

namespace cmfast {

/// Which library a plan is of, by its first bytes: "tensorrt", "tensorrt_rtx", or "" where it is no plan.
inline std::string plan_library(std::string_view bytes) {
    if (bytes.size() < 64) return "";
    return bytes.substr(0, 4) == "ftrt" ? "tensorrt" : bytes.substr(0, 4) == "vtrt" ? "tensorrt_rtx" : "";
}

/// Read the manifest in the bytes of a plan that is whole and as it was written; `where` names it in errors.
inline Manifest parse_plan_manifest(std::string_view bytes, const std::string& where) {
    const std::string again = "build it again: cmfast-export model.onnx --format engine";
    const std::string library = plan_library(bytes);
    if (library.empty()) throw ArtifactError(where + ": not a TensorRT engine; make one: cmfast-export model.pt --format engine");
    constexpr std::string_view begin = "{\"schema\": \"cmfast/", field = "\"plan_sha256\": \"";
    const std::size_t start = bytes.find(begin);
    if (start == std::string_view::npos) {
        throw ArtifactError(where + ": a TensorRT engine without a cmfast manifest, so its conventions are unknown; "
                            "make one that has it: cmfast-export model.pt --format engine");
    }
    if (bytes.find(begin, start + 1) != std::string_view::npos) {
        throw ArtifactError(where + ": it holds two manifests; " + again);
    }
    std::string_view text = bytes.substr(start, 4000);
    try {
        text = text.substr(0, detail::JsonReader(text).read_first());
    } catch (const Error&) {
        throw ArtifactError(where + ": its manifest is damaged or cut off; " + again);
    }
    Manifest manifest = parse_manifest(text, where);
    const std::size_t digits = start + text.find(field) + field.size();
    if (manifest.engine.plan_sha256.size() != 64 || bytes.substr(digits, 64) != manifest.engine.plan_sha256) {
        throw ArtifactError(where + ": its manifest has no digest of the file; " + again);
    }
    detail::Sha256 sha256;
    sha256.update(bytes.substr(0, digits));
    sha256.update(std::string(64, '0'));
    sha256.update(bytes.substr(digits + 64));
    if (sha256.hex() != manifest.engine.plan_sha256) {
        throw ArtifactError(where + ": it was altered or damaged since it was written (its bytes do not hash to the digest "
                            "in its manifest); copy it again, or " + again);
    }
    if (manifest.engine.library != library) {
        throw ArtifactError(where + ": a plan of " + library + " whose manifest says " + manifest.engine.library + "; " + again);
    }
    return manifest;
}

/// Read the manifest of a model file: ONNX, ONNX Runtime's own format, OpenVINO's IR or a TensorRT engine.
inline Manifest read_manifest(const std::filesystem::path& path) {
    const std::string bytes = detail::read_file(path);
    if (path.extension() == ".xml") return parse_ir_manifest(bytes, detail::read_file(weights_of(path)), path.string());
    if (!plan_library(bytes).empty()) return parse_plan_manifest(bytes, path.string());
    return is_ort(bytes) ? parse_ort_manifest(bytes, path.string()) : parse_onnx_manifest(bytes, path.string());
}

}  // namespace cmfast
