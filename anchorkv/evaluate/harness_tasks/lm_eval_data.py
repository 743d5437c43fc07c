"""What the task files of this folder call. lm-eval imports it before it makes a model, and so learns "anchorkv" here:
versions without plugins run these files with that model too, when --tasks names the files themselves."""

from anchorkv.evaluate import harness as _registers_the_model  # noqa: F401
from anchorkv.evaluate.harness_tasks.benchmark import dataset

__all__ = ["dataset"]
