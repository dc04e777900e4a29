// The instruction sets that the engines are compiled for, and which of them this CPU has.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#define HAVE_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The last two are AVX-512 with products of bfloat16: by dot products of pairs, by tiles.
enum class Isa { portable, avx2, avx512, avx512bf16, amx };

inline bool in_bfloat16(Isa isa) { return isa == Isa::avx512bf16 || isa == Isa::amx; }

// AVX512_BF16: rounding to bfloat16, and dot products of it.
inline bool has_bfloat16() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
#else
    return false;
#endif
}

// Whether the CPU has tiles for bfloat16, and Linux lets this process use them.
inline bool has_tiles() {
#ifdef HAVE_TILES
    static const bool found = [] {
        constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return found;
#else
    return false;
#endif
}

inline bool supports(Isa isa) {
    if (in_bfloat16(isa)) return supports(Isa::avx512) && has_bfloat16() && (isa == Isa::avx512bf16 || has_tiles());
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == Isa::portable;
}

// The best for float32.
inline Isa best_isa() {
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (supports(isa)) return isa;
    return Isa::portable;
}

// Of a set for float32. Throws std::invalid_argument for an unknown name, std::runtime_error for a set that this CPU lacks.
inline Isa isa_named(const std::string& name) {
    const Isa isa = name == "avx512"     ? Isa::avx512
                    : name == "avx2"     ? Isa::avx2
                    : name == "portable" ? Isa::portable
                                         : throw std::invalid_argument("unknown instruction set " + name);
    if (!supports(isa)) throw std::runtime_error("this CPU has no " + name);
    return isa;
}
