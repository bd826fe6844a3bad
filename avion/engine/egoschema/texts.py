"""The texts of the answer options: templates are filled in, and each distinct text is encoded once."""

import functools
import logging
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from avion.data.egoschema import Question
from avion.data.tokenizer import tokenize
from avion.engine import encode
from avion.engine.distributed import World
from avion.engine.inputs import warn_of_small_vocabulary
from avion.engine.steps import Precision
from avion.errors import UserError
from avion.evaluation.vectors import unit
from avion.models.config import ModelConfig

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Is it '{option}'"  # the template of Video Mamba Suite


def parse_prompt(prompt: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs (literal text, field after it). The fields are `option`, which is required, and
    `question`. Raises UserError for other fields.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as e:
        raise UserError(f"--prompt {prompt!r}: {e}; write {{{{ and }}}} for plain braces") from e
    for _, field, spec, conversion in parts:
        if field is not None and (field not in ("option", "question") or spec or conversion):
            raise UserError(f"--prompt {prompt!r}: the only fields are {{option}} and {{question}}")
    if "option" not in [field for _, field, _, _ in parts]:
        raise UserError(f"--prompt {prompt!r}: without {{option}} all five texts are the same")
    return [(literal, field) for literal, field, _, _ in parts]


def option_texts(question: Question, prompts: Sequence[str]) -> list[list[str]]:
    """For each of the five options, the text of each template. The options are in lower case."""
    texts = []
    for option in question.options:
        values = {"option": option.lower(), "question": question.text, None: ""}
        texts.append(["".join(text + values[field] for text, field in parse_prompt(p)) for p in prompts])
    return texts


@dataclass
class OptionTexts:
    """The features of distinct texts.

    Attributes:
        features: (n, E) float64, each row of length 1.
        place: By text, the number of its row.
    """

    features: np.ndarray
    place: dict[str, int]

    def of(self, question: Question, prompts: Sequence[str]) -> np.ndarray:
        """The features of the five options, (5, E): means over the templates, brought to length 1."""
        rows = [[self.place[text] for text in texts] for texts in option_texts(question, prompts)]
        return unit(self.features[rows].mean(axis=1))


def _tokenizer(config: ModelConfig, cut: set[str]) -> Callable[[list[str]], torch.Tensor]:
    """A function of texts that gives the tokens that the model takes. It adds the texts that are too long to `cut`."""
    encode_words = functools.partial(tokenize, context_length=config.context_length, vocab_size=config.vocab_size)

    def tokens_of(texts: list[str]) -> torch.Tensor:
        tokens = encode_words(texts)
        cut.update(text for text, row in zip(texts, tokens, strict=True) if row[-1] != 0)
        return tokens

    return tokens_of


def encode_options(
    model: nn.Module, questions: Sequence[Question], prompts: Sequence[str], world: World, precision: Precision
) -> OptionTexts:
    """The features of every distinct text of these questions, on every process.

    The questions must be all questions, even where some are answered already: only the same batches give the same
    features.
    """
    config = model.config
    warn_of_small_vocabulary(config)
    distinct: dict[str, int] = {}
    for question in questions:
        for text in (text for texts in option_texts(question, prompts) for text in texts):
            distinct.setdefault(text, len(distinct))
    cut: set[str] = set()
    features = encode.encode_texts(model, list(distinct), _tokenizer(config, cut), world, precision)
    cut = set().union(*world.gather(cut))
    if cut:
        logger.warning(
            "%d of %d texts fill the model's %d tokens, what goes beyond is cut off: %.60s ...",
            len(cut),
            len(distinct),
            config.context_length,
            min(cut),
        )
    if not np.isfinite(features.values).all():
        raise UserError("the features of some texts are not finite; use --precision bf16")
    return OptionTexts(unit(features.values), distinct)
