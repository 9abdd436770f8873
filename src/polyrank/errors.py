"""Every exception that polyrank raises on purpose.

    PolyrankError
    ├── RecipeError            a recipe: unknown key, wrong type, impossible value
    ├── DataError              a data source: missing, unreadable, empty, no usable example
    ├── ModelError             a model: not found, not causal, no pad or eos token
    │   └── SiteError          a site: not in the model, ambiguous, or not adaptable
    ├── FactorError            factors: shapes that do not fit, entries that are not finite
    ├── RankError              ranks: zero, negative, or above what the matrix allows
    ├── RuleError              an aggregation rule: cannot take this fleet, or these weights
    ├── UpdateError            an update of a client that does not fit its assignment
    ├── FrameError             a message of a split step: malformed, out of order, not finite
    ├── PacketError            a message between server and client that cannot be read or written
    ├── SplitServerError       the split server: not started, dead, or not done with a client
    ├── AdapterError           a PEFT folder that cannot be read or written
    ├── ResourceError          memory or disk that will not suffice, seen before the start
    └── RunError               a run folder
        ├── FolderExistsError  it holds something already
        ├── FolderInUseError   another process works in it
        ├── CheckpointError    no checkpoint in it can be read whole
        ├── InexactResumeError the environment changed, so the same bytes cannot be promised
        ├── RoundFailedError   too few usable updates, in every attempt at a round
        └── InterruptedRunError it was asked to stop, and what was done is saved

A message names the place, what was expected, what came, and what to do.
"""


class PolyrankError(Exception):
    """The root of the tree: catch this to catch all that polyrank raises on purpose."""


class RecipeError(PolyrankError, ValueError):
    """A recipe holds an unknown key, a wrong type or an impossible value."""


class DataError(PolyrankError):
    """A data source is missing, unreadable, empty, or has no usable example."""


class ModelError(PolyrankError):
    """A model cannot be loaded or lacks what training needs."""


class SiteError(ModelError):
    """A site is not in the model, is ambiguous, or cannot take an adapter."""


class FactorError(PolyrankError, ValueError):
    """Factors have shapes that do not fit together or entries that are not finite."""


class RankError(PolyrankError, ValueError):
    """A rank is zero, negative, or above what its matrix allows."""


class RuleError(PolyrankError):
    """An aggregation rule cannot take this fleet or these weights."""


class UpdateError(PolyrankError):
    """A client's update does not fit what it was assigned; it is not aggregated."""


class FrameError(PolyrankError):
    """A message of a split step is malformed, out of order, or of another client, or not finite."""


class PacketError(PolyrankError):
    """A message between server and client is malformed, too large, or not what was asked for."""


class SplitServerError(PolyrankError):
    """The split server cannot be started, has died, or has not finished a client's tail."""


class AdapterError(PolyrankError):
    """A PEFT folder cannot be read or written."""


class ResourceError(PolyrankError):
    """Memory or disk will not suffice; raised before training starts where that can be foreseen."""


class RunError(PolyrankError):
    """A run folder cannot be used as asked."""


class FolderExistsError(RunError):
    """The folder of a new run exists already; polyrank never overwrites one."""


class FolderInUseError(RunError):
    """Another process holds the run folder."""


class CheckpointError(RunError):
    """No checkpoint of the run can be read whole."""


class InexactResumeError(RunError):
    """Versions, threads or engine differ from the run's, so identical bytes cannot be promised."""


class RoundFailedError(RunError):
    """Every attempt at a round ended with fewer usable updates than the quorum."""


class InterruptedRunError(RunError):
    """The run was asked to stop; what was done is saved and `resume` goes on from there."""
