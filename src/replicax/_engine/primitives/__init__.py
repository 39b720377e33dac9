"""Primitives of the engine's own, with their rules."""

from replicax._engine.primitives.mapped import NESTED_MAP as NESTED_MAP
from replicax._engine.primitives.mapped import AxisName as AxisName
from replicax._engine.primitives.mapped import SplitBatchError as SplitBatchError
from replicax._engine.primitives.mapped import each_lane as each_lane
from replicax._engine.primitives.mapped import equal_parts as equal_parts
from replicax._engine.primitives.mapped import grouped_all_to_all as grouped_all_to_all
from replicax._engine.primitives.mapped import is_nested_map as is_nested_map
from replicax._engine.primitives.mapped import join_parts as join_parts
from replicax._engine.primitives.mapped import move as move
from replicax._engine.primitives.mapped import nested_map as nested_map
from replicax._engine.primitives.mapped import nesting as nesting
from replicax._engine.primitives.mapped import own_lane as own_lane
from replicax._engine.primitives.mapped import own_part as own_part
from replicax._engine.primitives.mapped import pad_rows as pad_rows
from replicax._engine.primitives.mapped import pin as pin
from replicax._engine.primitives.mapped import refuse_split_batches as refuse_split_batches
from replicax._engine.primitives.mapped import retype as retype
from replicax._engine.primitives.mapped import share as share
from replicax._engine.primitives.mapped import split_over as split_over
from replicax._engine.primitives.mapped import total as total
