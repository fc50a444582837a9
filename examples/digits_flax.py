"""Models and objectives on handwritten digits in Flax: an objective is a module of losses.

python examples/digits_flax.py mae token_learner --steps 400
"""

import digits
import jax
import optax  # comes with Flax
from flax import nnx
from rich.progress import track

import isovit
from isovit.backends.flax.objectives import dino


def loss_of(model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean of an objective's losses; of a model, its cross-entropy."""
    if "labels" in batch:
        logits = model(batch["images"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
    return model(**batch).mean()


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]
) -> jax.Array:
    """One step; gives the loss before it."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, batch)  # of nnx.Param: not the fixed ones
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def move_teacher(model: nnx.Module, views: jax.Array) -> None:
    """What no gradient moves: DINO's centre and teacher."""
    dino.update_center(model, model.project_teacher(views), 0.9)
    dino.update_teacher(model, 0.99)


def train(name: str, steps: int) -> list[float]:
    """Train by a name of ``digits.CONFIGS``; gives the loss of every step."""
    model = isovit.build(digits.CONFIGS[name], "flax", device="cpu")
    nnx.reseed(model, dropout=0)
    model.train()  # build gives evaluation mode
    adamw = optax.adamw(1e-3, eps=1e-8, weight_decay=0.05)
    optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    losses = []
    for batch in track(digits.batches(name, steps), description=name, total=steps):
        losses.append(float(train_step(model, optimizer, batch)))
        if name == "dino":
            move_teacher(model, batch["teacher_images"])
    return losses


if __name__ == "__main__":
    wanted = digits.arguments()
    for name in wanted.names:
        digits.report(name, train(name, wanted.steps))
