"""Training with Lightning: the module, its callbacks and logger, checkpoints, and the table that closes a run."""

from structlayers.lit.checkpoint import AtomicCheckpointIO, check_matches, find_checkpoint, read_checkpoint
from structlayers.lit.evaluation import evaluate
from structlayers.lit.module import LitModule, check_resumes
from structlayers.lit.options import check_monitors, check_trainer

__all__ = [
    "AtomicCheckpointIO",
    "LitModule",
    "check_matches",
    "check_monitors",
    "check_resumes",
    "check_trainer",
    "evaluate",
    "find_checkpoint",
    "read_checkpoint",
]
