"""Config: errors, the schema check, run identity, and the command line. Imports no torch, so that help is instant."""
