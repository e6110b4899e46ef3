// SPDX-License-Identifier: MIT
// The manifest's types, and the reader of its JSON keys. cmfast/manifest.hpp finds it in files.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "json.hpp"
#include "spec.hpp"

namespace cmfast {

/// A sample that the exporter drew: what `cmfast::selftest` (cmfast/selftest.hpp) compares with.
struct Selftest {
    bool present = false;
    std::uint64_t seed = 0;
    std::map<std::string, std::vector<double>> conditions;  // of one sample, flat
    std::vector<std::size_t> at;                            // flat indices into the sample
    std::vector<double> values;                             // what stands there
    double atol = 0;                                        // largest difference allowed, data units
};

/// What built a TensorRT engine, for what: cmfast/plan.hpp.
struct Engine {
    std::string library;              // "tensorrt" or "tensorrt_rtx"; "": this is no engine
    std::string version;              // of the library
    std::string plan_sha256;          // of the file, these 64 digits counted as zeros
    std::int64_t batch[3] = {0, 0, 0};  // least, usual, most
};

/// A model file's description of itself.
struct Manifest {
    enum class Kind { denoiser, sampler, server };

    Kind kind = Kind::denoiser;
    Spec spec;
    std::string dtype = "float32";               // what the network computes in; inputs and outputs are float32
    std::map<std::string, std::string> made_by;  // versions; "flavour": which runtime the nodes are for
    std::string graph_sha256;
    Selftest selftest;
    Engine engine;

    /// The name of the graph's output.
    std::string output() const {
        return kind == Kind::denoiser ? "denoised" : spec.data == "image" ? "images" : "samples";
    }
};

namespace detail {

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

/// Reads the keys of a manifest; each member throws Error and names the key.
class ManifestReader {
 public:
    explicit ManifestReader(const Json& values) : values_(values) {}

    Manifest read() {
        parts();
        Manifest manifest;
        manifest.kind = kind();
        manifest.dtype = one_of("dtype", {"float32", "tf32", "float16", "bfloat16"}, "float32");
        manifest.graph_sha256 = digest();
        if (const Json* made_by = values_.find("made_by")) {
            for (std::size_t i = 0; i < made_by->keys.size(); ++i) {
                manifest.made_by[made_by->keys[i]] = made_by->items[i].text;
            }
        }
        manifest.spec = spec();
        if (manifest.kind != Manifest::Kind::denoiser && manifest.spec.sigmas.size() != 1) {
            throw Error("a sampler has exactly one list of noise levels, the one it was built with");
        }
        manifest.selftest = selftest(manifest.spec);
        manifest.engine = engine();
        return manifest;
    }

 private:
    const Json& need(const char* key) const {
        const Json* value = values_.find(key);
        if (!value) throw Error(text("the description of the model lacks ", key));
        return *value;
    }

    std::string one_of(const char* key, std::vector<std::string> allowed, const char* otherwise = nullptr) const {
        const Json* value = values_.find(key);
        if (!value && otherwise) return otherwise;
        for (const auto& each : allowed) {
            if (is_kind(value, Json::Kind::text) && value->text == each) return each;
        }
        throw Error(text(key, " must be one of ", listed(allowed, "", ""), ", got ", shown(value)));
    }

    std::string any_word(const char* key) const {
        const Json& value = need(key);
        if (value.kind == Json::Kind::text && !value.text.empty() && is_text(value.text)) return value.text;
        throw Error(text(key, " must be a printable text, got ", value.shown()));
    }

    bool flag(const char* key, bool needed) const {
        const Json* value = needed ? &need(key) : values_.find(key);
        if (!value) return false;
        if (value->kind != Json::Kind::boolean) throw Error(text(key, " must be true or false, got ", shown(value)));
        return value->boolean;
    }

    void parts() const {
        for (const char* name : {"source", "made_by", "parity", "cost", "engine", "selftest"}) {
            const Json* part = values_.find(name);
            if (!part) continue;
            if (part->kind != Json::Kind::object) throw Error(text(name, " must be an object"));
            const std::string_view which = name;
            for (std::size_t i = 0; i < part->keys.size(); ++i) {
                const Json& value = part->items[i];
                if (!is_text(part->keys[i])) throw Error(text(name, " must have printable keys"));
                const bool number = value.kind == Json::Kind::number && is_plain(value, 0);
                const bool fits = which == "parity" ? number
                                  : which == "cost" ? number && value.number >= 0
                                  : which == "made_by"
                                      ? value.kind == Json::Kind::text && is_text(value.text)
                                      : is_plain(value, 4);
                if (!fits) throw Error(text(name, ".", part->keys[i], " is wrong: ", value.shown()));
            }
        }
    }

