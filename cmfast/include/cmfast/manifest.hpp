// SPDX-License-Identifier: MIT
// The manifest: what a model file says about itself, found and checked before anything runs it.
//
//   cmfast::Manifest manifest = cmfast::read_manifest("model.onnx");     // of cmfast/plan.hpp; needs no backend
//
// In an ONNX file it is metadata_props["cmfast"], JSON: docs/format.md. Schemas "cmfast/2" and "cmfast/1" are read.
// As cmfast/formats/manifest.py: keys that are not known are ignored, an unknown schema is refused.
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <system_error>

#include "errors.hpp"
#include "json.hpp"
#include "manifest_keys.hpp"
#include "onnx_head.hpp"

namespace cmfast {

namespace detail {

/// The bytes of a file, whole.
inline std::string read_file(const std::filesystem::path& path) {
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (!std::filesystem::exists(status)) throw ArtifactError(path.string() + ": no such file");
    if (!std::filesystem::is_regular_file(status)) throw ArtifactError(path.string() + ": not a file");
    const auto size = std::filesystem::file_size(path, error);
    if (error) throw ArtifactError(path.string() + ": it cannot be read: " + error.message());
    if (size == 0) throw ArtifactError(path.string() + ": the file is empty");
    std::ifstream file(path, std::ios::binary);
    std::string bytes(static_cast<std::size_t>(size), '\0');
    if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
        throw ArtifactError(path.string() + ": it cannot be read, or became shorter while it was read");
    }
    return bytes;
}

}  // namespace detail

/// Read a manifest, JSON; `where` names its file in errors.
inline Manifest parse_manifest(std::string_view json, const std::string& where) {
    detail::Json values;
    try {
        values = detail::parse_json(json);
    } catch (const Error& error) {
        throw ArtifactError(where + ": the manifest is not a JSON object (" + error.what() +
                            "); export the model again with cmfast-export");
    }
    if (values.kind != detail::Json::Kind::object) {
        throw ArtifactError(where + ": the manifest is not a JSON object; export the model again with cmfast-export");
    }
    const detail::Json* schema = values.find("schema");
    const bool known = detail::is_kind(schema, detail::Json::Kind::text) &&
                       (schema->text == "cmfast/2" || schema->text == "cmfast/1");
    if (!known) {
        throw ArtifactError(where + ": the manifest has schema " + detail::shown(schema) +
                            ", this version reads 'cmfast/1' and 'cmfast/2'; update cmfast or export the model again");
    }
    try {
        return detail::ManifestReader(values).read();
    } catch (const Error& error) {
        throw ArtifactError(where + ": " + error.what());
    }
}

/// Read the manifest in the bytes of an ONNX file; `where` names it in errors.
inline Manifest parse_onnx_manifest(std::string_view bytes, const std::string& where) {
    OnnxHead head;
    try {
        head = parse_onnx_head(bytes);
    } catch (const Error& error) {
        throw ArtifactError(where + ": not a whole ONNX file (" + error.what() +
                            "); export the model again with cmfast-export");
    }
    const auto found = head.metadata.find("cmfast");
    if (found == head.metadata.end()) {
        throw ArtifactError(where + ": an ONNX file without a cmfast manifest, so its conventions are unknown; "
                            "make one that has it: cmfast-export model.pt");
    }
    Manifest manifest = parse_manifest(found->second, where);
    if (!manifest.engine.library.empty()) {
        throw ArtifactError(where + ": an ONNX file with the manifest of a TensorRT engine; export the model again");
    }
    if (!head.external.empty()) {
        throw ArtifactError(where + ": its weights are in another file, and C++ opens models of one file only");
    }
    return manifest;
}

}  // namespace cmfast
