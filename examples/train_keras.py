"""A few steps of AdamW on a small T2T-ViT in Keras: what ``build`` gives is a plain keras.Model.

KERAS_BACKEND chooses the engine: tensorflow, jax or torch.
"""

import numpy as np

import isovit

SIZES = dict(image_size=32, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, num_classes=4)
STEPS = 12

rng = np.random.default_rng(0)  # noise around one pattern for each class
patterns, labels = rng.standard_normal((4, 32, 32, 3), np.float32), rng.integers(0, 4, 32)
images = patterns[labels] + rng.standard_normal((32, 32, 32, 3), np.float32)

model = isovit.build(isovit.config("t2t_vit_7", **SIZES), "keras", device="cpu")

import keras  # noqa: E402 -- after build, which sets the engine

keras.utils.set_random_seed(0)  # of the dropout
model.compile(
    optimizer=keras.optimizers.AdamW(2e-3, epsilon=1e-8, weight_decay=0.05),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
# fit runs the model in training mode; predict and evaluate do not.
history = model.fit(images, labels, batch_size=32, epochs=STEPS, shuffle=False, verbose=0)
losses = history.history["loss"]
for step, loss in enumerate(losses):
    print(f"step {step:2}  loss {loss:.4f}")
assert losses[-1] < losses[0] / 2, "the loss does not fall"
