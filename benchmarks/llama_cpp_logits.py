"""Logits of llama.cpp for many small files, through the prebuilt library that ``pip install xllamacpp`` brings.

    PYTHON_WITH_XLLAMACPP benchmarks/llama_cpp_logits.py < requests

A request is a line of JSON, {"path": a GGUF file, "tokens": ids, "out": where to write}; the answer is a line on
stdout, "ok" (and float32 [tokens, vocab] in ``out``) or why llama.cpp refuses. An assertion in llama.cpp ends the
process, and ``Llama`` starts another. One thread, keys and values in float32, no flash attention, the context of the
file, one batch. The two structures below are those of ``llama.h`` in xllamacpp 2026.10.11549; their default values are
compared before anything runs.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

PTR, INT, UINT, FLOAT, BOOL = c.c_void_p, c.c_int32, c.c_uint32, c.c_float, c.c_bool
PATIENCE = 20.0  # seconds; some values make llama.cpp loop for ever
ERROR, F32, F16 = 4, 0, 1  # ggml_log_level, ggml_type


class ModelParams(c.Structure):
    _fields_ = [
        *((name, PTR) for name in ("devices", "buffer_types")),
        *((name, INT) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, PTR) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, BOOL) for name in ("vocab_only", "check_tensors", "extra_buffers", "no_host", "no_alloc", "load_mtp")),
    ]


class ContextParams(c.Structure):
    _fields_ = [
        *((n, UINT) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_out_seq")),
        *((n, INT) for n in ("n_threads", "n_threads_batch", "context", "scaling", "pooling", "attention", "flash")),
        *((n, FLOAT) for n in ("freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")),
        ("yarn_orig_ctx", UINT), ("defrag_thold", FLOAT), ("cb_eval", PTR), ("cb_eval_data", PTR),
        ("type_k", INT), ("type_v", INT), ("moe_cache_size", c.c_size_t), ("abort", PTR), ("abort_data", PTR),
        *((n, BOOL) for n in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", PTR), ("n_samplers", c.c_size_t), ("ctx_other", PTR),
    ]  # fmt: skip


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", INT), ("token", c.POINTER(INT)), ("embd", PTR), ("pos", c.POINTER(INT)),
        ("n_seq_id", c.POINTER(INT)), ("seq_id", c.POINTER(c.POINTER(INT))), ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


RESULTS = {
    "llama_model_default_params": ModelParams, "llama_context_default_params": ContextParams, "llama_batch_init": Batch,
    "llama_model_load_from_file": PTR, "llama_init_from_model": PTR, "llama_model_get_vocab": PTR,
    "llama_get_logits": c.POINTER(FLOAT),
}  # fmt: skip
ARGUMENTS = {
    "llama_model_load_from_file": [c.c_char_p, ModelParams], "llama_init_from_model": [PTR, ContextParams],
    "llama_model_get_vocab": [PTR], "llama_vocab_n_tokens": [PTR],
    "llama_batch_init": [INT, INT, INT], "llama_batch_free": [Batch],
    "llama_decode": [PTR, Batch], "llama_get_logits": [PTR], "llama_free": [PTR], "llama_model_free": [PTR],
}  # fmt: skip


def library() -> c.CDLL:
    """llama.cpp with its signatures; raises RuntimeError where its structures are not those above."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("xllamacpp is not installed for this Python: pip install xllamacpp==2026.10.11549")
    llama = c.PyDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    for name, result in RESULTS.items():
        getattr(llama, name).restype = result
    for name, arguments in ARGUMENTS.items():
        getattr(llama, name).argtypes = arguments
    context = llama.llama_context_default_params()
    found = (context.n_ctx, context.n_ubatch, context.flash, context.beta_slow, context.type_v, context.no_perf)
    if found != (512, 512, -1, -1.0, F16, True) or context.ctx_other is not None:
        raise RuntimeError(f"another version of llama.cpp: llama_context_params begins {found}")
    return llama


def logits(llama: c.CDLL, path: str, tokens: list[int]) -> bytes:
    """float32 [tokens, vocab]; raises RuntimeError if the file is refused."""
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError("not loaded")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_out_seq = 0, len(tokens), len(tokens), len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.flash, params.type_k, params.type_v = 0, F32, F32
    context = llama.llama_init_from_model(model, params)
    try:
        if not context:
            raise RuntimeError("no context")
        return decoded(llama, context, tokens, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
    finally:
        if context:
            llama.llama_free(context)
        llama.llama_model_free(model)


def decoded(llama: c.CDLL, context: int, tokens: list[int], vocab: int) -> bytes:
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    status = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode: {status}")
    return c.string_at(llama.llama_get_logits(context), 4 * vocab * len(tokens))


def serve() -> None:
    llama, errors = library(), []

    @c.CFUNCTYPE(None, c.c_int, c.c_char_p, PTR)
    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            Path(request["out"]).write_bytes(logits(llama, request["path"], request["tokens"]))
            answer = "ok"
        except RuntimeError as error:
            answer = f"{error}: {'; '.join(errors)}".replace("\n", " ")
        errors.clear()
        print(answer, flush=True)


class Llama:
    """llama.cpp in a process of its own, started again after an assertion ended it; used as a context manager."""

    def __init__(self, python: str):
        self.python, self.process = python, None
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    def logits(self, path: Path, tokens: list[int]) -> bytes | str:
        """float32 [tokens, vocab] as bytes, or why the file is refused."""
        out, messages = Path(self.folder.name, "logits"), Path(self.folder.name, "stderr")
        if self.process is None:
            self.process = self._start(messages)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"path": str(path), "tokens": tokens, "out": str(out)}) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
        answer = self.process.stdout.readline().strip()
        if answer:
            return out.read_bytes() if answer == "ok" else answer
        status, self.process = self.process.wait(), None
        return f"ended with {status}: " + " ".join(messages.read_text(errors="replace").split("\n")[-3:]).strip()

    def _start(self, messages: Path) -> subprocess.Popen[str]:
        with messages.open("w") as stderr:
            return subprocess.Popen(
                [self.python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip


if __name__ == "__main__":
    serve()
