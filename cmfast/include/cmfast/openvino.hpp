// SPDX-License-Identifier: MIT
// OpenVINO as a backend, through its C interface, loaded at run time: nothing of it at compile or link time.
//
//   cmfast::Model model = cmfast::openvino::load("model.onnx");      // or an IR, "model.xml" with "model.bin" beside it
//
// The library     options.library, a file or a folder (site-packages/openvino/libs); else $CMFAST_OPENVINO; else
//                 libopenvino_c.so where the system finds it. Tested with 2026.4
// Batches         a graph is compiled for the shapes of a call, which makes it about twice as fast as one for any batch;
//                 a call with another batch size compiles again, so keep to one, or to Model::batch
// Precision       an ONNX file in float32 ("INFERENCE_PRECISION_HINT" f32) where a CPU would else take bfloat16; an IR in
//                 the precision that it was verified in, which the CPU must have
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "ir_head.hpp"
#include "library.hpp"
#include "manifest.hpp"
#include "model.hpp"

namespace cmfast::openvino {

struct Options {
    std::filesystem::path library;                    // file or folder; empty: see above
    std::string device = "CPU";                       // as OpenVINO names it: CPU, GPU, NPU, ..
    int threads = 0;                                  // CPU threads; 0: the library's choice
    std::map<std::string, std::string> properties{};  // of the compiled model, by OpenVINO's names; at most six
};

namespace abi {  // of openvino/c/*.h: opaque pointers, and structs that are passed by value

struct Core;
struct GraphModel;
struct Compiled;
struct Request;
struct HostTensor;
struct Port;
struct Shape {
    std::int64_t rank;
    std::int64_t* dims;
};
struct Dimension {
    std::int64_t min, max;
};
struct PartialShape {
    Dimension rank;
    Dimension* dims;
};

/// The functions that are used, found by name.
struct Api {
    explicit Api(const std::filesystem::path& wanted) : library(wanted, names()) {
        find(core_create, "ov_core_create");
        find(core_free, "ov_core_free");
        find(read_model, "ov_core_read_model_from_memory_buffer");
        find(core_property, "ov_core_get_property");
        find(compile_model, "ov_core_compile_model");
        find(model_free, "ov_model_free");
        find(model_reshape, "ov_model_reshape");
        find(inputs_size, "ov_model_inputs_size");
        find(outputs_size, "ov_model_outputs_size");
        find(input, "ov_model_const_input_by_index");
        find(output, "ov_model_const_output_by_index");
        find(port_name, "ov_port_get_any_name");
        find(port_type, "ov_port_get_element_type");
        find(port_shape, "ov_port_get_partial_shape");
        find(port_free, "ov_output_const_port_free");
        find(partial_shape_free, "ov_partial_shape_free");
        find(text_free, "ov_free");
        find(compiled_free, "ov_compiled_model_free");
        find(create_request, "ov_compiled_model_create_infer_request");
        find(request_free, "ov_infer_request_free");
        find(set_tensor, "ov_infer_request_set_tensor");
        find(infer, "ov_infer_request_infer");
        find(tensor_of, "ov_tensor_create_from_host_ptr");
        find(tensor_bytes, "ov_tensor_get_byte_size");
        find(tensor_free, "ov_tensor_free");
        find(last_error, "ov_get_last_err_msg");
    }

