"""One measurement of OpenVINO GenAI on a GGUF, printed as JSON. Run by peers.py, in that peer's environment.

usage: openvino_side.py MODEL.gguf N_PROMPT N_GEN THREADS
"""

import json
import sys

import openvino_genai

path, n_prompt, n_gen, threads = sys.argv[1], *map(int, sys.argv[2:5])
pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
config = openvino_genai.GenerationConfig()
config.max_new_tokens, config.ignore_eos, config.do_sample = n_gen, True, False
text = "The quick brown fox jumps over the lazy dog. " * (n_prompt // 10)
pipe.generate(["Warming up. " + text], config)  # another beginning: a cached prefix would not be read again
m = pipe.generate([text], config).perf_metrics
tokens = m.get_num_input_tokens()
print(
    json.dumps({"prefill_tok_s": tokens / m.get_ttft().mean * 1e3, "decode_tok_s": 1e3 / m.get_tpot().mean})
)
