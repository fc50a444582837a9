"""The PyTorch backend: models as ``torch.nn.Module``."""