    detail::Library library;
    int (*core_create)(Core**) = nullptr;
    void (*core_free)(Core*) = nullptr;
    int (*read_model)(const Core*, const char*, std::size_t, const HostTensor*, GraphModel**) = nullptr;
    int (*core_property)(const Core*, const char*, const char*, char**) = nullptr;
    int (*compile_model)(const Core*, const GraphModel*, const char*, std::size_t, Compiled**, ...) = nullptr;
    void (*model_free)(GraphModel*) = nullptr;
    int (*model_reshape)(const GraphModel*, const char**, const PartialShape*, std::size_t) = nullptr;
    int (*inputs_size)(const GraphModel*, std::size_t*) = nullptr;
    int (*outputs_size)(const GraphModel*, std::size_t*) = nullptr;
    int (*input)(const GraphModel*, std::size_t, Port**) = nullptr;
    int (*output)(const GraphModel*, std::size_t, Port**) = nullptr;
    int (*port_name)(const Port*, char**) = nullptr;
    int (*port_type)(const Port*, int*) = nullptr;
    int (*port_shape)(const Port*, PartialShape*) = nullptr;
    void (*port_free)(Port*) = nullptr;
    void (*partial_shape_free)(PartialShape*) = nullptr;
    void (*text_free)(const char*) = nullptr;
    void (*compiled_free)(Compiled*) = nullptr;
    int (*create_request)(const Compiled*, Request**) = nullptr;
    void (*request_free)(Request*) = nullptr;
    int (*set_tensor)(Request*, const char*, const HostTensor*) = nullptr;
    int (*infer)(Request*) = nullptr;
    int (*tensor_of)(int, Shape, void*, HostTensor**) = nullptr;
    int (*tensor_bytes)(const HostTensor*, std::size_t*) = nullptr;
    void (*tensor_free)(HostTensor*) = nullptr;
    const char* (*last_error)() = nullptr;

    /// What the last failed call said, as one line.
    std::string why() const {
        const char* said = last_error();
        std::string message = said ? said : "unknown error";
        if (said) text_free(said);
        for (char& c : message) c = c == '\n' || c == '\r' ? ' ' : c;
        return message.substr(0, 300);
    }

 private:
    template <class Function>
    void find(Function& function, const char* name) {
        function = library.find<Function>(name);
        if (!function) throw BackendError(library.name() + ": not OpenVINO's C interface, it has no " + name);
    }

    static detail::LibraryNames names() {
        const char* fix = "set CMFAST_OPENVINO to the library or its folder: python -m cmfast --openvino prints it";
#if defined(_WIN32)
        return {"OpenVINO", "CMFAST_OPENVINO", "openvino_c", {"openvino_c.dll"}, fix};
#elif defined(__APPLE__)
        return {"OpenVINO", "CMFAST_OPENVINO", "libopenvino_c", {"libopenvino_c.dylib"}, fix};
#else
        return {"OpenVINO", "CMFAST_OPENVINO", "libopenvino_c", {"libopenvino_c.so"}, fix};
#endif
    }
};

}  // namespace abi

/// A graph on OpenVINO.
class OpenVinoBackend final : public Backend {
 public:
    OpenVinoBackend(const std::filesystem::path& path, const Options& options)
        : OpenVinoBackend(path.string(), detail::read_file(path), options,
                          path.extension() == ".xml" ? detail::read_file(weights_of(path)) : std::string()) {}

    /// The same of the bytes of an ONNX file, or of an IR's .xml with those of its .bin; `where` names it in errors.
    OpenVinoBackend(const std::string& where, const std::string& bytes, Options options, std::string weights = {})
        : where_(where),
          weights_(std::move(weights)),
          manifest_(weights_.empty() ? parse_onnx_manifest(bytes, where) : parse_ir_manifest(bytes, weights_, where)),
          options_(std::move(options)),
          api_(std::make_shared<abi::Api>(options_.library)) {
        name_ = "OpenVINO " + options_.device;
        const auto flavour = manifest_.made_by.find("flavour");
        if (flavour != manifest_.made_by.end()) {
            throw ArtifactError(where_ + ": a graph of the flavour " + flavour->second + ", not for OpenVINO; export the "
                                "checkpoint again with --format onnx");
        }
        const char* precision = manifest_.dtype == "bfloat16" ? "bf16" : manifest_.dtype == "float16" ? "f16" : "f32";
        const bool ours = options_.properties.emplace("INFERENCE_PRECISION_HINT", precision).second;
        if (options_.threads) options_.properties.emplace("INFERENCE_NUM_THREADS", std::to_string(options_.threads));
        if (options_.properties.size() > 8) throw Error("at most six properties are passed to OpenVINO");
        abi::Core* core = nullptr;
        check(api_->core_create(&core), "cannot start");
        core_ = {core, api_->core_free};
        if (ours && options_.device == "CPU") check_precision();
        abi::GraphModel* model = nullptr;
        const Owned<abi::HostTensor> weights_tensor = tensor_of_weights();
        if (api_->read_model(core, bytes.data(), bytes.size(), weights_tensor.get(), &model)) {
            throw ArtifactError(where_ + ": OpenVINO cannot read it: " + api_->why());
        }
        model_ = {model, api_->model_free};
        check_graph();
    }

