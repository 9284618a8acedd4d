"""What work costs: multiply-adds, values and calls of a network, this machine's speed, and the cost of a stage.

work        what one pass through a network costs, from its recorded graph
speed       what this machine takes for each, measured in about a second
workload    how much a recipe has to do; every stage computes its own cost from it
"""

from lowtide.costs.speed import Speed, measured
from lowtide.costs.work import FLOAT, Network, Part, Work
from lowtide.costs.workload import Cost, Workload

__all__ = ["FLOAT", "Cost", "Network", "Part", "Speed", "Work", "Workload", "measured"]
