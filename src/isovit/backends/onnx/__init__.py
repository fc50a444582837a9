"""The ONNX backend: models that onnxruntime runs in float32, made from those of torch."""
