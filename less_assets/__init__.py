"""LESS Assets: LESS data selection (ICML 2024) as a graph of Dagster assets, a command and a Python library.

Belongs here: the names that a notebook imports; they come from `api.py` on first use, so that importing is cheap. And
what must come before torch is loaded, however the process was started: every module of the package is imported later.
"""

from typing import TYPE_CHECKING, Any

from less_assets.openmp import choose_wait_policy

if TYPE_CHECKING:
    from less_assets.api import OpenProject, open_project, select

    __version__: str

__all__ = ["OpenProject", "__version__", "open_project", "select"]

choose_wait_policy()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("less-assets")
    from less_assets import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
