"""Objectives on handwritten digits in PyTorch: an objective is a module that returns losses.

python examples/pretrain_torch.py mae --steps 400
"""

import digits
import torch
from rich.progress import track
from torch import nn

import isovit
from isovit.backends.torch.objectives import dino


def pretrain(name: str, steps: int) -> list[float]:
    """Train one objective; gives the loss of every step."""
    torch.manual_seed(0)  # of the dropout
    model: nn.Module = isovit.build(digits.CONFIGS[name], "torch", device="cpu")
    model.train()  # build gives evaluation mode
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, eps=1e-8, weight_decay=0.05)
    losses = []
    for batch in track(digits.batches(name, steps), description=name, total=steps):
        inputs = {key: torch.from_numpy(array) for key, array in batch.items()}
        optimizer.zero_grad()
        loss = model(**inputs).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if name == "dino":  # what no gradient moves
            dino.update_center(model, model.project_teacher(inputs["teacher_images"]), 0.9)
            dino.update_teacher(model, 0.99)
    return losses


if __name__ == "__main__":
    wanted = digits.arguments()
    for name in wanted.names:
        digits.report(name, pretrain(name, wanted.steps))
