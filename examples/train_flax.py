"""A few steps of AdamW on a small T2T-ViT in Flax: what ``build`` gives is a plain nnx.Module."""

import numpy as np
import optax  # comes with Flax
from flax import nnx

import isovit

SIZES = dict(image_size=32, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, num_classes=4)
STEPS = 12


def loss_of(model: nnx.Module, x: np.ndarray, y: np.ndarray):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: np.ndarray, y: np.ndarray):
    """One step; gives the loss before it."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, x, y)  # of nnx.Param: not the fixed ones
    optimizer.update(model, gradients)
    return loss


rng = np.random.default_rng(0)  # noise around one pattern for each class
patterns, labels = rng.standard_normal((4, 32, 32, 3), np.float32), rng.integers(0, 4, 32)
images = patterns[labels] + rng.standard_normal((32, 32, 32, 3), np.float32)

model = isovit.build(isovit.config("t2t_vit_7", **SIZES), "flax", device="cpu")
nnx.reseed(model, dropout=0)  # of the dropout
adamw = optax.adamw(2e-3, eps=1e-8, weight_decay=0.05)
optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
model.train()  # build gives evaluation mode
losses = []
for step in range(STEPS):
    losses.append(float(train_step(model, optimizer, images, labels)))
    print(f"step {step:2}  loss {losses[-1]:.4f}")
model.eval()
assert losses[-1] < losses[0] / 2, "the loss does not fall"
