"""Models and objectives on handwritten digits in PyTorch: an objective is a module of losses.

python examples/digits_torch.py mae token_learner --steps 400
"""

import digits
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import isovit
from isovit.backends.torch.objectives import dino


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of an objective's losses; of a model, its cross-entropy."""
    if "labels" in inputs:
        return F.cross_entropy(model(inputs["images"]), inputs["labels"].long())
    return model(**inputs).mean()


def train(name: str, steps: int) -> list[float]:
    """Train by a name of ``digits.CONFIGS``; gives the loss of every step."""
    torch.manual_seed(0)  # of the dropout
    model: nn.Module = isovit.build(digits.CONFIGS[name], "torch", device="cpu")
    model.train()  # build gives evaluation mode
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, eps=1e-8, weight_decay=0.05)
    losses = []
    for batch in track(digits.batches(name, steps), description=name, total=steps):
        inputs = {key: torch.from_numpy(array) for key, array in batch.items()}
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
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
        digits.report(name, train(name, wanted.steps))
