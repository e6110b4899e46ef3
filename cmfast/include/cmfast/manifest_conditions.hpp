// SPDX-License-Identifier: MIT
// The reader of a manifest's conditions, and checks of JSON values that cmfast/manifest_keys.hpp shares with it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "errors.hpp"
#include "json.hpp"
#include "spec.hpp"

namespace cmfast::detail {

inline constexpr std::int64_t two_to_31 = std::int64_t{1} << 31;

inline bool is_whole(const Json* value, std::int64_t least, std::int64_t most) {
    return value && value->kind == Json::Kind::number && value->whole && least <= value->integer &&
           value->integer <= most;
}

inline bool is_real(const Json* value) {
    return value && value->kind == Json::Kind::number && std::isfinite(value->number);
}

inline bool is_kind(const Json* value, Json::Kind kind) { return value && value->kind == kind; }

inline std::string shown(const Json* value) { return value ? value->shown() : "None"; }

inline bool is_text(const std::string& value) { return characters(value) <= 4000 && printable(value); }

/// Whether a value of "source" or "engine" is printable texts, numbers, lists and objects that are not deep.
inline bool is_plain(const Json& value, int depth) {
    constexpr double largest = 9223372036854775808.0;  // 2**63
    for (const auto& key : value.keys) {
        if (!is_text(key)) return false;
    }
    for (const auto& item : value.items) {
        if (!is_plain(item, depth - 1)) return false;
    }
    if (value.kind == Json::Kind::list || value.kind == Json::Kind::object) return depth > 0;
    if (value.kind == Json::Kind::text) return is_text(value.text);
    if (value.kind == Json::Kind::number) return std::fabs(value.number) <= largest;  // false of NaN
    return true;
}

/// Names of classes from a list, none or as many as there are classes.
inline std::vector<std::string> class_names(const Json& list, std::int64_t classes) {
    std::vector<std::string> names;
    std::map<std::string, int> seen;
    for (const auto& item : list.items) {
        if (item.kind != Json::Kind::text || item.text.empty() || characters(item.text) > 100) {
            throw Error("class_names must be texts of 1 to 100 characters");
        }
        if (!printable(item.text) || seen[item.text]++) {
            throw Error("class_names must be different printable texts");
        }
        names.push_back(item.text);
    }
    if (!names.empty() && static_cast<std::int64_t>(names.size()) != classes) {
        throw Error(text("class_names has ", names.size(), " names for ", classes, " classes"));
    }
    return names;
}

/// Whether a text is an identifier of at most 100 characters.
inline bool is_name(const std::string& name) {
    if (name.empty() || name.size() > 100 || (name[0] >= '0' && name[0] <= '9')) return false;
    for (const char c : name) {
        if (!(c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))) return false;
    }
    return true;
}

/// Whether a graph has an input or output of this name already.
inline bool is_reserved(const std::string& name) {
    for (const char* word : {"x", "sigma", "sigma_next", "c_noise", "c_noise_next", "noise", "denoised", "images",
                             "samples", "self", "batch"}) {
        if (name == word) return true;
    }
    return false;
}

/// One condition: a class or a tensor.
inline Condition condition(const Json& values) {
    const Json *name = values.find("name"), *kind = values.find("kind"), *classes = values.find("classes"),
               *names = values.find("class_names"), *shape = values.find("shape"), *null = values.find("null");
    if (values.kind != Json::Kind::object || !name || !kind) {
        throw Error(text("a condition is an object with a name and a kind, got ", values.shown()));
    }
    if (name->kind != Json::Kind::text || !is_name(name->text) || is_reserved(name->text)) {
        throw Error(text("a condition's name must be an identifier that is not reserved, got ", name->shown()));
    }
    Condition found;
    found.name = name->text;
    const std::string where = "condition " + found.name + ": ";
    if (names && names->kind != Json::Kind::list) throw Error(where + "class_names must be a list");
    if (shape && shape->kind != Json::Kind::list) throw Error(where + "shape must be a list");
    if (is_kind(null, Json::Kind::null)) null = nullptr;
    if (null && !is_real(null)) throw Error(text(where, "null must be a finite number, got ", null->shown()));
    if (null) found.null = null->number;
    if (kind->kind == Json::Kind::text && kind->text == "class") {
        found.kind = Condition::Kind::class_number;
        if (!is_whole(classes, 1, two_to_31 - 1)) {
            throw Error(text(where, "classes must be a positive whole number, got ", shown(classes)));
        }
        if (shape && !shape->items.empty()) throw Error(where + "a class has no shape");
        found.classes = classes->integer;
        if (null && !is_whole(null, 0, found.classes)) {
            throw Error(text(where, "null must be a class from 0 to ", found.classes, ", got ", null->shown()));
        }
        if (names) found.class_names = class_names(*names, found.classes);
        return found;
    }
    if (kind->kind != Json::Kind::text || kind->text != "tensor") {
        throw Error(text(where, "kind must be class or tensor, got ", kind->shown()));
    }
    if (found.name == "label") throw Error(where + "this name is for a class");
    if ((classes && !is_whole(classes, 0, 0)) || (names && !names->items.empty())) {
        throw Error(where + "a tensor has no classes");
    }
    if (shape && shape->items.size() > 6) throw Error(where + "shape must be at most 6 sizes");
    for (std::size_t axis = 0; shape && axis < shape->items.size(); ++axis) {
        const Json& side = shape->items[axis];
        const bool fixed = is_whole(&side, 1, two_to_31 - 1);
        const bool named = side.kind == Json::Kind::text && is_name(side.text);
        if (!fixed && !named && side.kind != Json::Kind::null) {
            throw Error(text(where, "sizes are whole numbers from 1 or names of dynamic sizes, got ", side.shown()));
        }
        found.shape.push_back(fixed ? side.integer : -1);
        found.sides.push_back(fixed ? "" : named ? side.text : found.name + "_" + std::to_string(axis));
    }
    return found;
}

/// The list of conditions; throws Error and names the one that is wrong.
inline std::vector<Condition> conditions(const Json& list) {
    if (list.kind != Json::Kind::list) throw Error(text("conditions must be a list, got ", list.shown()));
    if (list.items.size() > 32) throw Error("conditions must be at most 32");
    std::vector<Condition> found;
    for (const auto& item : list.items) {
        found.push_back(condition(item));
        for (std::size_t i = 0; i + 1 < found.size(); ++i) {
            if (found[i].name == found.back().name) {
                throw Error(text("two conditions are named ", found.back().name));
            }
        }
    }
    for (const auto& each : found) {
        for (const auto& side : each.sides) {
            for (const auto& other : found) {
                if (!side.empty() && (side == other.name || is_reserved(side))) {
                    throw Error(text("a dynamic size needs a name of its own, got ", in_quotes(side)));
                }
            }
        }
    }
    return found;
}

}  // namespace cmfast::detail
