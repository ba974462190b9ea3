"""How `tinychat/quantize/calibration.jsonl` was made: SmolLM2-135M-Instruct writes 64 answers and 64 free
texts.

    python benchmarks/calibration_text.py FOLDER OUT.jsonl

FOLDER: the demo model's float weights in Hugging Face layout, which transformers reads (about 20 minutes on
2 cores). Sampled at temperature 1 and top-p 0.95 from a fixed seed; the same versions of torch and
transformers give the same text. Nothing here is filtered or corrected: what matters is that the model meets
its own distribution.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TOPICS = """how a refrigerator works; the causes of the French Revolution; writing unit tests in Python;
the rules of chess; photosynthesis; a recipe for lentil soup; how TCP establishes a connection;
the life of Marie Curie; installing a Linux package from source; why the sky is blue;
sorting algorithms and their complexity; the water cycle; a contract for renting a flat;
training for a first marathon; the structure of DNA; parsing command line arguments in C;
a short story about a lighthouse keeper; the history of the printing press; bond prices and interest rates;
how to prune apple trees; electrical resistance and Ohm's law; the plot of Hamlet; configuring a web server;
the difference between weather and climate; a letter of complaint about a late delivery;
the Pythagorean theorem with a proof; reading a CSV file with pandas; the anatomy of the human heart;
a poem about winter; how vaccines are made; SQL joins with examples; the ethics of animal testing;
building a bookshelf; plate tectonics; negotiating a salary; regular expressions;
ancient Egyptian agriculture; a dialogue between a teacher and a student about fractions;
the JavaScript event loop; how banks create money; the migration of birds;
a product description for a backpack; matrix multiplication; the invention of the telephone;
memory management in operating systems; a travel guide to Lisbon; the periodic table;
writing a good resume; compilers and interpreters; the causes of inflation; caring for a cactus;
a mystery set on a train; public key cryptography; the nitrogen cycle; a lesson plan about volcanoes;
how to change a bicycle tyre; the HTTP protocol and its status codes; the Roman senate;
version control with git; probability and dice; a speech at a wedding; sleep and memory;
file formats for images; the geography of Brazil"""
QUESTIONS = (
    "Explain {} in detail.",
    "Write about {}.",
    "Give me a step by step guide: {}.",
    "I need to understand {}. Start with the basics, then give an example.",
)
OPENINGS = (
    "# {}\n\n",
    "{}\n\n",
    "",
    "1. {}: ",
    "Abstract. {}",
    "{} - Wikipedia\n\n",
    "Q: What should I know about {}?\nA:",
    '"""{}"""\n\nimport ',
)
BEGIN, END, PAD = "<|endoftext|>", "<|im_end|>", 2


@torch.inference_mode()
def sample(model, tokenizer, prompts: list[str], n: int = 512) -> list[str]:
    """What the model writes after each prompt, up to n tokens."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=n,
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        pad_token_id=PAD,
        eos_token_id=[0, 2],
    )
    texts = [tokenizer.decode(r[batch.input_ids.shape[1] :].tolist()) for r in out]
    return [t.split(END)[0].split(BEGIN)[0] for t in texts]


def main(folder: str, out: str) -> None:
    torch.manual_seed(20)
    rng = random.Random(7)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", PAD
    topics = [t.strip() for t in TOPICS.replace("\n", " ").split(";")]
    questions = [rng.choice(QUESTIONS).format(t) for t in topics]
    openings = [rng.choice(OPENINGS).format(t[0].upper() + t[1:]) for t in topics]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    documents: list[dict] = []
    for question, answer in zip(questions, sample(model, tokenizer, prompts), strict=True):
        user = {"role": "user", "content": question}
        documents.append({"messages": [user, {"role": "assistant", "content": answer.strip()}]})
    for opening, rest in zip(openings, sample(model, tokenizer, [BEGIN + o for o in openings]), strict=True):
        documents.append({"text": opening + rest})
    Path(out).write_text(
        "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
