"""The compiled operators, one module each: fake kernel, autograd formula, and a typed wrapper."""
