"""The troubles a user can have, one exception type each: what is wrong, where, and what to do.

Belongs here: exception types only. Raise them from any layer; the command line prints them without a traceback.
"""


class LessAssetsError(Exception):
    """A problem that the user can solve; the message says what is wrong, where, and what to do.

    Args:
        what: One sentence that names the problem.
        where: File, line, key, id or artifact concerned; None if `what` says it already.
        fix: What the user can do about it; None if there is nothing to add.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  to do: {fix}")
        # Damaged files are quoted, and may hold what no terminal can show: half a surrogate pair.
        super().__init__("\n".join(lines).encode("utf-8", "backslashreplace").decode())

    def __reduce__(self) -> tuple:
        """Rebuild from the message parts, so that the error survives a process boundary."""
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[LessAssetsError], what: str, where: str | None, fix: str | None) -> LessAssetsError:
    return kind(what, where=where, fix=fix)


class ProjectFileError(LessAssetsError):
    """The project file cannot be used as it is.

    Attributes:
        problems: Each problem as an error of its own, where the message lists several; else empty.
    """

    problems: tuple[LessAssetsError, ...] = ()


class PoolFormatError(LessAssetsError):
    """A pool source as a whole cannot be read (single bad rows are quarantined instead)."""


class TargetFormatError(LessAssetsError):
    """A task's target or evaluation examples cannot be read or used."""


class ChatFormatError(LessAssetsError):
    """No conversation can be encoded with this tokenizer as the chat format asks."""


class ModelLoadError(LessAssetsError):
    """The base model, tokenizer or adapter cannot be loaded."""


class UnsupportedModelError(LessAssetsError):
    """The model or adapter has a part whose per-example gradients would not be exact."""


class TrainingError(LessAssetsError):
    """A training cannot start or go on: nothing to learn, no finite loss, no memory."""


class CheckpointImportError(LessAssetsError):
    """A foreign checkpoint cannot be imported without guessing."""


class MissingArtifactError(LessAssetsError):
    """An artifact that is needed has not been materialized, or its data is gone."""


class StaleArtifactError(LessAssetsError):
    """An artifact was made from other settings or inputs than the ones in force."""


class CorruptArtifactError(LessAssetsError):
    """Stored bytes are damaged: a checksum, a length or a format does not hold."""


class EvaluationError(LessAssetsError):
    """An evaluation cannot be run as configured."""


class ComputeError(LessAssetsError):
    """The machines that work is handed to cannot be reached, have no room, or keep failing."""


class StorageError(LessAssetsError):
    """The disk or object store fails: full, not permitted, or not answering."""
