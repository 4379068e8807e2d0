// Logits of llama.cpp's CPU backend for one batch, with given types of the KV cache:
//     llama_logits MODEL.gguf OUT.f32 TYPE_K TYPE_V FLASH_ATTENTION(0|1) TOKEN...
// OUT holds float32 [tokens, vocabulary]. README.md says how it is built and used.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ggml.h"
#include "llama.h"

static ggml_type type_named(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && !strcmp(known, name)) { return (ggml_type) i; }
    }
    exit(3);
}

int main(int argc, char ** argv) {
    std::vector<llama_token> tokens;
    for (int i = 6; i < argc; i++) { tokens.push_back(atoi(argv[i])); }

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) { return 1; }

    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = type_named(argv[3]);
    params.type_v = type_named(argv[4]);
    params.flash_attn_type = atoi(argv[5]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) { return 2; }

    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = tokens.size();
    if (llama_decode(context, batch)) { return 4; }

    FILE * out = fopen(argv[2], "wb");
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (size_t i = 0; i < tokens.size(); i++) { fwrite(llama_get_logits_ith(context, i), sizeof(float), n_vocab, out); }
    fclose(out);
}
