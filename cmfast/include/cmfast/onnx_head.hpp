// SPDX-License-Identifier: MIT
// As much protobuf as it takes to look into an ONNX file: its metadata, its opset, where external weights would be.
//
// As cmfast/formats/protobuf.py. Field numbers are those of onnx.proto. Nothing is copied but the metadata; every
// length is checked. Throws cmfast::Error with what is wrong; who knows the file adds its name.
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

namespace cmfast {

/// What is kept of a ModelProto.
struct OnnxHead {
    std::uint64_t ir = 0;
    std::uint64_t opset = 0;  // of the default domain
    std::map<std::string, std::string> metadata;
    std::vector<std::string> external;  // where external tensors say that their data is
    bool graph = false;
};

namespace detail {

/// The fields of one message, one after the other.
class Fields {
 public:
    explicit Fields(std::string_view data) : data_(data) {}

    std::uint64_t number = 0;
    bool is_bytes = false;    // else `value`
    std::uint64_t value = 0;  // the largest where 64 bits do not hold it
    std::string_view bytes;   // of a length-delimited or fixed-width field

    bool next() {
        if (at_ >= data_.size()) return false;
        const std::uint64_t key = varint();
        number = key >> 3;
        // Other readers keep 32 bits of a key, and would see another field.
        if (key >= std::uint64_t{1} << 32 || number == 0) {
            throw Error(detail::text("field number ", number, " at byte ", at_));
        }
        const auto wire = static_cast<unsigned>(key & 7);
        is_bytes = wire != 0;
        if (!is_bytes) {
            value = varint();
            return true;
        }
        std::uint64_t length = 0;
        if (wire == 2) {
            length = varint();
        } else if (wire == 1 || wire == 5) {
            length = wire == 1 ? 8 : 4;
        } else {
            throw Error(detail::text("wire type ", wire, " at byte ", at_));
        }
        if (length > data_.size() - at_) {
            throw Error(detail::text(length, " bytes are announced where ", data_.size() - at_,
                                     " are left; it is truncated"));
        }
        bytes = data_.substr(at_, static_cast<std::size_t>(length));
        at_ += bytes.size();
        return true;
    }

 private:
    std::uint64_t varint() {
        std::uint64_t result = 0;
        bool overflow = false;
        for (unsigned shift = 0;; shift += 7) {
            if (at_ >= data_.size() || shift > 63) {
                throw Error("a number runs past its end; it is truncated or not ONNX");
            }
            const auto byte = static_cast<unsigned char>(data_[at_++]);
            const std::uint64_t bits = byte & 0x7Fu;
            overflow = overflow || (shift == 63 && bits > 1);
            result |= bits << shift;
            if (byte < 0x80) return overflow ? ~std::uint64_t{0} : result;
        }
    }

    std::string_view data_;
    std::size_t at_ = 0;
};

class OnnxReader {
 public:
    OnnxHead read(std::string_view data) {
        for (Fields f(data); f.next();) {
            if (f.number == 1 && !f.is_bytes) {
                head_.ir = f.value;
            } else if (f.number == 7 && f.is_bytes) {
                head_.graph = true;
                graph(f.bytes, 0);
            } else if (f.number == 8 && f.is_bytes) {
                opset(f.bytes);
            } else if (f.number == 14 && f.is_bytes) {
                metadata(f.bytes);
            } else if (f.number == 20 && f.is_bytes) {  // training information: two graphs
                for (Fields inner(f.bytes); inner.next();) {
                    if ((inner.number == 1 || inner.number == 2) && inner.is_bytes) graph(inner.bytes, 0);
                }
            } else if (f.number == 25 && f.is_bytes) {  // a function
                for (Fields inner(f.bytes); inner.next();) {
                    if (inner.number == 7 && inner.is_bytes) node(inner.bytes, 0);
                    if (inner.number == 11 && inner.is_bytes) attribute(inner.bytes, 0);  // a default attribute
                }
            }
        }
        if (!head_.graph) throw Error("it holds no graph");
        return std::move(head_);
    }

 private:
    static constexpr int max_depth = 32;  // graphs inside attributes of nodes inside graphs

    void opset(std::string_view data) {
        std::string_view domain;
        bool domain_is_bytes = true;
        std::uint64_t version = 0;
        for (Fields f(data); f.next();) {
            if (f.number == 1) {
                domain_is_bytes = f.is_bytes;
                domain = f.is_bytes ? f.bytes : std::string_view();
            }
            if (f.number == 2) version = f.is_bytes ? 0 : f.value;
        }
        if (domain_is_bytes && (domain.empty() || domain == "ai.onnx")) head_.opset = version;
    }

    void metadata(std::string_view data) {
        auto [key, value] = string_pair(data);
        if (key == "cmfast" && head_.metadata.count(key)) {  // of two, readers take one or the other
            throw Error("it holds two cmfast manifests");
        }
        head_.metadata[key] = value;
    }

    void graph(std::string_view data, int depth) {
        if (depth > max_depth) throw Error("graphs are nested too deeply");
        for (Fields f(data); f.next();) {
            if (!f.is_bytes) continue;
            if (f.number == 1) node(f.bytes, depth);
            if (f.number == 5) tensor(f.bytes);
            if (f.number == 15) sparse(f.bytes);
        }
    }

    void node(std::string_view data, int depth) {
        for (Fields f(data); f.next();) {
            if (f.number == 5 && f.is_bytes) attribute(f.bytes, depth);
        }
    }

    void attribute(std::string_view data, int depth) {
        for (Fields f(data); f.next();) {
            if (!f.is_bytes) continue;
            if (f.number == 5 || f.number == 10) tensor(f.bytes);
            if (f.number == 6 || f.number == 11) graph(f.bytes, depth + 1);
            if (f.number == 22 || f.number == 23) sparse(f.bytes);
        }
    }

    void sparse(std::string_view data) {
        for (Fields f(data); f.next();) {
            if ((f.number == 1 || f.number == 2) && f.is_bytes) tensor(f.bytes);
        }
    }

    void tensor(std::string_view data) {
        bool external = false, located = false;
        for (Fields f(data); f.next();) {
            if (f.number == 13 && f.is_bytes) {
                external = true;
                auto [key, value] = string_pair(f.bytes);
                if (key == "location") {
                    located = true;
                    head_.external.push_back(value);
                }
            } else if (f.number == 14 && !f.is_bytes && f.value == 1) {
                external = true;
            }
        }
        if (external && !located) head_.external.emplace_back();
    }

    static std::pair<std::string, std::string> string_pair(std::string_view data) {
        std::string_view key, value;
        bool right = true;
        for (Fields f(data); f.next();) {
            if (f.number == 1 || f.number == 2) {
                right = right && f.is_bytes;
                (f.number == 1 ? key : value) = f.bytes;
            }
        }
        if (!right) throw Error("a string is not a string");
        characters(key);  // throws where it is not UTF-8
        characters(value);
        return {std::string(key), std::string(value)};
    }

    OnnxHead head_;
};

}  // namespace detail

/// Read the header, the metadata and the locations of external data in the bytes of an ONNX file.
inline OnnxHead parse_onnx_head(std::string_view data) { return detail::OnnxReader().read(data); }

}  // namespace cmfast
