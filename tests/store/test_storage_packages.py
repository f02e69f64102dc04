"""A storage URL whose client is not installed: the package is named, and how to get it."""

import sys

import fsspec  # noqa: F401 - its registry is looked up below
import pytest

from less_assets.errors import StorageError
from less_assets.store.files import open_root


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_storage_package_is_named_with_the_remedy(monkeypatch, scheme, package):
    # A client that another test has loaded would be taken from fsspec's memory.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as if it were not installed
    with pytest.raises(StorageError, match=f"pip install {package}"):
        open_root(f"{scheme}://bucket/prefix")
