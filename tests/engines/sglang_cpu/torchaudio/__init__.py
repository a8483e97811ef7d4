"""Stands in for torchaudio, which SGLang imports for speech models only."""

__version__ = "2.11.0"
