"""A model directory's tokenizer in llama.cpp's terms.

llama.cpp does not read the splitting rules of a tokenizer.json: it has its own implementations, selected by name. Here
the names of its src/llama-vocab.cpp are found from the rules. Rules that it does not implement are refused, because a
model that reads other tokens than it was trained on fails silently.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LAST_ALTERNATIVES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LAST_ALTERNATIVES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LAST_ALTERNATIVES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = "ByteLevel"
# llama.cpp's name by the steps of a byte-level tokenizer's pre_tokenizer and by ignore_merges: whether a word that is a
# token stays whole.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2_WORDS,), False): "gpt-2",
    (("Digits", _GPT2_WORDS), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_SPACE = "▁"  # U+2581, SentencePiece's space


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add the tokenizer, as transformers builds it from the directory, to a GGUF file's keys.

    Known differences that remain: llama.cpp does not normalise to NFC (Qwen2 does), and where a SentencePiece tokenizer
    adds its leading space only to texts that have none, llama.cpp adds it always.

    Raises:
        ValueError: no tokenizer, a kind that llama.cpp lacks (it is named), or more tokens than the embedding has rows.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{directory}: no tokenizer to export ({error}); GGUF holds one with the model") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the embedding {vocab_size} rows")
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{directory}: a tokenizer of type {model['type']} cannot be exported to GGUF; BPE can")
    add_bos, add_eos = _added_around(directory, tokenizer)
    sentencepiece = model["byte_fallback"]
    tokens, types = _tokens(tokenizer, vocab_size, sentencepiece)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _pre_tokenizer(directory, content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, model["merges"]))
    elif model["merges"]:
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    writer.add_add_space_prefix(sentencepiece and _adds_space_prefix(directory, content))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Texts and types by id; rows of the embedding without a token get a name that no text holds."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for text, number in tokenizer.get_vocab().items():
        tokens[number] = text
        is_byte = sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if sentencepiece and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, types


def _pre_tokenizer(directory: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's splitting rules."""
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"{directory}: llama.cpp has no tokenizer with the normalizer {json.dumps(normalizer)}")
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    # The mapping of bytes to characters comes last; where it also finds the words, it is a step like the others.
    last = steps[-1] if steps else None
    if last is not None and last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        described = tuple(_describe(step) for step in (steps if last["use_regex"] else steps[:-1]))
        name = _PRE_TOKENIZERS.get((described, bool(content["model"]["ignore_merges"])))
        if name is not None:
            return name
    raise ValueError(
        f"{directory}: llama.cpp has no tokenizer with this pre_tokenizer (ignore_merges "
        f"{content['model']['ignore_merges']}): {json.dumps(pre_tokenizer, ensure_ascii=False)}; known are "
        f"{', '.join(_PRE_TOKENIZERS.values())} and SentencePiece's"
    )


def _describe(step: dict[str, Any]) -> str:
    """A step's regular expression or type, or its whole content where no known tokenizer has such a step."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "")
    if step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]:
        return _GPT2_WORDS
    if step["type"] == "Digits" and step["individual_digits"]:
        return "Digits"
    return json.dumps(step)


def _adds_space_prefix(directory: Path, content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text, by a normalizer or by Metaspace."""
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    if pre_tokenizer is None and normalizer is not None:
        parts = normalizer.get("normalizers", [normalizer])
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        if parts == [replaces]:
            return False
        if parts == [{"type": "Prepend", "prepend": _SPACE}, replaces]:
            return True
    elif normalizer is None and pre_tokenizer["type"] == "Metaspace" and not pre_tokenizer["split"]:
        return pre_tokenizer["prepend_scheme"] != "never"
    raise ValueError(
        f"{directory}: llama.cpp has no SentencePiece tokenizer with the normalizer {json.dumps(normalizer)} and the "
        f"pre_tokenizer {json.dumps(pre_tokenizer)}"
    )


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores for which llama.cpp merges in the order of the merges: minus the first rank that makes a token."""
    rank = {left + right: number for number, (left, right) in reversed(list(enumerate(merges)))}
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _added_around(directory: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos after a text."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for bos, eos in product((False, True), repeat=2):
        if full == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
            return bos, eos
    raise ValueError(
        f"{directory}: the tokenizer makes {full} of {bare}; llama.cpp adds nothing but a bos before and an eos after"
    )