    Manifest::Kind kind() const {
        const std::string name = one_of("kind", {"denoiser", "sampler", "server"});
        return name == "denoiser"  ? Manifest::Kind::denoiser
               : name == "sampler" ? Manifest::Kind::sampler
                                   : Manifest::Kind::server;
    }

    std::string digest() const {
        const Json* value = values_.find("graph_sha256");
        if (!value) return "";
        bool right = value->kind == Json::Kind::text && (value->text.empty() || value->text.size() == 64);
        for (const char c : value->text) right = right && ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'));
        if (!right) throw Error(text("graph_sha256 must be 64 hex digits, got ", shown(value)));
        return value->text;
    }

    Spec spec() const {
        Spec spec;
        if (!values_.find("shape") && values_.find("image")) {
            first_schema(spec);
        } else {
            spec.shape = sizes("shape", 1, 4);
            spec.data = one_of("data", {"image", "array"});
            if (spec.data == "image" && spec.shape.size() != 3) {
                throw Error(text("images have the shape (C, H, W), got ", listed(spec.shape)));
            }
            spec.conditions = conditions();
            spec.second_time = flag("second_time", false);
        }
        spec.size();  // throws where it is too large
        if (const Json* grid = values_.find("grid")) {
            if (!is_whole(grid, 0, 65536) || grid->integer == 1) {
                throw Error(text("grid must be 0 (none) or 2 to 65536 levels, got ", shown(grid)));
            }
            spec.grid = grid->integer;
        }
        spec.clip = flag("clip", true);
        spec.sigma_min = sigma("sigma_min");
        spec.sigma_max = sigma("sigma_max");
        spec.sigma_data = sigma("sigma_data");
        if (!(spec.sigma_min < spec.sigma_max)) {
            throw Error(text("need sigma_min < sigma_max, got ", spec.sigma_min, " and ", spec.sigma_max));
        }
        spec.scaling = any_word("scaling");
        if (spec.scaling == "seed") spec.scaling = "cloneofsimo";  // its name in "cmfast/1"
        spec.c_noise = any_word("c_noise");
        spec.renoise = one_of("renoise", {"sqrt", "plain", "ddim"});
        spec.sigmas = sigmas(spec);
        return spec;
    }

    void first_schema(Spec& spec) const {
        spec.shape = sizes("image", 3, 3);
        const Json& classes = need("classes");
        if (!is_whole(&classes, 0, two_to_31 - 1)) {
            throw Error(text("classes must be 0 (unconditional) or a positive whole number, got ", classes.shown()));
        }
        const Json* names = values_.find("class_names");
        if (names && names->kind != Json::Kind::list) throw Error("class_names must be a list");
        if (classes.integer == 0) {
            if (names && !names->items.empty()) {
                throw Error(text("class_names has ", names->items.size(), " names for no classes"));
            }
            return;
        }
        Condition label;
        label.name = "label";
        label.kind = Condition::Kind::class_number;
        label.classes = classes.integer;
        if (names) label.class_names = class_names(*names, label.classes);
        spec.conditions.push_back(std::move(label));
    }

    std::vector<std::int64_t> sizes(const char* key, std::size_t least, std::size_t most) const {
        const Json& value = need(key);
        std::vector<std::int64_t> found;
        for (const auto& side : value.items) {
            if (!is_whole(&side, 1, 65536)) break;
            found.push_back(side.integer);
            if (found.size() == most) break;
        }
        if (value.kind != Json::Kind::list || found.size() != value.items.size() || found.size() < least) {
            throw Error(text(key, " must be ", least == most ? "three" : "one to four",
                             " whole numbers from 1 to 65536, got ", value.shown()));
        }
        return found;
    }

    static std::vector<std::string> class_names(const Json& list, std::int64_t classes) {
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

    static bool is_name(const std::string& name) {
        if (name.empty() || name.size() > 100 || (name[0] >= '0' && name[0] <= '9')) return false;
        for (const char c : name) {
            if (!(c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))) return false;
        }
        return true;
    }

    static bool is_reserved(const std::string& name) {
        for (const char* word : {"x", "sigma", "sigma_next", "c_noise", "c_noise_next", "noise", "denoised", "images",
                                 "samples", "self", "batch"}) {
            if (name == word) return true;
        }
        return false;
    }

