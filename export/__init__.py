"""Merging adapters, ONNX, ONNX Runtime, AOTInductor, TensorRT and a server's model repository."""
