"""Hashes of files that no asset stands for, such as a task's examples and evaluation."""

from less_assets.errors import TargetFormatError
from less_assets.lineage.plan import digest


def files_digest(paths: list[str]) -> str:
    """Hash of the content of files and folders, whatever they are called.

    Raises:
        TargetFormatError: One does not exist.
    """
    from less_assets.method.data.row_files import file_digest, files_below

    digests = []
    for path in paths:
        files = files_below(path)
        if not files:
            raise TargetFormatError("A task's file or folder does not exist.", where=path, fix="correct the path")
        digests.append([file_digest(file) for file in files])
    return digest(digests)