    const Manifest& manifest() const override { return manifest_; }
    const std::string& name() const override { return name_; }
    std::size_t batch() const override { return batch_; }

    void bind(std::vector<Tensor>& inputs, Tensor& output) override {
        tensors_.clear();
        request_.reset();
        std::vector<const char*> names;
        std::vector<std::vector<abi::Dimension>> dims;
        std::vector<abi::PartialShape> shapes;
        for (const Tensor& input : inputs) {
            names.push_back(input.name.c_str());
            dims.emplace_back();
            for (const std::int64_t side : input.shape) dims.back().push_back({side, side});
        }
        for (auto& each : dims) {
            const auto rank = static_cast<std::int64_t>(each.size());
            shapes.push_back({{rank, rank}, each.data()});
        }
        check(api_->model_reshape(model_.get(), names.data(), shapes.data(), shapes.size()), "cannot take these shapes");
        compile();
        abi::Request* request = nullptr;
        check(api_->create_request(compiled_.get(), &request), "cannot start");
        request_ = {request, api_->request_free};
        for (Tensor& input : inputs) set(input);
        set(output);
    }

    void run() override { check(api_->infer(request_.get()), "failed; if memory is short, try a smaller batch"); }

 private:
    template <class T>
    using Owned = std::unique_ptr<T, void (*)(T*)>;

    void check(int status, const char* what) const {
        if (status) throw BackendError(name_ + " " + what + ": " + api_->why());
    }

    /// Throw where the CPU lacks the precision of the file: OpenVINO would take another without a word.
    void check_precision() const {
        const std::string word = manifest_.dtype == "bfloat16" ? "BF16" : manifest_.dtype == "float16" ? "FP16" : "FP32";
        char* found = nullptr;
        check(api_->core_property(core_.get(), "CPU", "OPTIMIZATION_CAPABILITIES", &found), "cannot tell what it can do");
        const std::string have = found;
        api_->text_free(found);
        if ((" " + have + " ").find(" " + word + " ") != std::string::npos) return;
        throw BackendError(where_ + ": " + manifest_.dtype + ", which OpenVINO lacks on this CPU (it has " + have +
                           "); set the property INFERENCE_PRECISION_HINT to f32");
    }

    /// The weights of an IR as a tensor of bytes, null for an ONNX file. Codes of types differ between versions; sizes
    /// tell which of two is int8.
    Owned<abi::HostTensor> tensor_of_weights() {
        std::int64_t size = static_cast<std::int64_t>(weights_.size());
        for (const int code : {7, 8}) {
            if (weights_.empty()) break;
            abi::HostTensor* host = nullptr;
            if (api_->tensor_of(code, abi::Shape{1, &size}, weights_.data(), &host)) continue;
            Owned<abi::HostTensor> owned{host, api_->tensor_free};
            std::size_t bytes = 0;
            check(api_->tensor_bytes(host, &bytes), "cannot take the weights");
            if (bytes == weights_.size()) return owned;
        }
        if (!weights_.empty()) throw BackendError(name_ + " cannot take the weights of an IR from memory");
        return {nullptr, api_->tensor_free};
    }

    void compile() {
        const char* p[16] = {};
        std::size_t count = 0;
        for (const auto& [key, value] : options_.properties) {
            p[count++] = key.c_str();
            p[count++] = value.c_str();
        }
        abi::Compiled* compiled = nullptr;
        check(api_->compile_model(core_.get(), model_.get(), options_.device.c_str(), count, &compiled, p[0], p[1], p[2],
                                  p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15]),
              "cannot compile it");
        compiled_ = {compiled, api_->compiled_free};
    }

