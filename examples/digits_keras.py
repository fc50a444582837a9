"""Models and objectives on handwritten digits in Keras: an objective is a model of losses.

KERAS_BACKEND=jax python examples/digits_keras.py mae token_learner --steps 400
"""

from typing import Any

import digits
import numpy as np
from rich.progress import track

import isovit


def train(name: str, steps: int) -> list[float]:
    """Train by a name of ``digits.CONFIGS``; gives the loss of every step."""
    model = isovit.build(digits.CONFIGS[name], "keras", device="cpu")
    import keras  # after build, which sets the engine

    from isovit.backends.keras.objectives import dino

    keras.utils.set_random_seed(0)  # of the dropout
    first = next(digits.batches(name, 1))
    inputs = {
        key: keras.Input(array.shape[1:], dtype=array.dtype.name, name=key)
        for key, array in first.items()
        if key != "labels"
    }
    trainer = keras.Model(inputs, model(**inputs))

    def mean(_: Any, losses: Any) -> Any:
        """Of what an objective gives in the place of predictions."""
        return keras.ops.mean(losses)

    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = entropy if "labels" in first else mean
    adamw = keras.optimizers.AdamW(1e-3, epsilon=1e-8, weight_decay=0.05)
    trainer.compile(optimizer=adamw, loss=loss)
    losses, nothing = [], np.zeros(digits.BATCH, np.float32)
    for batch in track(digits.batches(name, steps), description=name, total=steps):
        trainer.reset_metrics()  # else it gives the mean of all steps
        labels = batch.pop("labels", nothing)
        losses.append(float(trainer.train_on_batch(batch, labels)))
        if name == "dino":  # what no gradient moves
            views = keras.ops.convert_to_tensor(batch["teacher_images"])
            dino.update_center(model, model.project_teacher(views), 0.9)
            dino.update_teacher(model, 0.99)
    return losses


if __name__ == "__main__":
    wanted = digits.arguments()
    for name in wanted.names:
        digits.report(name, train(name, wanted.steps))
