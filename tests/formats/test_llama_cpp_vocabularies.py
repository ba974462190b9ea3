"""Vocabularies that llama.cpp ships, texts, and the ids that it expects for them (`models/ggml-vocab-*`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf_file import GGUFFile
from tinychat.formats.gguf_tokenizer import from_gguf

FOLDER = os.environ.get("TINYCHAT_TEST_VOCABULARIES", "")
READ = {"gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "refact", "qwen35", "gemma-4", "falcon"}
READ |= {"command-r", "deepseek-coder", "deepseek-llm", "starcoder"}


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="TINYCHAT_TEST_VOCABULARIES does not name llama.cpp's folder `models`")
def test_every_vocabulary_that_is_read_gives_the_expected_ids():
    read = set()
    for texts in sorted(Path(FOLDER).glob("ggml-vocab-*.gguf.inp")):
        file = texts.with_suffix("")
        try:
            tokenizer = from_gguf(GGUFFile(file).fields)
        except UnsupportedModelError:
            continue
        expected = [[int(i) for i in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
        found = [tokenizer.encode(t) for t in texts.read_bytes().decode().split("\n__ggml_vocab_test__\n")]
        assert found == expected[: len(found)], file.name
        assert len(found) > 40
        read.add(file.name.removeprefix("ggml-vocab-").removesuffix(".gguf"))
    assert read >= READ
