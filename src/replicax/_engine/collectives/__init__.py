"""The collectives over a mapped axis: one file per family, and a registry with one entry per collective."""

from replicax._engine.collectives.arguments import Names as Names
from replicax._engine.collectives.gathers import all_gather as all_gather
from replicax._engine.collectives.gathers import psum_scatter as psum_scatter
from replicax._engine.collectives.index import axis_index as axis_index
from replicax._engine.collectives.permutations import pbroadcast as pbroadcast
from replicax._engine.collectives.permutations import ppermute as ppermute
from replicax._engine.collectives.reductions import pmax as pmax
from replicax._engine.collectives.reductions import pmin as pmin
from replicax._engine.collectives.reductions import psum as psum
from replicax._engine.collectives.registry import AWAITING as AWAITING
from replicax._engine.collectives.registry import REGISTRY as REGISTRY
from replicax._engine.collectives.registry import Collective as Collective
from replicax._engine.collectives.registry import Result as Result
from replicax._engine.collectives.registry import collective as collective
from replicax._engine.collectives.registry import unsupported as unsupported
from replicax._engine.collectives.replicas import any_replica as any_replica
from replicax._engine.collectives.replicas import equal_value as equal_value
from replicax._engine.collectives.replicas import is_replica as is_replica
from replicax._engine.collectives.replicas import where_replica as where_replica
from replicax._engine.collectives.transposes import all_to_all as all_to_all
from replicax._engine.collectives.transposes import ragged_all_to_all as ragged_all_to_all
