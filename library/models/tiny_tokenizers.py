"""The tokenizers of the embedded tiny model: single bytes for CLIP, single characters for T5, no learned
merges.

They have the formats of the real ones, so transformers reads them, and vocabularies of a few hundred entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

CLIP_FOLDER = "tokenizers/openai_clip-vit-large-patch14"
T5_FOLDER = "tokenizers/google_t5-v1_1-xxl"

_START, _END = "<|startoftext|>", "<|endoftext|>"
_T5_SPECIALS = ("<pad>", "</s>", "<unk>")
_LAST_CHARACTER = 0x24F  # the end of Latin Extended-B; other scripts become <unk>


def clip_vocabulary() -> list[str]:
    """Every byte, every byte at a word's end, start and end: 514 entries, the end-of-text token last."""
    characters = _byte_characters()
    return [*characters, *(f"{character}</w>" for character in characters), _START, _END]


def t5_vocabulary() -> list[str]:
    """Specials, the space mark and the printable characters of Latin scripts."""
    characters = [chr(code) for code in range(0x21, _LAST_CHARACTER + 1)]
    return [*_T5_SPECIALS, "▁", *(one for one in characters if one.isprintable() and not one.isspace())]


def tokenizer_files() -> Mapping[str, str]:
    """Path inside the model's folder to the text of every tokenizer file."""
    vocabulary = {token: number for number, token in enumerate(clip_vocabulary())}
    specials = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    return {
        f"{CLIP_FOLDER}/vocab.json": _json(vocabulary),
        f"{CLIP_FOLDER}/merges.txt": "#version: 0.2\n",
        f"{CLIP_FOLDER}/special_tokens_map.json": _json(specials),
        f"{CLIP_FOLDER}/tokenizer_config.json": _json(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **specials}
        ),
        f"{T5_FOLDER}/tokenizer.json": _json(_t5_tokenizer()),
        f"{T5_FOLDER}/tokenizer_config.json": _json(
            {
                "tokenizer_class": "T5Tokenizer",
                "model_max_length": 512,
                "extra_ids": 0,
                "pad_token": "<pad>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        ),
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019), 0 to 255.

    Printable bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def _t5_tokenizer() -> dict[str, object]:
    marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(_T5_SPECIALS)
    ]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, marks]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                end,
                {"Sequence": {"id": "B", "type_id": 0}},
                end,
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": marks,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [[token, 0.0 if token in _T5_SPECIALS else -6.0] for token in t5_vocabulary()],
            "byte_fallback": False,
        },
    }


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
