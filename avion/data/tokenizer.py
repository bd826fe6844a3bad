"""CLIP's byte-pair encoding of sentences, through open_clip's tokenizer and its vocabulary of 49,408."""

from __future__ import annotations

from functools import lru_cache

import torch

from avion.errors import UserError


@lru_cache(maxsize=4)
def _encoder(context_length: int):
    from open_clip.tokenizer import SimpleTokenizer  # here, since importing open_clip takes seconds

    return SimpleTokenizer(context_length=context_length)


def tokenize(texts: str | list[str], context_length: int = 77) -> torch.Tensor:
    """Tokens of one or several sentences. -> (n, context_length) int64

    A row is start-of-text, the sentence, end-of-text (the largest id, 49407), zeros. What does not fit is cut off,
    the end-of-text token stays.
    """
    if context_length < 3:
        raise UserError(f"context length: {context_length} leaves no room for a word")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.long)
    return _encoder(context_length)(texts)
