// Functions from here on, up to target/end.h, are compiled for these instructions, whatever the rest is compiled for.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
