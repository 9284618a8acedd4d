"""What work costs: the work of a network, the speed of this machine, and the cost of a stage.

work        what one pass through a network takes: multiply-adds, values, calls, bytes
speed       seconds that this machine needs for each of them, measured in about a second
workload    how much a recipe has to do; every stage computes its own cost from it
"""

from lowtide.costs.speed import Speed, measured
from lowtide.costs.work import FLOAT, Network, Part, Work
from lowtide.costs.workload import Cost, Workload

__all__ = ["FLOAT", "Cost", "Network", "Part", "Speed", "Work", "Workload", "measured"]
