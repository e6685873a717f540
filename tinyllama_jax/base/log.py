"""The section `log` of a configuration: what is recorded during training."""

from dataclasses import dataclass

from tinyllama_jax.base.errors import UserError
from tinyllama_jax.base.values import Section, check


@dataclass(frozen=True)
class Log(Section):
    """What is recorded during training."""

    every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 1_000  # steps between validations; the last step is always validated
    sample: str = ""  # a text that the model continues after each validation; empty: none
    wandb: str = ""  # Weights & Biases project; empty: off
    profile: str = ""  # FIRST:LAST: these steps are profiled, for xprof and TensorBoard; empty: none

    def __post_init__(self):
        super().__post_init__()
        first, last = self.profiled
        remedy = "must be FIRST:LAST, steps with 1 <= FIRST <= LAST, at most 100: a step's trace may take tens of MB"
        check(not self.profile or 1 <= first <= last < first + 100, "log.profile", self.profile, remedy)

    @property
    def profiled(self) -> tuple[int, int]:
        """`profile` as (first, last) step; (0, 0) if it is empty."""
        try:
            first, last = (int(step) for step in (self.profile or "0:0").split(":"))
            return first, last
        except ValueError:
            raise UserError(f"--log.profile={self.profile}: must be FIRST:LAST, such as 100:102") from None
