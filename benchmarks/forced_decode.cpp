// llama.cpp on forced token ids 0, 1, 2, …: prompts and single tokens, timed. vs_llama_cpp.py builds and runs it.
//
//   forced_decode MODEL THREADS LOAD_MODE REPACK N_PROMPTS N_GEN REPEAT WARMUP MAX_SECONDS
//
// N_PROMPTS is a list such as 128,512; 0 for none.
// LOAD_MODE is llama.h's enum (1: mmap, -1: llama.cpp chooses), REPACK 0 or 1. With WARMUP 1 the first id is decoded
// once, then prompts and the generation are gone through untimed, so that what is timed finds all pages present.
// Generation stops after MAX_SECONDS, whatever is done by then counts.
// Prints one line of JSON; times are of CLOCK_MONOTONIC, so that the caller can subtract when it started this.
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void only_warnings(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_WARN) {
        fputs(text, stderr);
    }
}

// Decode ids first .. first + count - 1 at these positions, in one call; logits of the last.
static void feed(llama_context * context, llama_batch & batch, int first, int count) {
    batch.n_tokens = count;
    for (int i = 0; i < count; i++) {
        batch.token[i] = batch.pos[i] = first + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = i == count - 1;
    }
    if (llama_decode(context, batch) != 0) {
        fprintf(stderr, "llama_decode failed at token %d\n", first);
        exit(1);
    }
    llama_synchronize(context);
}

static void prompt(llama_context * context, llama_batch & batch, int count) {
    llama_memory_clear(llama_get_memory(context), true);
    for (int at = 0; at < count; at += 512) {
        feed(context, batch, at, std::min(512, count - at));
    }
}

// One by one, from an empty context, until the time is up; how many it were. ``first_token`` is set at the first ever.
static int generate(llama_context * context, llama_batch & batch, int count, double seconds, double * first_token) {
    llama_memory_clear(llama_get_memory(context), true);
    const double start = now();
    int done = 0;
    for (; done < count && now() - start < seconds; done++) {
        feed(context, batch, done, 1);
        *first_token = *first_token ? *first_token : now();
    }
    return done;
}

int main(int argc, char ** argv) {
    if (argc != 10) {
        fprintf(stderr, "usage: forced_decode MODEL THREADS LOAD_MODE REPACK N_PROMPTS N_GEN REPEAT WARMUP MAX_SECONDS\n");
        return 2;
    }
    const int threads = atoi(argv[2]), n_gen = atoi(argv[6]), repeat = atoi(argv[7]);
    std::vector<int> prompts;
    std::stringstream list(argv[5]);
    for (std::string count; std::getline(list, count, ',');) {
        if (atoi(count.c_str()) > 0) {
            prompts.push_back(atoi(count.c_str()));
        }
    }
    const bool warmup = atoi(argv[8]);
    const double most_seconds = atof(argv[9]);
    llama_log_set(only_warnings, nullptr);
    llama_backend_init();
    const double begin = now();

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    model_params.load_mode = (llama_load_mode) atoi(argv[3]);
    model_params.use_extra_bufts = atoi(argv[4]);
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return 1;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = std::max(512, n_gen);
    for (int count : prompts) {
        params.n_ctx = std::max((int) params.n_ctx, count);
    }
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 1;
    }
    llama_batch batch = llama_batch_init(512, 0, 1);
    const double loaded = now();

    double first_token = 0;
    if (warmup) {
        feed(context, batch, 0, 1);
        first_token = now();
        for (int count : prompts) {
            prompt(context, batch, count);
        }
        generate(context, batch, n_gen, most_seconds, &first_token);
    }
    std::string tests;
    int done = 0;
    for (int count : prompts) {
        tests += "\"pp" + std::to_string(count) + "\": [";
        for (int r = 0; r < repeat; r++) {
            const double start = now();
            prompt(context, batch, count);
            tests += (r ? ", " : "") + std::to_string(count / (now() - start));
        }
        tests += "], ";
    }
    if (n_gen) {
        tests += "\"tg" + std::to_string(n_gen) + "\": [";
        for (int r = 0; r < repeat; r++) {
            const double start = now();
            done = generate(context, batch, n_gen, most_seconds, &first_token);
            tests += (r ? ", " : "") + std::to_string(done / (now() - start));
        }
        tests += "], ";
    }
    printf("{%s\"load_s\": %.6f, \"first_token_at\": %.6f, \"tokens\": %d}\n", tests.c_str(), loaded - begin,
           first_token, done);
    llama_free(context);
    llama_model_free(model);
}
