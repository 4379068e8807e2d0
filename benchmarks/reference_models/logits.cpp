// What llama.cpp says of a model: logits of all positions, each layer's output and routes, a greedy continuation.
//
//   logits MODEL.gguf TOKENS.i32 OUT.bin COUNT
//
// One thread, float32 KV cache, no flash attention, one batch, no repacked weights. OUT.bin is a run of records:
// int32 length and name, int32 is_integer, int64 columns, int64 rows, then the numbers, four bytes each.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

static FILE * out;
static bool recording = false;

static void write_record(const char * name, int32_t is_integer, int64_t columns, int64_t rows, const void * data) {
    const int32_t length = strlen(name);
    fwrite(&length, 4, 1, out);
    fwrite(name, 1, length, out);
    fwrite(&is_integer, 4, 1, out);
    fwrite(&columns, 8, 1, out);
    fwrite(&rows, 8, 1, out);
    fwrite(data, 4, columns * rows, out);
}

static bool observe(ggml_tensor * t, bool ask, void *) {
    const bool routes = !strncmp(t->name, "ffn_moe_topk-", 13);
    if (!recording || !(routes || !strncmp(t->name, "l_out-", 6))) return false;
    if (ask) return true;
    std::vector<char> rows(4 * t->ne[0] * t->ne[1]);
    for (int64_t i = 0; i < t->ne[1]; i++)  // rows of a view lie apart
        ggml_backend_tensor_get(t, rows.data() + 4 * t->ne[0] * i, i * t->nb[1], 4 * t->ne[0]);
    write_record(t->name, routes, t->ne[0], t->ne[1], rows.data());
    return true;
}

static void feed(llama_context * context, const std::vector<int32_t> & tokens, int position) {
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens = tokens.size();
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) exit(4);
    llama_synchronize(context);
    llama_batch_free(batch);
}

int main(int count, char ** arguments) {
    if (count != 5) return 2;
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
    FILE * file = fopen(arguments[2], "rb");
    std::vector<int32_t> tokens, chosen;
    for (int32_t token; fread(&token, 4, 1, file) == 1;) tokens.push_back(token);
    out = fopen(arguments[3], "wb");

    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    model_params.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(arguments[1], model_params);
    if (!model) return 3;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.cb_eval = observe;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 3;

    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    recording = true;
    feed(context, tokens, 0);
    recording = false;
    write_record("logits", 0, vocabulary, tokens.size(), llama_get_logits(context));
    const float * last = llama_get_logits_ith(context, tokens.size() - 1);
    for (int i = 0; i < atoi(arguments[4]); i++) {
        int best = 0;
        for (int v = 1; v < vocabulary; v++) if (last[v] > last[best]) best = v;
        chosen.push_back(best);
        feed(context, {best}, tokens.size() + i);
        last = llama_get_logits_ith(context, 0);
    }
    write_record("greedy", 1, chosen.size(), 1, chosen.data());
    fclose(out);
    return 0;
}
