"""A file per task: what differs between them. `base.Task` is the interface that the trainer knows."""

from .base import Task
from .finetune_classification import FinetuneClassification
from .finetune_retrieval import FinetuneRetrieval
from .pretrain import Pretrain

__all__ = ["FinetuneClassification", "FinetuneRetrieval", "Pretrain", "Task"]
