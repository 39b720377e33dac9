"""The engine's own primitives, each with its rules for JAX's transformations.

Each of them has a meaning or a derivative that no combination of JAX's operations has.
"""

from replicax._engine.primitives.devices import equal_parts as equal_parts
from replicax._engine.primitives.devices import join_parts as join_parts
from replicax._engine.primitives.devices import lend_rows as lend_rows
from replicax._engine.primitives.devices import own_part as own_part
from replicax._engine.primitives.devices import share as share
from replicax._engine.primitives.devices import total as total
from replicax._engine.primitives.groups import grouped_all_to_all as grouped_all_to_all
from replicax._engine.primitives.lanes import each_lane as each_lane
from replicax._engine.primitives.lanes import own_lane as own_lane
from replicax._engine.primitives.lanes import pad_rows as pad_rows
from replicax._engine.primitives.nested_map import NESTED_MAP as NESTED_MAP
from replicax._engine.primitives.nested_map import is_nested_map as is_nested_map
from replicax._engine.primitives.nested_map import nested_map as nested_map
from replicax._engine.primitives.nested_map import nesting as nesting
from replicax._engine.primitives.places import SplitBatchError as SplitBatchError
from replicax._engine.primitives.places import move as move
from replicax._engine.primitives.places import pin as pin
from replicax._engine.primitives.places import refuse_split_batches as refuse_split_batches
from replicax._engine.primitives.places import retype as retype
from replicax._engine.primitives.places import split_over as split_over
from replicax._engine.primitives.processes import Boundary as Boundary
from replicax._engine.primitives.processes import to_all as to_all
from replicax._engine.primitives.processes import to_own as to_own
