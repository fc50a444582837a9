"""What a model is, as plain data: configs, parameters, shapes, multiply-adds, preprocessing.

Needs NumPy and msgspec, no framework.
"""