    std::vector<Condition> conditions() const {
        const Json& list = need("conditions");
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

    static Condition condition(const Json& values) {
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
                throw Error(text(where, "classes must be a positive whole number, got ", detail::shown(classes)));
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

    double sigma(const char* key) const {
        const Json& value = need(key);
        if (!is_real(&value) || !(1e-18 <= value.number && value.number <= 1e18)) {  // squares of them are float32
            throw Error(text(key, " must be a positive number, 1e-18 to 1e18, got ", value.shown()));
        }
        return value.number;
    }

    std::map<int, std::vector<double>> sigmas(const Spec& spec) const {
        const Json& object = need("sigmas");
        if (object.kind != Json::Kind::object) {
            throw Error(text("sigmas must be {steps: noise levels}, got ", object.shown()));
        }
        std::map<int, std::vector<double>> found;
        for (std::size_t i = 0; i < object.keys.size(); ++i) {
            const std::string& key = object.keys[i];
            const Json& list = object.items[i];
            bool right = !key.empty() && key.size() <= 5 && key[0] != '0';
            for (const char c : key) right = right && c >= '0' && c <= '9';
            if (!right) throw Error(text("sigmas has the key ", in_quotes(key), ", which is no number of steps"));
            const int steps = std::stoi(key);
            std::vector<double> values;
            for (const auto& item : list.items) {
                if (!is_real(&item)) break;
                values.push_back(item.number);
            }
            if (list.kind != Json::Kind::list || values.size() != list.items.size()) {
                throw Error(text("sigmas holds ", list.shown(), ", which is no list of noise levels"));
            }
            if (values.size() != static_cast<std::size_t>(steps)) {
                throw Error(text("the default noise levels for ", steps, " steps are ", values.size(),
                                 "; need as many numbers as steps"));
            }
            found[steps] = check_sigmas(values, spec.sigma_min, spec.sigma_max);
        }
        return found;
    }

    Engine engine() const {
        Engine found;
        const Json* object = values_.find("engine");
        if (!object || object->items.empty()) return found;
        const auto word = [&](const char* key) {
            const Json* value = object->find(key);
            if (!is_kind(value, Json::Kind::text) || value->text.empty()) {
                throw Error(text("engine.", key, " must be a text, got ", shown(value)));
            }
            return value->text;
        };
        found.library = word("library");
        found.version = word("version");
        found.plan_sha256 = word("plan_sha256");
        const Json* batch = object->find("batch");
        for (std::size_t i = 0; i < 3; ++i) {
            const bool there = is_kind(batch, Json::Kind::list) && batch->items.size() == 3;
            if (!there || !is_whole(&batch->items[i], i ? found.batch[i - 1] : 1, two_to_31 - 1)) {
                throw Error("engine.batch must be the least, the usual and the most samples of a batch");
            }
            found.batch[i] = batch->items[i].integer;
        }
        return found;
    }

    Selftest selftest(const Spec& spec) const {
        Selftest test;
        const Json* object = values_.find("selftest");
        if (!object || (object->kind == Json::Kind::object && object->items.empty())) return test;
        const Json *seed = object->find("seed"), *conditions = object->find("conditions"), *at = object->find("at"),
                   *values = object->find("values"), *atol = object->find("atol");
        if (object->kind != Json::Kind::object || !is_whole(seed, 0, INT64_MAX) || !is_real(atol) || atol->number < 0 ||
            !is_kind(at, Json::Kind::list) || !is_kind(values, Json::Kind::list) || at->items.empty() ||
            at->items.size() != values->items.size() || !is_kind(conditions, Json::Kind::object)) {
            throw Error("selftest must have seed, conditions, at, values and atol: docs/format.md");
        }
        test.present = true;
        test.seed = static_cast<std::uint64_t>(seed->integer);
        test.atol = atol->number;
        for (std::size_t i = 0; i < at->items.size(); ++i) {
            if (!is_whole(&at->items[i], 0, static_cast<std::int64_t>(spec.size()) - 1) || !is_real(&values->items[i])) {
                throw Error("selftest.at must be indices into a sample and selftest.values numbers");
            }
            test.at.push_back(static_cast<std::size_t>(at->items[i].integer));
            test.values.push_back(values->items[i].number);
        }
        for (std::size_t i = 0; i < conditions->keys.size(); ++i) {
            flatten(conditions->items[i], test.conditions[conditions->keys[i]], 8);
        }
        return test;
    }

    static void flatten(const Json& value, std::vector<double>& out, int depth) {
        if (is_real(&value)) {
            out.push_back(value.number);
        } else if (value.kind == Json::Kind::list && depth > 0) {
            for (const auto& item : value.items) flatten(item, out, depth - 1);
        } else {
            throw Error(text("selftest.conditions must be numbers or lists of them, got ", value.shown()));
        }
    }

    const Json& values_;
};

}  // namespace detail
}  // namespace cmfast
