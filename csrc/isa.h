// The instruction sets that the engines are compiled for, and which of them this CPU has.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

enum class Isa { portable, avx2, avx512 };

inline bool supports(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == Isa::portable;
}

inline Isa best_isa() {
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (supports(isa)) return isa;
    return Isa::portable;
}

// Throws std::invalid_argument for an unknown name, std::runtime_error for a set that this CPU lacks.
inline Isa isa_named(const std::string& name) {
    const Isa isa = name == "avx512"     ? Isa::avx512
                    : name == "avx2"     ? Isa::avx2
                    : name == "portable" ? Isa::portable
                                         : throw std::invalid_argument("unknown instruction set " + name);
    if (!supports(isa)) throw std::runtime_error("this CPU has no " + name);
    return isa;
}
