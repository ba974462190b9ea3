"""Write llama_cpp_tokens.json: texts, and the ids that llama.cpp's own tokenizer gives them.

    pip install llama-cpp-python gguf
    python tests/data/make_llama_cpp_tokens.py DEMO.gguf tests/data/llama_cpp_tokens.json

The demo model's vocabulary is used as it is, and once more under each of the other pre-tokenizers, so that
their rules are tested without their models. A small SentencePiece vocabulary, learned here and written to the
file, tests the "llama" kind.
"""

import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gguf
from llama_cpp import Llama

PRES = (
    "smollm", "gpt-2", "llama-bpe", "qwen2", "default", "dbrx", "refact", "gpt-4o", "tekken",
    "qwen35", "command-r", "falcon", "deepseek-llm", "deepseek-coder", "deepseek-v3", "glm4", "kimi-k2",
    "superbpe", "bailingmoe", "seed-coder", "minimax-m2", "exaone4", "exaone-moe", "hunyuan", "hunyuan-dense",
    "lfm2", "llama4", "tiny_aya", "youtu", "jais-2", "bloom", "viking", "minicpm5", "stablelm2",
    "chatglm-bpe",
)  # fmt: skip
FIXED = [
    "Hello, world!",
    "\n\n1",
    "The quick brown fox jumps over the lazy dog.",
    "I've they're WE'LL it'S you'd I'M 'tis ''s 'ſ o'clock",
    "can't CAN'T can’t",
    "a  b   c\t\td \n e\r\n\r\n f \r g",
    "0 12 345 6789 1,000,000 3.14159 1e-10 0xFF v1.2.3 ٣٤٥ ½ Ⅷ ²",
    "日本語テキスト、中文文本。한국어 텍스트",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽 é (e + ´) ñ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name>x<file_sep>",
    "text that spells <|im_end|> inside, <|im_end | > and <|im_end",
    "def f(x):\n    return x ** 2  # ok\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    '{"key": [1, 2.5, null], "k2": "v\\n"}',
    "   leading", "trailing   ", " ", "  ", "\n", "\t", "  \n  ", "\n \n  \n", "    \n\n\n    x",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero", "\x00\x01\x7f", "\u0085\u2028\u2029 x",
    "$+<=>^~| === !!! ... ?!?! --- ___ ###", "", "aaaaaaaaaaaaaaaaaaaaaaaa", "▁ ▁▁ Ġ Ċ <0x0A>",
    "https://example.com/a?b=c&d=%20#frag me@mail.org", "Ελληνικά Кириллица עברית العربية हिन्दी ไทย",
    "\U000b6b6c\U000bd6e1\U0010ffff\ufffd\ue000",
]  # fmt: skip
POOLS = [
    "abcXYZ 's't'LL 01239 \n\r\t.,!?-_()[]{}#$%^&*+=|~<>/\\\"`",
    "àéîõüßøÆŁğ ı İ ſ",
    "中文字日本語かなカナ한국어 ，。",
    "🙂😀👍🏽\u200d👩🚀🇩🇪\ufe0f",
    "  \n\n\r\n\t \u00a0\u2003\u3000\u2028\u0085",
    "0123456789٣٤५६Ⅷ½²",
    "абвГДЕ αβγ אבג عربي हिन्दी ไทย \u0301\u0308",
]
WORDS = [
    " the",
    " function",
    "hello",
    " World",
    "import",
    "     ",
    "\n\n\n",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
]


def random_texts(n, rnd):
    for _ in range(n):
        parts = []
        for _ in range(rnd.randint(1, 8)):
            kind = rnd.random()
            if kind < 0.7:
                pool = rnd.choice(POOLS)
                parts.append("".join(rnd.choice(pool) for _ in range(rnd.randint(1, 6))))
            elif kind < 0.9:
                parts.append(rnd.choice(WORDS))
            else:
                ranges = [(1, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000)]
                parts.append(
                    "".join(chr(rnd.randrange(*rnd.choice(ranges))) for _ in range(rnd.randint(1, 3)))
                )
        yield "".join(parts)


def sentencepiece_vocabulary(text, size):
    """Byte-pair merges of `text` in their order, as SentencePiece scores: the earlier, the higher."""
    words = Counter("▁" + w for w in text.replace("\n", " ").split(" "))
    words = {tuple(w): n for w, n in words.items()}
    letters = sorted({c for w in words for c in w})
    pieces = []
    while len(pieces) < size:
        pairs = Counter()
        for w, n in words.items():
            for pair in itertools.pairwise(w):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        pieces.append("".join(best))
        merged = {}
        for w, n in words.items():
            out, i = [], 0
            while i < len(w):
                if w[i : i + 2] == best:
                    out.append(w[i] + w[i + 1])
                    i += 2
                else:
                    out.append(w[i])
                    i += 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    pieces = list(dict.fromkeys([*pieces, "▁▁", "▁▁▁▁", "▁▁▁"]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters)), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))] + [0.0]
    return {"tokens": [*tokens, "<tool>"], "scores": scores, "types": types}


def ids(path, texts, modes):
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [[model.tokenize(t.encode(), add_bos=False, special=s) for t in texts] for s in modes]


def write_vocabulary(path, model, tokens, types, pre=None, merges=None, scores=None, bos=1, eos=2):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores(scores)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(0)
    writer.add_vocab_size(len(tokens))
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count,
                writer.add_feed_forward_length, writer.add_head_count):  # fmt: skip
        add(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main(source, target):
    fields = {k: f.contents() for k, f in gguf.GGUFReader(source).fields.items()}
    texts = [*FIXED, *random_texts(250, random.Random(20))]
    few = texts[: len(FIXED) + 90]
    result = {"texts": texts, "byte_level": {}}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRES:
            path = Path(folder) / f"{pre}.gguf"
            write_vocabulary(
                path,
                "gpt2",
                fields["tokenizer.ggml.tokens"],
                fields["tokenizer.ggml.token_type"],
                pre=pre,
                merges=fields["tokenizer.ggml.merges"],
            )
            modes = (False, True) if pre == "smollm" else (False,)
            result["byte_level"][pre] = ids(path, texts if pre == "smollm" else few, modes)
        vocabulary = sentencepiece_vocabulary(Path(__file__).read_text(encoding="utf-8"), 250)
        path = Path(folder) / "llama.gguf"
        write_vocabulary(path, "llama", **{k: vocabulary[k] for k in ("tokens", "types", "scores")})
        result["sentencepiece"] = {**vocabulary, "ids": ids(path, few, (False, True))}
    # the demo file itself, unchanged, must say the same as its vocabulary under its own name
    assert ids(source, texts, (False, True)) == result["byte_level"]["smollm"]
    Path(target).write_text(json.dumps(result, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
