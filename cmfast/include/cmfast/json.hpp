// SPDX-License-Identifier: MIT
// A bounded JSON reader for manifests: a few thousand characters, no deep nesting, no key twice. Throws cmfast::Error.
#pragma once

#include <cctype>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace cmfast::detail {

inline constexpr std::size_t max_json_characters = 64'000;  // as cmfast.formats.manifest; written are at most 4,000
inline constexpr int max_json_depth = 64;

/// One JSON value.
struct Json {
    enum class Kind { null, boolean, number, text, list, object };

    Kind kind = Kind::null;
    bool boolean = false;
    bool whole = false;  // a number without fraction and exponent that 64 bits hold: `integer` is it
    std::int64_t integer = 0;
    double number = 0;  // not finite where no double holds it
    std::string text;
    std::vector<std::string> keys;  // of an object
    std::vector<Json> items;        // of a list; the values of an object, in the order of its keys

    /// The value of a key, or null where there is none.
    const Json* find(std::string_view key) const {
        for (std::size_t i = 0; i < keys.size(); ++i) {
            if (keys[i] == key) return &items[i];
        }
        return nullptr;
    }

    /// A short form for errors.
    std::string shown() const {
        switch (kind) {
            case Kind::null: return "None";
            case Kind::boolean: return boolean ? "True" : "False";
            case Kind::number: return whole ? detail::text(integer) : detail::text(number);
            case Kind::text: return in_quotes(text);
            case Kind::list: return detail::text("a list of ", items.size(), " values");
            case Kind::object: break;
        }
        return detail::text("an object of ", items.size(), " keys");
    }
};

/// The code points of valid UTF-8, one at a time; anything else is an Error.
class Utf8 {
 public:
    explicit Utf8(std::string_view bytes) : bytes_(bytes) {}

    bool next(char32_t& code) {
        if (at_ == bytes_.size()) return false;
        const auto first = static_cast<unsigned char>(bytes_[at_++]);
        if (first < 0x80) {
            code = first;
            return true;
        }
        const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
        if (first < 0xC2 || first > 0xF4) throw Error("a string is not UTF-8");
        code = first & (0x3Fu >> more);
        for (int i = 0; i < more; ++i) {
            const unsigned byte = at_ < bytes_.size() ? static_cast<unsigned char>(bytes_[at_++]) : 0;
            if ((byte & 0xC0u) != 0x80u) throw Error("a string is not UTF-8");
            code = code << 6 | (byte & 0x3Fu);
        }
        const char32_t least[] = {0x80, 0x800, 0x10000};
        if (code < least[more - 1] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
            throw Error("a string is not UTF-8");
        }
        return true;
    }

 private:
    std::string_view bytes_;
    std::size_t at_ = 0;
};

/// Number of characters of valid UTF-8; anything else is an Error.
inline std::size_t characters(std::string_view bytes) {
    std::size_t count = 0;
    Utf8 walk(bytes);
    for (char32_t code = 0; walk.next(code);) ++count;
    return count;
}

/// Whether a terminal shows valid UTF-8 as it is: no controls, no line ends, nothing that turns the direction.
inline bool printable(std::string_view bytes) {
    Utf8 walk(bytes);
    for (char32_t c = 0; walk.next(c);) {
        if (c < 0x20 || (c >= 0x7F && c <= 0xA0) || c == 0xAD || (c >= 0x2000 && c <= 0x200F) ||
            (c >= 0x2028 && c <= 0x202F) || (c >= 0x205F && c <= 0x206F) || c == 0x3000 || c == 0xFEFF ||
            (c >= 0xE000 && c <= 0xF8FF) || (c >= 0xFFF0 && c <= 0xFFFB) || (c & 0xFFFE) == 0xFFFE || c >= 0xE0000) {
            return false;
        }
    }
    return true;
}

class JsonReader {
 public:
    explicit JsonReader(std::string_view text) : text_(text) {}

    /// Where the first value ends; what follows it is not looked at.
    std::size_t read_first() {
        element(0);
        return at_;
    }

    Json read() {
        Json value = element(0);
        skip_space();
        if (at_ != text_.size()) fail();
        return value;
    }

