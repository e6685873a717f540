"""TinyLlama v1.1 Chinese: half SkyPile from 1.5T tokens on.

python -m tinyllama_jax.train --config configs/v1_1_chinese.py
python -m tinyllama_jax.train --config configs/v1_1_chinese.py --init.from=runs/v1_1 --init.step=830_000 --init.state=all

Half SlimPajama, half SkyPile, reached linearly over 6B tokens. The second command forks a run of
v1_1.py before that point, as the authors did, and gives the same batches and learning rates as the first.

Loss: not yet run at this size here.
Cost: as v1_1.py; the fork alone is its last quarter.
"""

import dataclasses
from pathlib import Path

from tinyllama_jax.base.cli import read
from tinyllama_jax.base.config import Data

config = dataclasses.replace(
    read(str(Path(__file__).with_name("v1_1.py"))),
    workdir="runs/v1_1_chinese",
    data=Data(
        sources={
            "data/slimpajama": ((1.5e12, 1), (1.506e12, 0.5)),  # (tokens, weight): linear in between, constant outside
            "data/skypile": ((1.5e12, 0), (1.506e12, 0.5)),
        }
    ),
)
