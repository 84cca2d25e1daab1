"""How fast the operators are, against what the memory allows and against PyTorch's own ways.

``benchmarks/`` asks one question each with it, ``unlearn-ext profile`` asks for a user's own model.
"""
