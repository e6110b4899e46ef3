// SPDX-License-Identifier: MIT
// Draws images from a model file: draw model.onnx images.png [STEPS [SEED [N [LABEL]]]]
#include <cmfast/cmfast.hpp>
#include <cmfast/onnxruntime.hpp>

#include <cstdlib>
#include <fstream>
#include <iostream>

namespace {

using Bytes = std::vector<std::uint8_t>;

void big_endian(Bytes& out, std::uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<std::uint8_t>(value >> shift));
}

void chunk(std::ofstream& file, const char* type, const Bytes& data) {
    Bytes out(type, type + 4);
    out.insert(out.end(), data.begin(), data.end());
    std::uint32_t crc = 0xFFFFFFFFu;
    for (const std::uint8_t byte : out) {
        crc ^= byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
    }
    big_endian(out, ~crc);
    Bytes length;
    big_endian(length, static_cast<std::uint32_t>(data.size()));
    file.write(reinterpret_cast<const char*>(length.data()), 4);
    file.write(reinterpret_cast<const char*>(out.data()), static_cast<std::streamsize>(out.size()));
}

/// Write rows of bytes, grey or RGB, as a PNG without compression.
void write_png(const char* path, const Bytes& pixels, std::uint32_t width, std::uint32_t height, std::uint32_t channels) {
    std::ofstream file(path, std::ios::binary);
    file.write("\x89PNG\r\n\x1a\n", 8);
    Bytes header, data = {0x78, 0x01};
    big_endian(header, width);
    big_endian(header, height);
    for (const int byte : {8, channels == 3 ? 2 : 0, 0, 0, 0}) header.push_back(static_cast<std::uint8_t>(byte));
    const std::uint32_t row = 1 + width * channels;  // a filter type, then the pixels
    std::uint32_t a = 1, b = 0;                      // Adler-32
    for (std::uint32_t y = 0; y < height; ++y) {
        for (const std::uint32_t byte : {y + 1 == height ? 1u : 0u, row & 255, row >> 8, ~row & 255, ~row >> 8 & 255}) {
            data.push_back(static_cast<std::uint8_t>(byte));  // a stored block of deflate
        }
        for (std::uint32_t x = 0; x < row; ++x) {
            data.push_back(x ? pixels[y * (row - 1) + x - 1] : std::uint8_t{0});
            a = (a + data.back()) % 65521;
            b = (b + a) % 65521;
        }
    }
    big_endian(data, b << 16 | a);
    chunk(file, "IHDR", header);
    chunk(file, "IDAT", data);
    chunk(file, "IEND", {});
    if (!file.flush()) throw cmfast::Error(std::string(path) + ": it cannot be written");
}

}  // namespace

int main(int count, char** arguments) try {
    if (count < 3) throw cmfast::Error("draw model.onnx images.png [STEPS [SEED [N [LABEL]]]]");
    const auto number = [&](int at, int otherwise) { return count > at ? std::atoi(arguments[at]) : otherwise; };
    cmfast::Model model = cmfast::onnxruntime::load(arguments[1]);
    model.steps(number(3, 0));
    if (count > 6) model.set("label", number(6, 0));
    const auto n = static_cast<std::size_t>(number(5, 8));
    std::vector<float> images(n * model.spec().size());
    model.sample(n, static_cast<std::uint64_t>(number(4, 0)), images.data());
    Bytes pixels(images.size());  // [n, H, W, C]: one image below the other
    cmfast::to_uint8(images.data(), n, model.spec(), pixels.data());
    const auto side = [&](std::size_t axis) { return static_cast<std::uint32_t>(model.spec().shape[axis]); };
    write_png(arguments[2], pixels, side(2), side(1) * static_cast<std::uint32_t>(n), side(0));
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
