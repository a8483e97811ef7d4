"""Writes the pages of this folder that state what the code knows: ``python -m docs.generate``, from the repository."""
