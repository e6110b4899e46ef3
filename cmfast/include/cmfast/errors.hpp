// SPDX-License-Identifier: MIT
// Errors that a user can fix. The message is one line: what was got, what is needed, what to type. As cmfast/errors.py.
#pragma once

#include <cstddef>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cmfast {

/// A request that cannot be fulfilled; the base of the others.
class Error : public std::runtime_error {
 public:
    using std::runtime_error::runtime_error;
};

/// A model file is missing, damaged, of the wrong kind, or does not describe itself.
class ArtifactError : public Error {
 public:
    using Error::Error;
};

/// A backend or a device was requested and is not available. There is no fallback.
class BackendError : public Error {
 public:
    using Error::Error;
};

/// Work was done, checked, and found wanting: values that are not finite, a self-test that fails.
class CheckFailed : public Error {
 public:
    using Error::Error;
};

namespace detail {

/// The arguments as one text. Numbers are written as Python's :g writes them, whatever the program's locale is.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    (out << ... << parts);
    return out.str();
}

/// Values as "[3, 32, 32]"; -1 is a size that may vary.
template <class Values>
std::string listed(const Values& values, const char* open = "[", const char* close = "]") {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out << open;
    const char* comma = "";
    for (const auto& value : values) {
        out << comma << value;
        comma = ", ";
    }
    out << close;
    return out.str();
}

/// A text from a file as it appears in an error: quoted, short, without control characters. Not called quoted, because
/// std::quoted would be found for a std::string.
inline std::string in_quotes(const std::string& value) {
    std::string out = "'";
    for (const char c : value) {
        if (out.size() > 80) return out + "'..";
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f) {
            const char* digits = "0123456789abcdef";
            out += "\\x";
            out += digits[byte >> 4];
            out += digits[byte & 15];
        } else {
            out += c;
        }
    }
    return out + "'";
}

}  // namespace detail
}  // namespace cmfast
