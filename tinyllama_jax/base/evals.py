"""The section `eval` of a configuration: tasks that are scored during training."""

from dataclasses import dataclass

from tinyllama_jax.base.files import check_local
from tinyllama_jax.base.values import Section, check


@dataclass(frozen=True)
class Eval(Section):
    """Tasks of lm-evaluation-harness that are scored during training, on the weights of that moment."""

    every: int = 0  # steps between scores; the last step is scored too; 0: never
    tasks: str = ""  # TASK,TASK: as `evaluate --tasks`
    data: str = ""  # a folder with local files DIR/TASK in place of the hub's
    include: str = ""  # a folder with your own tasks' YAML files
    limit: int = 0  # the first items of each task; 0: all

    def __post_init__(self):
        super().__post_init__()
        check(not self.every or bool(self.tasks), "eval.every", self.every, "needs tasks, such as --eval.tasks=piqa,hellaswag")
        for name in ("tasks", "data", "include", "limit"):
            value, off = getattr(self, name), "0" if name == "limit" else "empty"
            check(self.every > 0 or not value, f"eval.{name}", value, f"needs --eval.every=STEPS; without it, must be {off}")
            if value and name in ("data", "include"):
                check_local(f"--eval.{name}", value)
