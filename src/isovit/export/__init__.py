"""Models as files that run without isovit: ONNX and each framework's own deployable form."""
