"""The name that `qosora.data` had for these in version 0.1.0."""

from qosora.data import IGNORED, Example, Tokenized, tokenize

__all__ = ["IGNORED", "Example", "Tokenized", "tokenize"]
