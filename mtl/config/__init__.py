"""Config: the schema check, run identity, and the words that start a run. Imports no torch: help is instant."""
