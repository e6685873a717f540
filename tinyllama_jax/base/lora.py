"""The section `lora` of a configuration: low-rank adapters over frozen weights."""

from dataclasses import dataclass

from tinyllama_jax.base.values import Section, check, check_one_of

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
NF4_BLOCK = 64  # inputs that share a scale, in each output of a matrix in nf4


@dataclass(frozen=True)
class Lora(Section):
    """Low-rank adapters (arXiv:2106.09685): training changes only them; the weights that a run starts from are frozen."""

    rank: int = 0  # of the adapters; 0: off, all weights train
    alpha: float = 16.0  # an adapter's product is scaled by alpha / rank
    targets: str = "q,k,v,o,gate,up,down"  # the matrices of a layer that have adapters
    base: str = ""  # how the frozen weights are kept: "": in float32; "bfloat16"; "nf4" (QLoRA)

    def __post_init__(self):
        super().__post_init__()
        for name in self.names:
            check_one_of("lora.targets", name, TARGETS)
        check(len(set(self.names)) == len(self.names), "lora.targets", self.targets, "names a matrix twice")
        bases = "must be bfloat16, nf4, or empty for float32"
        check(self.base in ("", "bfloat16", "nf4"), "lora.base", self.base, bases)
        for key, (value, default) in {"base": (self.base, ""), "alpha": (self.alpha, 16.0)}.items():
            check(self.rank > 0 or value == default, f"lora.{key}", value, "needs adapters: add --lora.rank=16")

    def check_fits(self, sides: dict[str, tuple[int, int]]) -> None:
        """Raises UserError if the rank is more than a matrix of `sides`, target -> (inputs, outputs), can have."""
        for name in self.names if self.rank else ():
            remedy = (
                f"the matrices {name} have the sides {sides[name]}; choose at most {min(sides[name])}, or other lora.targets"
            )
            check(self.rank <= min(sides[name]), "lora.rank", self.rank, remedy)

    @property
    def names(self) -> tuple[str, ...]:
        """`targets` one by one."""
        return tuple(self.targets.split(","))

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank
