/* SPDX-License-Identifier: MIT */
/* A model file from C: from_c model.onnx LIBRARY writes the mean and the deviation of 16 samples. */
#include <cmfast/cmfast.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count, char** arguments) {
    cmfast_error error;
    cmfast_model* model = NULL;
    cmfast_options options = {sizeof options, "onnxruntime", count > 2 ? arguments[2] : NULL, "cpu", 1};
    if (count < 2 || cmfast_open(arguments[1], &options, &model, &error) != CMFAST_OK) {
        fprintf(stderr, "%s\n", count < 2 ? "from_c model.onnx [LIBRARY]" : error.message);
        return 1;
    }
    size_t values = 16;
    for (size_t axis = 0; axis < cmfast_rank(model); ++axis) values *= (size_t)cmfast_dims(model)[axis];
    float* samples = malloc(values * sizeof *samples);
    int failed = !samples || cmfast_set_steps(model, 2, &error) || cmfast_sample(model, 16, 0, 0, samples, &error);
    if (!failed) {
        double sum = 0, squares = 0;
        for (size_t i = 0; i < values; ++i) {
            sum += samples[i];
            squares += samples[i] * samples[i];
        }
        const double mean = sum / (double)values;
        printf("%zu values, mean %.4f, deviation %.4f\n", values, mean, sqrt(squares / (double)values - mean * mean));
    } else {
        fprintf(stderr, "%s\n", samples ? error.message : "no memory");
    }
    free(samples);
    cmfast_close(model);
    return failed;
}
