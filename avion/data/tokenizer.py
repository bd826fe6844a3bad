"""CLIP's byte-pair encoding of sentences, through open_clip's tokenizer and its vocabulary of 49,408."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from avion.errors import UserError

VOCAB_SIZE = 49408
_SPECIAL = 2  # start-of-text and end-of-text, the two largest ids


@lru_cache(maxsize=4)
def _encoder(context_length: int):
    return tokenizers().SimpleTokenizer(context_length=context_length)


def tokenizers() -> ModuleType:
    """Return open_clip's file of tokenizers, where it can be without the package around it.

    The package imports timm, torchvision and their companions, for which every process would wait a second or more.
    """
    package = None if "open_clip" in sys.modules else importlib.util.find_spec("open_clip")
    if package is not None and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
        spec = importlib.util.spec_from_file_location("avion_open_clip_tokenizer", file)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (ImportError, OSError):  # a version whose file needs the package
                pass
            else:
                return module
    from open_clip import tokenizer

    return tokenizer


def tokenize(texts: str | list[str], context_length: int = 77, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Tokenize one or several sentences.

    A row is start-of-text, the sentence, end-of-text (the largest id, 49407), zeros. A sentence that is too long is cut
    off, and the end-of-text token stays. For a model with a smaller vocabulary (in tests, for example), the ids are
    folded into the vocabulary: words share entries, and start- and end-of-text remain the two largest ids.

    Returns:
        (n, context_length) int64.
    """
    if context_length < 3:
        raise UserError(f"context length: {context_length} leaves no room for a word")
    if vocab_size <= _SPECIAL:
        raise UserError(f"vocabulary size: {vocab_size} leaves no room for a word")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.long)
    tokens = _encoder(context_length)(texts)
    if vocab_size >= VOCAB_SIZE:
        return tokens
    words = tokens % (vocab_size - _SPECIAL)
    return torch.where(tokens < VOCAB_SIZE - _SPECIAL, words, tokens - (VOCAB_SIZE - vocab_size))
