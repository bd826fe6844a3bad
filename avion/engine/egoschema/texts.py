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
from avion.engine.precision import Precision
from avion.errors import UserError
from avion.evaluation.vectors import unit
from avion.models.config import ModelConfig

logger = logging.getLogger(__name__)

DEFAULT_PROMPT = "Is it '{option}'"  # the template of Video Mamba Suite


def parse_prompt(prompt: str) -> list[tuple[str, str | None]]:
    """Split a template at its fields. The fields are `option`, which is required, and `question`.

    Args:
        prompt: The template.

    Returns:
        Pairs of literal text and the field that follows it; the field of the last pair may be None.

    Raises:
        UserError: The template has another field, lacks `option`, or has a single brace.
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
    """Fill the templates with the options of a question.

    Args:
        question: The question.
        prompts: The templates.

    Returns:
        For each of the five options, the text of each template. The options are in lower case.
    """
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
        place: The number of the row of each text.
    """

    features: np.ndarray
    place: dict[str, int]

    def of(self, question: Question, prompts: Sequence[str]) -> np.ndarray:
        """Return the features of the five options of a question: means over the templates, brought to length 1.

        Args:
            question: The question.
            prompts: The templates.

        Returns:
            (5, E) float64.
        """
        rows = [[self.place[text] for text in texts] for texts in option_texts(question, prompts)]
        return unit(self.features[rows].mean(axis=1))


def _tokenizer(config: ModelConfig, cut: set[str]) -> Callable[[list[str]], torch.Tensor]:
    """Make a function from texts to the tokens that the model takes. It adds the texts that are too long to `cut`."""
    encode_words = functools.partial(tokenize, context_length=config.context_length, vocab_size=config.vocab_size)

    def tokens_of(texts: list[str]) -> torch.Tensor:
        tokens = encode_words(texts)
        cut.update(text for text, row in zip(texts, tokens, strict=True) if row[-1] != 0)
        return tokens

    return tokens_of


def encode_options(
    model: nn.Module, questions: Sequence[Question], prompts: Sequence[str], world: World, precision: Precision
) -> OptionTexts:
    """Encode every distinct text of the answer options.

    The questions must be all questions, even where some are answered already: only the same batches give the same
    features.

    Args:
        model: The model on the device.
        questions: All questions.
        prompts: The templates.
        world: The processes, which share the texts.
        precision: The settings of autocast.

    Returns:
        The features of the texts, on every process.

    Raises:
        UserError: Some features are not finite.
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
