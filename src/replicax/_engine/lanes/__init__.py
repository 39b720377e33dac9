"""How a device runs its lanes, if not all at once: where the program is cut, how many run at once, and how."""

from replicax._engine.lanes.cutter import Cutter as Cutter
from replicax._engine.lanes.plan import AUTO as AUTO
from replicax._engine.lanes.plan import VECTORIZED as VECTORIZED
from replicax._engine.lanes.plan import Auto as Auto
from replicax._engine.lanes.plan import LanePlan as LanePlan
from replicax._engine.lanes.plan import Lanes as Lanes
from replicax._engine.lanes.rule import LaneRule as LaneRule
from replicax._engine.lanes.run import Bind as Bind
from replicax._engine.lanes.run import SegmentRunner as SegmentRunner
