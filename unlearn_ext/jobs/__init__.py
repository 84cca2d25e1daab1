"""A run as a user asks for it: opened, checked, planned, run and written out."""
