"""Parameter groups, optimizers and learning-rate schedules."""

from .factory import build_optimizer, param_groups
from .schedulers import constant_scheduler, cosine_scheduler

__all__ = ["build_optimizer", "constant_scheduler", "cosine_scheduler", "param_groups"]
