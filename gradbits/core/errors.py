"""The exceptions of gradbits: each names the argument, shows the value and says what is legal."""

from __future__ import annotations


class GradbitsError(Exception):
    """Anything that gradbits refuses; the command line prints it as one line."""


class ArgumentError(GradbitsError, ValueError):
    """An argument has a value that is not legal."""


class DtypeError(GradbitsError, TypeError):
    """An argument has a type or dtype that is not legal."""


class ScaleAxisError(ArgumentError):
    """A scale varies along the contracted axis of an integer product, so it cannot be taken out of the sum."""


class NonFiniteError(GradbitsError, ValueError):
    """A tensor holds NaN or Inf where the policy is to raise."""


class NothingToQuantizeError(GradbitsError, ValueError):
    """A call that would have left the whole model as it was."""


class FallbackError(GradbitsError, RuntimeError):
    """With ``strict=True``: something would have been left in float or computed another way than asked."""


class GraphError(GradbitsError, RuntimeError):
    """The graph of a model cannot be followed, or holds what integers cannot compute."""


class DoubleBackwardError(GradbitsError, RuntimeError):
    """A quantized layer was differentiated twice."""


class UnsupportedError(GradbitsError, NotImplementedError):
    """A quantized layer was called where it cannot work; the message says what works instead."""


class CorruptDataError(GradbitsError, ValueError):
    """A file or a message is damaged, truncated or of another kind than expected."""


class WireError(GradbitsError, RuntimeError):
    """An exchange between ranks failed; the message names the step and, where one is known, the rank."""


class MissingDataError(GradbitsError, FileNotFoundError):
    """A file or a data set is not where it was looked for; the message says where to get it."""


class MissingDependencyError(GradbitsError, ImportError):
    """An optional package is needed; the message says which and how to install it."""
