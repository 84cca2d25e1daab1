"""Arguments, files, JSON, processes, warnings: small helpers that know nothing of unlearning."""