 private:
    [[noreturn]] static void fail() { throw Error("it is not JSON"); }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
    }

    bool take(char wanted) {
        skip_space();
        if (peek() != wanted || at_ >= text_.size()) return false;
        ++at_;
        return true;
    }

    bool word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) return false;
        at_ += wanted.size();
        return true;
    }

    Json element(int depth) {
        if (depth > max_json_depth) fail();
        skip_space();
        Json value;
        if (peek() == '{') return object(depth);
        if (peek() == '[') return list(depth);
        if (peek() == '"') {
            value.kind = Json::Kind::text;
            value.text = string();
        } else if (word("null")) {
            value.kind = Json::Kind::null;
        } else if (word("true")) {
            value.kind = Json::Kind::boolean;
            value.boolean = true;
        } else if (word("false")) {
            value.kind = Json::Kind::boolean;
        } else {
            number(value);
        }
        return value;
    }

    Json object(int depth) {
        Json value;
        value.kind = Json::Kind::object;
        take('{');
        if (take('}')) return value;
        do {
            skip_space();
            if (peek() != '"') fail();
            std::string key = string();
            if (!take(':')) fail();
            if (value.find(key)) throw Error(detail::text("the manifest has the key ", in_quotes(key), " twice"));
            value.items.push_back(element(depth + 1));
            value.keys.push_back(std::move(key));
        } while (take(','));
        if (!take('}')) fail();
        return value;
    }

    Json list(int depth) {
        Json value;
        value.kind = Json::Kind::list;
        take('[');
        if (take(']')) return value;
        do {
            value.items.push_back(element(depth + 1));
        } while (take(','));
        if (!take(']')) fail();
        return value;
    }

    std::string string() {
        std::string out;
        ++at_;  // the opening quote
        while (true) {
            if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail();
            const char c = text_[at_++];
            if (c == '"') return out;
            if (c != '\\') {
                out += c;
                continue;
            }
            const char escape = peek();
            ++at_;
            switch (escape) {
                case '"': out += '"'; break;
                case '\\': out += '\\'; break;
                case '/': out += '/'; break;
                case 'b': out += '\b'; break;
                case 'f': out += '\f'; break;
                case 'n': out += '\n'; break;
                case 'r': out += '\r'; break;
                case 't': out += '\t'; break;
                case 'u': append(out, code_point()); break;
                default: fail();
            }
        }
    }

    char32_t hex4() {
        char32_t code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail();
            code = code << 4 | static_cast<char32_t>(digit);
        }
        return code;
    }

    char32_t code_point() {
        const char32_t high = hex4();
        if (high < 0xD800 || high >= 0xE000) return high;
        if (high >= 0xDC00 || !word("\\u")) fail();  // half of a pair is no character
        const char32_t low = hex4();
        if (low < 0xDC00 || low >= 0xE000) fail();
        return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    }

    static void append(std::string& out, char32_t code) {
        const auto byte = [&out](char32_t value) { out += static_cast<char>(static_cast<unsigned char>(value)); };
        if (code < 0x80) {
            byte(code);
        } else if (code < 0x800) {
            byte(0xC0 | code >> 6);
            byte(0x80 | (code & 0x3F));
        } else {
            byte(code < 0x10000 ? 0xE0 | code >> 12 : 0xF0 | code >> 18);
            if (code >= 0x10000) byte(0x80 | (code >> 12 & 0x3F));
            byte(0x80 | (code >> 6 & 0x3F));
            byte(0x80 | (code & 0x3F));
        }
    }

    std::size_t digits() {
        const std::size_t start = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        return at_ - start;
    }

    void number(Json& value) {
        const std::size_t start = at_;
        if (peek() == '-') ++at_;
        const bool zero = peek() == '0';
        const std::size_t count = digits();
        if (count == 0 || (zero && count > 1)) fail();
        bool whole = true;
        if (peek() == '.') {
            ++at_;
            whole = false;
            if (digits() == 0) fail();
        }
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            whole = false;
            if (peek() == '+' || peek() == '-') ++at_;
            if (digits() == 0) fail();
        }
        const std::string_view written = text_.substr(start, at_ - start);
        value.kind = Json::Kind::number;
        value.number = real(written);
        if (whole) {
            const auto result = std::from_chars(written.data(), written.data() + written.size(), value.integer);
            value.whole = result.ec == std::errc();
        }
    }

    static double real(std::string_view written) {
        double value = 0;
#if defined(__cpp_lib_to_chars)
        const auto result = std::from_chars(written.data(), written.data() + written.size(), value);
        return result.ec == std::errc() ? value : std::numeric_limits<double>::quiet_NaN();
#else  // libc++ before 20
        std::istringstream in{std::string(written)};
        in.imbue(std::locale::classic());
        return in >> value ? value : std::numeric_limits<double>::quiet_NaN();
#endif
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

/// Parse JSON in UTF-8 of at most `max_json_characters`.
inline Json parse_json(std::string_view text) {
    if (characters(text) > max_json_characters) throw Error("it is too long");
    return JsonReader(text).read();
}

}  // namespace cmfast::detail
