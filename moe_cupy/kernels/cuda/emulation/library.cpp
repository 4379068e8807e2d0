// The one function that the shared library of kernels exports.
#include "emulation.h"

extern "C" __attribute__((visibility("default"))) int emulation_launch(
    const char* kernel, const unsigned* grid, unsigned block, size_t shared_bytes, uint64_t seed, void** args,
    char* trouble, size_t trouble_size) {
    emulation::Shape shape{{grid[0], grid[1], grid[2]}, block, shared_bytes, seed};
    std::string said = emulation::launch(kernel, shape, args);
    snprintf(trouble, trouble_size, "%s", said.c_str());
    return !said.empty();
}
