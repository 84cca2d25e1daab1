"""Whole stages of unlearning a diffusion transformer: ours against the released loop, and that loop done well."""
