// Runs product.cu on a CPU: FOLDER M N K BLOCKS. Reads a, b (e4m3), scale_a and scale_b (fp32) there, and writes out (fp32).
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include "product.cu"

static std::vector<char> content(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

int main(int, char **arguments) {
    const std::string folder = std::string(arguments[1]) + "/";
    const int M = std::atoi(arguments[2]), N = std::atoi(arguments[3]), K = std::atoi(arguments[4]);
    const int blocks = std::atoi(arguments[5]);
    const auto a = content(folder + "a"), b = content(folder + "b");
    const auto of_a = content(folder + "scale_a"), of_b = content(folder + "scale_b");
    for (const std::vector<char> *codes : {&a, &b}) {
        const auto begin = reinterpret_cast<const uint8_t *>(codes->data());
        readable.push_back({begin, begin + codes->size()});
    }
    std::vector<float> out(static_cast<size_t>(M) * N, NAN);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::vector<std::thread> threads;
        for (int index = 0; index < kThreads; ++index) {
            threads.emplace_back([&, index] {
                threadIdx.x = index;
                product_kernel(reinterpret_cast<const uint8_t *>(a.data()), reinterpret_cast<const uint8_t *>(b.data()),
                               reinterpret_cast<const float *>(of_a.data()), reinterpret_cast<const float *>(of_b.data()),
                               out.data(), M, N, K);
            });
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
    }
    std::ofstream file(folder + "out", std::ios::binary);
    file.write(reinterpret_cast<const char *>(out.data()), out.size() * sizeof(float));
}