    void set(Tensor& tensor) {
        const std::size_t bytes = tensor.is_number ? tensor.numbers.size() * sizeof(std::int64_t)
                                                   : tensor.floats.size() * sizeof(float);
        void* data = tensor.is_number ? static_cast<void*>(tensor.numbers.data()) : tensor.floats.data();
        abi::HostTensor* host = nullptr;
        const abi::Shape shape = {static_cast<std::int64_t>(tensor.shape.size()), tensor.shape.data()};
        check(api_->tensor_of(types_.at(tensor.name), shape, data, &host), "cannot take a buffer");
        tensors_.emplace_back(host, api_->tensor_free);
        // OpenVINO's codes of types differ between versions; sizes tell float32 and int64 from the others of a code.
        std::size_t found = 0;
        check(api_->tensor_bytes(host, &found), "cannot take a buffer");
        if (found != bytes) wrong(tensor.name + " is not " + (tensor.is_number ? "int64" : "float32"));
        check(api_->set_tensor(request_.get(), tensor.name.c_str(), host), "cannot take a buffer");
    }

    [[noreturn]] void wrong(const std::string& what) const { throw ArtifactError(where_ + ": the graph's " + what); }

    /// Keep an input or output's type by its name; return the name and the shape, -1 where a size is free.
    std::pair<std::string, std::vector<std::int64_t>> port(abi::Port* pointer) {
        const Owned<abi::Port> port{pointer, api_->port_free};
        char* name = nullptr;
        check(api_->port_name(pointer, &name), "cannot name an input");
        std::pair<std::string, std::vector<std::int64_t>> found = {name, {}};
        api_->text_free(name);
        check(api_->port_type(pointer, &types_[found.first]), "cannot tell a type");
        abi::PartialShape shape{};
        check(api_->port_shape(pointer, &shape), "cannot tell a shape");
        for (std::int64_t i = 0; i < shape.rank.max; ++i) {
            found.second.push_back(shape.dims[i].min == shape.dims[i].max ? shape.dims[i].max : -1);
        }
        api_->partial_shape_free(&shape);
        return found;
    }

    /// Throw unless the graph takes and gives what the manifest says; find its fixed batch size, if it has one.
    void check_graph() {
        const std::vector<std::string> wanted = detail::input_names(manifest_);
        std::size_t count = 0;
        check(api_->inputs_size(model_.get(), &count), "cannot count the inputs");
        std::vector<std::string> found;
        for (std::size_t i = 0; i < count; ++i) {
            abi::Port* pointer = nullptr;
            check(api_->input(model_.get(), i, &pointer), "cannot find an input");
            const auto [name, shape] = port(pointer);
            found.push_back(name);
            if (name == wanted[0]) batch_ = detail::fixed_batch(manifest_, name, shape, where_);
            const int type = types_.at(name);
            const bool number = detail::is_class(manifest_, name);
            if (number ? type != 10 && type != 11 : type != 4 && type != 5) {  // of I64 and F32, see `set`
                wrong(name + (number ? " is not int64" : " is not float32"));
            }
        }
        detail::check_names(wanted, found, where_);
        check(api_->outputs_size(model_.get(), &count), "cannot count the outputs");
        if (count != 1) wrong(detail::text("outputs are ", count, "; its manifest needs one"));
        abi::Port* pointer = nullptr;
        check(api_->output(model_.get(), 0, &pointer), "cannot find the output");
        const auto [name, shape] = port(pointer);
        if (!types_.count(manifest_.output())) wrong("output is " + name + ", not " + manifest_.output());
    }

    std::string where_, name_;
    std::string weights_;  // of an IR, which the model points into; empty: an ONNX file
    Manifest manifest_;
    Options options_;
    std::shared_ptr<const abi::Api> api_;
    std::size_t batch_ = 0;
    std::map<std::string, int> types_;  // OpenVINO's codes, by the name of an input or output
    // In the order of their making: what is made later goes first.
    Owned<abi::Core> core_{nullptr, nullptr};
    Owned<abi::GraphModel> model_{nullptr, nullptr};
    Owned<abi::Compiled> compiled_{nullptr, nullptr};
    Owned<abi::Request> request_{nullptr, nullptr};
    std::vector<Owned<abi::HostTensor>> tensors_;
};

/// Open an ONNX file or an IR on OpenVINO.
inline Model load(const std::filesystem::path& path, const Options& options = {}) {
    return Model(std::make_unique<OpenVinoBackend>(path, options));
}

}  // namespace cmfast::openvino
