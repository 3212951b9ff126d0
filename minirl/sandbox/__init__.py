"""Where functions are called that may hang, and programs are tested that a model wrote: processes outside the trainer,
with limits, without network, and with no file but their own."""

from minirl.sandbox.pool import ChildError, Job, Pool, call_each, load, shared
from minirl.sandbox.worker import told

__all__ = ["ChildError", "Job", "Pool", "call_each", "load", "shared", "told"]
