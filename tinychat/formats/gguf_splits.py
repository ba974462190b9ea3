"""Pre-tokenizers of llama.cpp: how each cuts a text into words before its merges, by the names that GGUF has.

The patterns are those of the models' own tokenizer.json, in the order in which they are applied: each splits
what the one before left whole; what lies between two matches is a piece of its own.
"""

from __future__ import annotations

_SHORT = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}", r" ?[^\s\p{L}\p{M}")
# words that begin with capitals, then small letters; llama.cpp's own spelling of OpenAI's o200k pattern
_CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+END"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*END"
    rf"|\p{{N}}DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(without: str = "", digits: str = "{1,3}", behind: str = r"[\r\n/]*") -> str:
    """The o200k pattern as tokenizer.json has it. without: what no letter of a word may be."""
    upper, lower, end = f"[{_UPPER}{without}]", f"[{_LOWER}{without}]", f"(?:{_SHORT})?"
    first = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{first}{upper}*{lower}+{end}|{first}{upper}+{lower}*{end}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+{behind}|{_SPACES}"


_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    r"ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮ"
    r"ⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_IDEOGRAPHS = "[一-龥぀-ゟ゠-ヿ]+"
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "dbrx": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "gpt-4o": (_CASED.replace("END", f"(?:{_SHORT})?").replace("DIGITS", "{1,3}"),),
    "tekken": (_CASED.replace("END", "").replace("DIGITS", ""),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        _DEEPSEEK_LETTERS,
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _IDEOGRAPHS, _DEEPSEEK3),
    "youtu": (
        rf"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_IDEOGRAPHS}",
        _cased(digits=""),
    ),
    "jais-2": (
        _LLAMA3.replace(
            r"\s+(?!\S)|\s+",
            "|".join([*(rf"\s{{{1 << i}}}(?!\S)" for i in range(9, 1, -1)), r"\s{1,2}(?!\S)|\s{1}"]),
        ),
    ),
    "bloom": (_WORDS,),
    "viking": (_WORDS, r"\p{N}"),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", _cased()),
    "kimi-k2": (r"\p{Han}+|" + _cased(r"&&[^\p{Han}]", behind=r"[\r\n]*"),),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "bailingmoe": (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "seed-coder": (_QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),),
    "exaone-moe": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "minicpm5": (r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")),
}
ALIASES = {
    name: known
    for known, names in {
        "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "qwen2": ("deepseek-r1-qwen", "kormo", "megrez", "hunyuan", "solar-open", "stablelm2", "grok-2"),
        "smollm": ("refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
        "dbrx": ("smaug-bpe", "chatglm-bpe"),
        "glm4": ("glm5",),
        "gpt-4o": ("llama4", "kanana2", "minimax-m2"),
        "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
        "bloom": ("poro-chat", "gpt3-finnish"),
        "tiny_aya": ("cohere2moe",),
        "bailingmoe": ("bailingmoe2", "llada-moe"),
    }.items()
    for name in names
}
COMPOSED = ("qwen2",)  # letters and their accents are composed first; llama.cpp leaves that out
WHOLE = ("llama-bpe", "tekken", "glm4", "youtu", "minicpm5")  # a word that is a token is not merged
BEGIN = ("llama-bpe", "tekken")  # texts begin with the BOS token where the file does not say otherwise
