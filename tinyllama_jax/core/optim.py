"""Learning-rate schedule, AdamW and clipping: the only optax file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinyllama_jax.base import dims
from tinyllama_jax.base.config import Config, Optim, Train
from tinyllama_jax.core import model


def schedule(optim: Optim, train: Train) -> optax.Schedule:
    """Returns the learning rate of steps 1 .. `train.steps`: linear warm-up from 0 to the peak, then `optim.schedule`.

    It follows the tokens seen after the step, counted in `train.tokens_per_step`, so `train.batch_ramp` does not bend it. The
    original evaluates its formula once per micro-batch and uses the last one of a step: within 1/8 of a step of ours.
    """
    end = train.tokens / train.tokens_per_step
    warmup, cooldown = optim.warmup_steps, end - optim.cooldown_steps
    decay_steps = max((optim.decay_steps or end) - warmup, 1)
    body = {
        "cosine": lambda: optax.cosine_decay_schedule(optim.peak_lr, decay_steps, optim.min_lr / optim.peak_lr),
        "linear": lambda: optax.linear_schedule(optim.peak_lr, optim.min_lr, decay_steps),
        "constant": lambda: optax.constant_schedule(optim.peak_lr),
    }[optim.schedule]()
    parts, ends = [optax.linear_schedule(0.0, optim.peak_lr, max(warmup, 1)), body], [warmup]
    if optim.cooldown_steps:
        with jax.ensure_compile_time_eval():
            begins = float(body(cooldown - warmup))
        last = optim.cooldown_lr if optim.cooldown == "linear" else begins
        parts, ends = [*parts, optax.linear_schedule(begins, last, optim.cooldown_steps)], [*ends, cooldown]
    joined = optax.join_schedules(parts, ends)
    return lambda step: jnp.maximum(joined(_clock(train, step)), 0.0)  # rounding ends a cool-down to 0 at -3e-12


def _clock(train: Train, step: jax.Array | int) -> jax.Array | int:
    """`step` in steps of `train.tokens_per_step`."""
    out = step
    for first, tokens, each in train.stages[1:]:
        later = tokens / train.tokens_per_step + (step - first) * (each / train.tokens_per_step)
        out = jnp.where(step > first, later, out)
    return out


def decays(params: dict, which: str) -> dict:
    """True for each parameter with weight decay: "all", or "matrices" (neither norms nor the embedding)."""
    flat = model.flatten(params)
    return model.unflatten(
        {name: which == "all" or name not in dims.BY_NAME or bool(dims.BY_NAME[name].fan_in) for name in flat}
    )  # the embedding has no fan-in; adapters are matrices


def adamw(config: Config) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, without the learning rate, which follows the step and not Adam's own count."""
    optim = config.optim
    return optax.chain(
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=lambda params: decays(params, optim.decay)),
    )


def from_moments(first: dict, second: dict, count: int, config: Config) -> optax.OptState:
    """Returns the state of `adamw` after `count` steps, from Adam's two moments (trees like the parameters)."""
    _, *empty = jax.eval_shape(adamw(config).init, first)  # states without arrays
    return (optax.ScaleByAdamState(np.int32(count), first, second), *empty)


def update(
    grads: dict, opt_state: optax.OptState, params: dict, step: jax.Array, config: Config
) -> tuple[dict, optax.OptState, dict[str, jax.Array]]:
    """Clips and takes one AdamW step: (new params, new state, {"grad_norm" before clipping, "lr"}). `step` counts from 1."""
    grad_norm = optax.tree.norm(grads)
    clip = jnp.minimum(1.0, config.optim.clip_norm / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    grads = jax.tree.map(lambda g: g * clip, grads)
    direction, opt_state = adamw(config).update(grads, opt_state, params)
    lr = schedule(config.optim, config.train)(step)
    direction = optax.tree.scale(-lr, direction)
    return optax.apply_updates(params, direction), opt_state, {"grad_norm": grad_norm, "lr": jnp.float32(lr)}
