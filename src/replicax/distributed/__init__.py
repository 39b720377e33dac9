"""Maps over several processes and hosts: start them, and find the replicas of each process."""

from replicax.distributed._heartbeat import heartbeat as heartbeat
from replicax.distributed._initialize import initialize as initialize
from replicax.distributed._rows import pad_rows as pad_rows
from replicax.distributed._rows import replicas as replicas

__all__ = ["heartbeat", "initialize", "pad_rows", "replicas"]
