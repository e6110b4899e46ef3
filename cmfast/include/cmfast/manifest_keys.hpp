// SPDX-License-Identifier: MIT
// The reader of a manifest's JSON keys. cmfast/manifest.hpp finds it in files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "json.hpp"
#include "manifest_conditions.hpp"
#include "manifest_types.hpp"
#include "spec.hpp"

namespace cmfast {

namespace detail {

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
            spec.conditions = conditions(need("conditions"));
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
            if (!right) throw Error(text("sigmas has the key ", in_quotes(key), ", which is not a number of steps"));
            const int steps = std::stoi(key);
            std::vector<double> values;
            for (const auto& item : list.items) {
                if (!is_real(&item)) break;
                values.push_back(item.number);
            }
            if (list.kind != Json::Kind::list || values.size() != list.items.size()) {
                throw Error(text("sigmas holds ", list.shown(), ", which is not a list of noise levels"));
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
