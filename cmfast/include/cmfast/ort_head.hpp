// SPDX-License-Identifier: MIT
// ONNX Runtime's own format, .ort: the manifest in the metadata of its model, and the digest of the file in it.
//
// As cmfast/formats/ort_format.py. The file is a flatbuffer (onnxruntime/core/flatbuffers/schema/ort.fbs); every offset
// is checked before it is followed, and an altered file is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace cmfast {

namespace detail {

/// As much of a flatbuffer as it takes to follow offsets. Throws Error outside the bytes.
class Flatbuffer {
 public:
    explicit Flatbuffer(std::string_view bytes) : bytes_(bytes) {}

    std::uint64_t number(std::uint64_t at, unsigned size = 4) const {
        if (at + size < at || at + size > bytes_.size()) throw Error("an offset leads out of the file");
        std::uint64_t value = 0;
        for (unsigned i = 0; i < size; ++i) {
            value |= std::uint64_t{static_cast<unsigned char>(bytes_[at + i])} << (8 * i);
        }
        return value;
    }

    /// Where what a field of a table points to is; 0: the table does not have the field.
    std::uint64_t field(std::uint64_t table, unsigned index) const {
        const auto back = static_cast<std::int64_t>(static_cast<std::int32_t>(number(table)));
        const std::int64_t vtable = static_cast<std::int64_t>(table) - back;
        if (vtable < 0) throw Error("an offset leads out of the file");
        const auto at = static_cast<std::uint64_t>(vtable);
        if (4 + 2 * index >= number(at, 2)) return 0;
        const std::uint64_t offset = number(at + 4 + 2 * index, 2);
        return offset == 0 ? 0 : table + offset + number(table + offset);
    }

    /// The text at such a place.
    std::string_view text(std::uint64_t at) const {
        const std::uint64_t size = number(at);
        if (at + 4 + size > bytes_.size()) throw Error("a text leads out of the file");
        return bytes_.substr(at + 4, size);
    }

 private:
    std::string_view bytes_;
};

/// The values of "cmfast" in the metadata of an .ort file.
inline std::vector<std::string_view> ort_manifests(std::string_view bytes) {
    constexpr unsigned model_of_session = 1, metadata_of_model = 9, key = 0, value = 1;
    const Flatbuffer file(bytes);
    std::vector<std::string_view> found;
    const std::uint64_t model = file.field(file.number(0), model_of_session);
    const std::uint64_t list = model ? file.field(model, metadata_of_model) : 0;
    const std::uint64_t count = list ? file.number(list) : 0;
    if (count > 1000) throw Error("too many entries");
    for (std::uint64_t at = list + 4; at < list + 4 + 4 * count; at += 4) {
        const std::uint64_t entry = at + file.number(at);
        const std::uint64_t name = file.field(entry, key), text = file.field(entry, value);
        if (name && text && file.text(name) == "cmfast") found.push_back(file.text(text));
    }
    return found;
}

}  // namespace detail

/// Whether bytes begin as an .ort file does.
inline bool is_ort(std::string_view bytes) { return bytes.size() >= 8 && bytes.substr(4, 4) == "ORTM"; }

/// Read the manifest in the bytes of an .ort file that is whole and as it was written; `where` names it in errors.
inline Manifest parse_ort_manifest(std::string_view bytes, const std::string& where) {
    const std::string again = "export it again: cmfast-export model.pt --format ort";
    if (!is_ort(bytes)) throw ArtifactError(where + ": not an .ort file; " + again);
    std::vector<std::string_view> found;
    try {
        found = detail::ort_manifests(bytes);
    } catch (const Error&) {
        throw ArtifactError(where + ": not a whole .ort file; copy it again, or " + again);
    }
    if (found.size() != 1) {
        throw ArtifactError(detail::text(where, ": an .ort file with ", found.size(), " cmfast manifests; ", again));
    }
    Manifest manifest = parse_manifest(found[0], where);
    constexpr std::string_view field = "\"graph_sha256\": \"";
    const std::size_t begin = found[0].find(field);
    const std::size_t inside = static_cast<std::size_t>(found[0].data() - bytes.data());
    const std::size_t digits = begin == std::string_view::npos ? 0 : inside + begin + field.size();
    if (digits == 0 || manifest.graph_sha256.size() != 64 || bytes.substr(digits, 64) != manifest.graph_sha256) {
        throw ArtifactError(where + ": its manifest has no digest of the file; " + again);
    }
    detail::Sha256 sha256;
    sha256.update(bytes.substr(0, digits));
    sha256.update(std::string(64, '0'));
    sha256.update(bytes.substr(digits + 64));
    if (sha256.hex() != manifest.graph_sha256) {
        throw ArtifactError(where + ": it was altered or damaged since it was verified; copy it again, or " + again);
    }
    return manifest;
}

}  // namespace cmfast
