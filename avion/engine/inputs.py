"""The sizes that a model takes. They are known once the model is built, and are handed to the datasets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avion.data.tokenizer import VOCAB_SIZE, tokenize
from avion.models.config import ModelConfig

from .options import VideoOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInputs:
    """The sizes of clips and texts that a built model takes.

    Attributes:
        img_size: Height and width of a frame in pixels.
        num_frames: Frames per clip.
        context_length: Tokens per text.
        vocab_size: Size of the vocabulary.
    """

    img_size: int
    num_frames: int
    context_length: int
    vocab_size: int

    @classmethod
    def of(cls, config: ModelConfig, options: VideoOptions) -> "ModelInputs":
        """Return the inputs of a model. `--clip-length`, where it was given, takes the place of the model's number of
        frames.

        Args:
            config: The configuration of the model.
            options: The flags about videos.

        Returns:
            The sizes.
        """
        num_frames = options.clip_length if options.was_given("clip_length") else config.num_frames
        return cls(config.img_size, num_frames, config.context_length, config.vocab_size)

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the tokens of texts, (number of texts, context_length) int64."""
        return tokenize(texts, context_length=self.context_length, vocab_size=self.vocab_size)


def warn_of_small_vocabulary(config: ModelConfig) -> None:
    """Log a warning where the vocabulary of the model is smaller than the vocabulary of the tokenizer."""
    if config.vocab_size < VOCAB_SIZE:
        logger.warning(
            "the model's vocabulary of %d is smaller than the tokenizer's of %d: words share entries",
            config.vocab_size,
            VOCAB_SIZE,
        )
