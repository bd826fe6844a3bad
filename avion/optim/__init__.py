"""Parameter groups, optimizers and learning-rate schedules."""

from .factory import build_optimizer, is_sharded, load_optimizer_state, param_groups
from .schedulers import constant_scheduler, cosine_scheduler

__all__ = [
    "build_optimizer",
    "constant_scheduler",
    "cosine_scheduler",
    "is_sharded",
    "load_optimizer_state",
    "param_groups",
]
