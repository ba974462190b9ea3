"""What llama.cpp (llama-cpp-python) computes of given windows of ids. Run by forms.py in its environment.

usage: llama_cpp_logits.py MODEL.gguf WINDOWS.npy OUT.npy logits|nll

WINDOWS: int32 [windows, tokens]. OUT: float32 logits [windows, tokens, vocab], or the mean negative
log-probability of each window's second half, float64 [windows].
"""

import sys

import llama_cpp
import numpy as np

path, windows, out, what = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], sys.argv[4]
length = windows.shape[1]
model = llama_cpp.Llama(path, n_ctx=length, n_batch=length, logits_all=True, verbose=False)
results = []
for window in windows:
    model.reset()
    model.eval(window.tolist())
    logits = model.scores[:length]
    if what == "logits":
        results.append(logits.astype(np.float32))
        continue
    scored = logits[length // 2 - 1 : -1].astype(np.float64)
    peak = scored.max(axis=1, keepdims=True)
    total = np.log(np.exp(scored - peak).sum(axis=1)) + peak[:, 0]
    results.append((total - scored[np.arange(len(scored)), window[length // 2 :]]).mean())
np.save(out, np.array(results))
