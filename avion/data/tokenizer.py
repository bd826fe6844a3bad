"""CLIP's byte-pair encoding of sentences, through open_clip's tokenizer and its vocabulary of 49,408."""

from __future__ import annotations

from functools import lru_cache

import torch

from avion.errors import UserError

VOCAB_SIZE = 49408
_SPECIAL = 2  # start-of-text and end-of-text, the two largest ids


@lru_cache(maxsize=4)
def _encoder(context_length: int):
    from open_clip.tokenizer import SimpleTokenizer  # imported here because importing open_clip takes seconds

    return SimpleTokenizer(context_length=context_length)


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
