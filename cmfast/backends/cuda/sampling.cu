// SPDX-License-Identifier: MIT
// What few-step sampling does around the network, on the device: noise, noise levels, renoising, clipping, pixels.
//
// The bits are those of cmfast/noise.py and cmfast/sampling.py. Every product, sum and quotient is rounded once, by the
// intrinsics __fmul_rn, __dadd_rn and so on, which no compiler fuses; the order of operations is that of Python.
// benchmarks/make_ptx.py compiles this file to sampling.ptx, which the driver translates for its card.
//
// A request is the seed, then the index of each sample: uint64 [1 + samples]. All arrays are contiguous.

typedef unsigned int u32;
typedef unsigned long long u64;

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
struct Words {
    u32 w[4];
};

__device__ __forceinline__ Words philox(Words counter, u64 seed) {
    u32 c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 product0 = (u64)0xD2511F53u * c0, product1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(product1 >> 32) ^ c1 ^ k0;
        c1 = (u32)product1;
        c2 = (u32)(product0 >> 32) ^ c3 ^ k1;
        c3 = (u32)product0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Words{{c0, c1, c2, c3}};
}

// Horner's scheme, lowest power first.
template <int N>
__device__ __forceinline__ double polynomial(const double (&coefficients)[N], double x) {
    double total = coefficients[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; --i) total = __dadd_rn(__dmul_rn(total, x), coefficients[i]);
    return total;
}

// ln(x) for 0 < x < 1, normal: x = m 2^e, ln(m) = 2 atanh((m - 1) / (m + 1)).
__device__ __forceinline__ double logarithm(double x) {
    const double atanh[11] = {2.0,        2.0 / 3.0,  2.0 / 5.0,  2.0 / 7.0,  2.0 / 9.0, 2.0 / 11.0,
                              2.0 / 13.0, 2.0 / 15.0, 2.0 / 17.0, 2.0 / 19.0, 2.0 / 21.0};
    u64 bits = (u64)__double_as_longlong(x);
    int e = (int)((bits >> 52) & 0x7FF) - 1022;
    double m = __longlong_as_double((long long)((bits & 0xFFFFFFFFFFFFFull) | 0x3FE0000000000000ull));  // [1/2, 1)
    if (m < 0.70710678118654752) {
        m = __dmul_rn(m, 2.0);
        e -= 1;
    }
    double s = __ddiv_rn(__dadd_rn(m, -1.0), __dadd_rn(m, 1.0));
    double series = __dmul_rn(s, polynomial(atanh, __dmul_rn(s, s)));
    return __dadd_rn(__dmul_rn((double)e, 0.693147180559945309417), series);
}

// The normal quantile of (bits + 1/2) / 2^32: Wichura, "Algorithm AS 241" (1988), PPND16, without its far tail.
__device__ __forceinline__ float normal(u32 bits) {
    const double centre[2][8] = {
        {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
         4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3},
        {1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
         2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3}};
    const double tail[2][8] = {
        {1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
         1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4},
        {1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
         1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9}};
    double q = __dadd_rn(__dadd_rn(__dmul_rn((double)bits, 0x1p-32), 0x1p-33), -0.5);  // exact
    double side = fabs(q);
    if (side <= 0.425) {
        double r = __dadd_rn(0.180625, -__dmul_rn(q, q));
        return (float)__dmul_rn(q, __ddiv_rn(polynomial(centre[0], r), polynomial(centre[1], r)));
    }
    double r = __dadd_rn(__dsqrt_rn(-logarithm(__dadd_rn(0.5, -side))), -1.6);
    double z = __ddiv_rn(polynomial(tail[0], r), polynomial(tail[1], r));
    return (float)(q < 0 ? -z : z);
}

// Clipped where it is finite, else NaN; unclipped where `clip` is 0.
__device__ __forceinline__ float clipped(float x0, u32 clip) {
    if (!clip) return x0;
    return __fadd_rn(fminf(fmaxf(x0, -1.0f), 1.0f), __fsub_rn(x0, x0));
}

// Call with (i, z) the unit noise of one step: z of element i of [samples, size]. A thread draws four at a time.
template <typename Take>
__device__ __forceinline__ void each_noise(const u64* request, u64 samples, u64 size, u32 step, Take take) {
    u64 blocks = (size + 3) / 4, threads = (u64)gridDim.x * blockDim.x;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < samples * blocks; at += threads) {
        u64 sample = at / blocks, block = at - sample * blocks, index = request[1 + sample];
        Words words = philox(Words{{(u32)block, step, (u32)index, (u32)(index >> 32)}}, request[0]);
#pragma unroll 1
        for (int lane = 0; lane < 4; ++lane) {
            u32 bits = lane == 0 ? words.w[0] : lane == 1 ? words.w[1] : lane == 2 ? words.w[2] : words.w[3];
            u64 value = 4 * block + lane;
            if (value < size) take(sample * size + value, normal(bits));
        }
    }
}

template <typename Take>
__device__ __forceinline__ void each(u64 count, Take take) {
    u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) take(i);
}

// x [samples, size] = x0 + std * noise of a step, or std * noise where x0 is null.
extern "C" __global__ void add_noise(
    float* x, const float* x0, const u64* request, u64 samples, u64 size, u32 step, float std, u32 clip) {
    each_noise(request, samples, size, step, [=](u64 i, float z) {
        float scaled = __fmul_rn(std, z);
        x[i] = x0 ? __fadd_rn(clipped(x0[i], clip), scaled) : scaled;
    });
}

// x = x0 + ratio * (x - x0): the same noise, less of it.
extern "C" __global__ void less_noise(float* x, const float* x0, u64 count, float ratio, u32 clip) {
    each(count, [=](u64 i) {
        float clean = clipped(x0[i], clip);
        x[i] = __fadd_rn(clean, __fmul_rn(ratio, __fsub_rn(x[i], clean)));
    });
}

extern "C" __global__ void fill(float* to, u64 count, float value) {
    each(count, [=](u64 i) { to[i] = value; });
}

// Samples, and a word that becomes 1 where one is not finite.
extern "C" __global__ void values(float* to, u32* not_finite, const float* x0, u64 count, u32 clip) {
    each(count, [=](u64 i) {
        float value = clipped(x0[i], clip);
        if (!isfinite(value)) *not_finite = 1;
        to[i] = value;
    });
}

// Images uint8 [samples, positions, channels] of x0 [samples, channels, positions] in [-1, 1]: halves to even.
extern "C" __global__ void pixels(
    unsigned char* to, u32* not_finite, const float* x0, u64 samples, u64 channels, u64 positions, u32 clip) {
    each(samples * positions * channels, [=](u64 i) {
        u64 place = i / channels, channel = i - place * channels, sample = place / positions;
        u64 position = place - sample * positions;
        float value = clipped(x0[(sample * channels + channel) * positions + position], clip);
        if (!isfinite(value)) *not_finite = 1;
        float level = __fmul_rn(__fadd_rn(value, 1.0f), 127.5f);
        to[i] = (unsigned char)rintf(fminf(fmaxf(level, 0.0f), 255.0f));
    });
}
