"""Everything that is taken from Dagster's private modules, each with its reason; checked with every release of Dagster.

Belongs here: private imports and nothing else.
"""

# Ties a check that a range run makes itself to the materialization that it judges, as Dagster's own checks are.
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

# Tags of a materialization by which Dagster tells stale from fresh; a range run has to set them itself, since Dagster
# copies one returned data version to all partitions.
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

# Lets the graph be asked for the keys of dynamic partitions outside a run.
from dagster._core.definitions.partitions.context import partition_loading_context

# What Dagster makes of Ctrl-C in a run; the command line makes it Ctrl-C again.
from dagster._core.errors import DagsterExecutionInterruptedError

# Kinds of events, to ask the log for the last version of a partition without reading the whole event.
from dagster._core.events import DagsterEventType

# Opens an instance in a folder with the configuration that stands there, except where it is silent.
from dagster._core.instance.config import dagster_instance_config
from dagster._core.instance.ref import InstanceRef

# Runs that are not finished, to find those whose process was killed.
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

# Leaves what steps print in the terminal; Dagster's own managers start four processes a run.
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager

__all__ = [
    "CODE_VERSION_TAG",
    "DATA_VERSION_IS_USER_PROVIDED_TAG",
    "DATA_VERSION_TAG",
    "NOT_FINISHED_STATUSES",
    "AssetCheckEvaluationTargetMaterializationData",
    "DagsterEventType",
    "DagsterExecutionInterruptedError",
    "InstanceRef",
    "NoOpComputeLogManager",
    "dagster_instance_config",
    "get_input_data_version_tag",
    "get_input_event_pointer_tag",
    "partition_loading_context",
]
