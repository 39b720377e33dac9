"""replicax under JAX's own names, for programs written for ``jax.pmap``."""

from replicax.compat._functions import device_put_replicated as device_put_replicated
from replicax.compat._functions import device_put_sharded as device_put_sharded
from replicax.compat._functions import pmap as pmap
from replicax.compat._install import install as install
from replicax.compat._install import installed as installed
from replicax.compat._install import uninstall as uninstall

__all__ = ["device_put_replicated", "device_put_sharded", "install", "installed", "pmap", "uninstall"]
