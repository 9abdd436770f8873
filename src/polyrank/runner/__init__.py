"""A recipe carried out: the run, its control beside it, and what is read from a run folder."""

__all__ = []
