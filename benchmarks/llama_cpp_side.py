"""One measurement of llama.cpp (llama-cpp-python), printed as JSON. Run by peers.py in its environment.

usage: llama_cpp_side.py MODEL.gguf N_PROMPT N_GEN THREADS
"""

import json
import sys
import time

import llama_cpp
import numpy as np

path, n_prompt, n_gen, threads = sys.argv[1], *map(int, sys.argv[2:5])
model = llama_cpp.Llama(
    path,
    n_ctx=n_prompt + n_gen + 8,
    n_threads=threads,
    n_threads_batch=threads,
    verbose=False,
    logits_all=False,
)
ids = np.random.default_rng(0).integers(100, min(model.n_vocab(), 30000), max(n_prompt, n_gen)).tolist()
model.eval(ids[:32])  # warm-up: pages in, threads up
model.reset()
began = time.perf_counter()
model.eval(ids[:n_prompt])
prefill = time.perf_counter() - began
model.reset()
model.eval(ids[:1])
began = time.perf_counter()
for i in range(n_gen):
    model.eval([ids[i]])
decode = time.perf_counter() - began
print(json.dumps({"prefill_tok_s": n_prompt / prefill, "decode_tok_s": n_gen / decode}))
