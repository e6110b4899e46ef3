// SPDX-License-Identifier: MIT
// OpenVINO's IR: the manifest in NAME.xml, and the digest that binds NAME.bin to it. As cmfast/formats/openvino_ir.py.
//
// The manifest is the last <rt_info> of the graph. Nothing is parsed but that: the digest covers every byte before it.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

#include "errors.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace cmfast {

namespace detail {

/// An attribute's value without XML's escapes; a character beyond ASCII written as a number is left as it is.
inline std::string unescaped(std::string_view text) {
    static constexpr std::pair<std::string_view, char> names[] = {
        {"&quot;", '"'}, {"&apos;", '\''}, {"&lt;", '<'}, {"&gt;", '>'}, {"&amp;", '&'}};
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
        bool escape = false;
        for (const auto& [name, character] : names) {
            if (text.substr(at, name.size()) != name) continue;
            out += character;
            at += name.size();
            escape = true;
            break;
        }
        if (!escape) out += text[at++];
    }
    return out;
}

}  // namespace detail

/// The file of an IR's weights: NAME.bin beside NAME.xml.
inline std::filesystem::path weights_of(std::filesystem::path file) { return file.replace_extension(".bin"); }

/// The manifest of an IR whose weights are those that were verified; `where` names its .xml in errors.
inline Manifest parse_ir_manifest(std::string_view graph, std::string_view weights, const std::string& where) {
    const char* again = "; export it again: cmfast-export model.pt --format openvino";
    const std::size_t head = graph.rfind("<rt_info");
    constexpr std::string_view begin = "<cmfast value=";
    const std::size_t at = head == std::string_view::npos ? head : graph.find(begin, head);
    const std::size_t first = at == std::string_view::npos ? at : at + begin.size();
    const bool quoted = first < graph.size() && (graph[first] == '"' || graph[first] == '\'');
    const std::size_t last = quoted ? graph.find(graph[first], first + 1) : std::string_view::npos;
    if (last == std::string_view::npos) {
        throw ArtifactError(where + ": no OpenVINO IR with a cmfast manifest, so its conventions are unknown" + again);
    }
    Manifest manifest = parse_manifest(detail::unescaped(graph.substr(first + 1, last - first - 1)), where);
    detail::Sha256 sha256;
    sha256.update(graph.substr(0, head));
    sha256.update(weights);
    if (sha256.hex() != manifest.graph_sha256) {
        throw ArtifactError(where + ": its graph or the weights in its .bin are not those that were verified" + again);
    }
    return manifest;
}

}  // namespace cmfast
