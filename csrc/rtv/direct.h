// The same linear system by elimination, in float64, for checking: a band L D L^T without pivoting (the matrix is
// symmetric and diagonally dominant). O(H W min(H, W)^2) time and H W min(H, W) numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace rtv {

// Solves (I + L) x = x for `channels` planes in place, L the graph Laplacian with weights `east` and `south`
// ([height][width]; the last column of `east` and the last row of `south` are zero).
inline void solve_direct(const std::vector<double>& east, const std::vector<double>& south, int height, int width,
                         int channels, std::vector<double>& x) {
    // Unknowns are numbered along the shorter side, which keeps the band narrow.
    const bool by_columns = height < width;
    const int across = by_columns ? height : width, along = by_columns ? width : height;
    const std::vector<double>&near = by_columns ? south : east, &far = by_columns ? east : south;
    const std::size_t count = std::size_t(height) * width, band = std::size_t(across) + 1;
    const auto pixel = [&](std::size_t i) { return by_columns ? (i % across) * width + i / across : i; };

    // Row i of the upper triangle: rows[i * band + k] is A(i, i + k).
    std::vector<double> rows(count * band, 0.0);
    for (std::size_t i = 0; i < count; ++i) rows[i * band] += 1.0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t line = i % across;
        const auto couple = [&](std::size_t distance, double weight) {
            rows[i * band] += weight;
            rows[(i + distance) * band] += weight;
            rows[i * band + distance] -= weight;
        };
        if (line + 1 < std::size_t(across)) couple(1, near[pixel(i)]);
        if (i / across + 1 < std::size_t(along)) couple(std::size_t(across), far[pixel(i)]);
    }
    for (std::size_t i = 0; i < count; ++i) {
        const double* pivot = &rows[i * band];
        const std::size_t reach = std::min(band, count - i);
        for (std::size_t k = 1; k < reach; ++k) {
            const double factor = pivot[k] / pivot[0];
            if (factor == 0) continue;
            double* target = &rows[(i + k) * band];
            for (std::size_t j = k; j < reach; ++j) target[j - k] -= factor * pivot[j];
        }
    }
    for (int c = 0; c < channels; ++c) {
        double* plane = &x[std::size_t(c) * count];
        for (std::size_t i = 0; i < count; ++i) {
            const double* pivot = &rows[i * band];
            const double value = plane[pixel(i)] / pivot[0];
            for (std::size_t k = 1; k < std::min(band, count - i); ++k) plane[pixel(i + k)] -= pivot[k] * value;
        }
        for (std::size_t i = count; i-- > 0;) {
            const double* pivot = &rows[i * band];
            double value = plane[pixel(i)];
            for (std::size_t k = 1; k < std::min(band, count - i); ++k) value -= pivot[k] * plane[pixel(i + k)];
            plane[pixel(i)] = value / pivot[0];
        }
    }
}

}  // namespace rtv
