"""A few steps of AdamW on a small T2T-ViT in PyTorch: what ``build`` gives is a plain module."""

import numpy as np
import torch
import torch.nn.functional as F

import isovit

SIZES = dict(image_size=32, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, num_classes=4)
STEPS = 12

rng = np.random.default_rng(0)  # noise around one pattern for each class
patterns, labels = rng.standard_normal((4, 32, 32, 3), np.float32), rng.integers(0, 4, 32)
images = patterns[labels] + rng.standard_normal((32, 32, 32, 3), np.float32)
x, y = torch.from_numpy(images), torch.from_numpy(labels)

torch.manual_seed(0)  # of the dropout
model = isovit.build(isovit.config("t2t_vit_7", **SIZES), "torch", device="cpu")
trainable = [p for p in model.parameters() if p.requires_grad]  # not the fixed ones
optimizer = torch.optim.AdamW(trainable, lr=2e-3, eps=1e-8, weight_decay=0.05)
model.train()  # build gives evaluation mode
losses = []
for step in range(STEPS):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    print(f"step {step:2}  loss {losses[-1]:.4f}")
model.eval()
assert losses[-1] < losses[0] / 2, "the loss does not fall"
