"""The errors a caller may catch. Each message is one clear sentence: what is wrong, and what to do."""

from __future__ import annotations


class AnchorKVError(Exception):
    """Base of every error that anchorkv raises on purpose. The command line prints it and exits with code 2."""


class ConfigError(AnchorKVError):
    """An option is out of range, or options contradict each other."""


class DocumentError(AnchorKVError):
    """A document is missing, empty, binary, or cannot be read as text."""

    def __init__(self, message: str, key: str = "") -> None:
        """key: what is wrong with the file, in a word, for who says it in another language (`poc.results.Remark`)."""
        super().__init__(message)
        self.key = key


class DataError(AnchorKVError):
    """Training data is missing, damaged or in a form that cannot be used, or has changed since a run was saved."""


class ModelError(AnchorKVError):
    """A model cannot be found, opened or used (not decoder-only, truncated file, no tokenizer …)."""


class CapacityError(AnchorKVError):
    """The KV cache cannot be allocated, or has no cell left for what was asked."""


class SavedStateError(AnchorKVError):
    """A saved document is truncated, altered, of another version, or belongs to another model."""
