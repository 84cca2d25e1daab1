"""Many methods, seeds and retrained references under one protocol, on whatever data and network are handed in."""
