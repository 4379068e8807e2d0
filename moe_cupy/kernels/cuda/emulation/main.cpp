// Runs the launches of a file and writes all buffers back: what the sanitizers watch. Usage: program IN OUT.
// The file: the number of buffers, and of each its size and bytes; the number of launches. A launch: name, grid (3),
// block, shared bytes, seed, number of arguments; an argument: its kind, then 8 bytes of a scalar ('s'), or the number
// of a buffer ('b'), or a count and as many numbers of buffers whose addresses are the argument ('p'). Numbers are 8
// bytes. Each buffer is an allocation of its exact size.
#include "emulation.h"

using Buffer = std::pair<char*, size_t>;

struct File {
    FILE* at;
    void bytes(void* to, size_t n) {
        if (fread(to, 1, n, at) != n) exit(3);
    }
    uint64_t number() {
        uint64_t n;
        bytes(&n, 8);
        return n;
    }
    Buffer buffer() {
        size_t n = number();
        char* data = (char*)malloc(n);
        bytes(data, n);
        return {data, n};
    }
};
struct Argument {
    uint64_t value = 0;
    std::vector<char*> table;

    void read(File& in, const std::vector<Buffer>& buffers) {
        uint64_t kind = in.number();
        if (kind == 's') value = in.number();
        if (kind == 'b') value = (uint64_t)buffers[in.number()].first;
        if (kind != 'p') return;
        for (uint64_t n = in.number(); n > 0; n--) table.push_back(buffers[in.number()].first);
        value = (uint64_t)table.data();
    }
};

static std::string run(File& in, const std::vector<Buffer>& buffers) {
    auto [name, length] = in.buffer();
    std::string kernel(name, length);
    free(name);
    uint64_t n[7];
    for (uint64_t& number : n) number = in.number();
    std::vector<Argument> arguments(n[6]);
    std::vector<void*> values;
    for (Argument& argument : arguments) argument.read(in, buffers), values.push_back(&argument.value);
    emulation::Shape shape{{(unsigned)n[0], (unsigned)n[1], (unsigned)n[2]}, (unsigned)n[3], n[4], n[5]};
    std::string trouble = emulation::launch(kernel, shape, values.data());
    return trouble.empty() ? trouble : kernel + ": " + trouble;
}

int main(int, char** argv) {
    File in{fopen(argv[1], "rb")};
    FILE* out = fopen(argv[2], "wb");
    std::vector<Buffer> buffers(in.number());
    for (Buffer& buffer : buffers) buffer = in.buffer();
    std::string trouble;
    for (uint64_t launches = in.number(); launches > 0 && trouble.empty(); launches--) trouble = run(in, buffers);
    for (auto& [data, size] : buffers) fwrite(data, 1, size, out), free(data);
    fclose(in.at), fclose(out);
    return trouble.empty() ? 0 : (fprintf(stderr, "%s\n", trouble.c_str()), 4);
}
