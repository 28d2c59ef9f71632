"""Multiple-choice knapsacks: one choice from each group, the lowest sum of one cost within limits on others.

HiGHS solves them, to a gap: near-ties are countless, and proving the last digit takes too long.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

# HiGHS meets a limit to about 1e-6. A solution that exceeds one is solved again with the limits lowered by this share.
_MARGIN = 2e-6
_SECONDS = 5.0

# The lowest and the highest value of a sum, by the cost's name.
Limits = dict[str, tuple[float, float]]


class Solution(NamedTuple):
    """The label of the choice taken in each group, in order, and the sum of each cost, `fixed` included."""

    labels: np.ndarray
    sums: dict[str, float]


@dataclass(frozen=True)
class Knapsack:
    """The choices of all groups."""

    group: np.ndarray  # int [choices], from 0 to groups - 1
    label: np.ndarray  # int [choices], what the choice stands for
    costs: dict[str, np.ndarray]  # by name, float64 [choices]
    fixed: dict[str, float]  # by name, the part of each sum that does not depend on the choices
    groups: int  # their number; some may have no choices left

    def only(self, allowed: np.ndarray) -> "Knapsack":
        """With these choices alone; bool [choices]."""
        costs = {name: cost[allowed] for name, cost in self.costs.items()}
        return replace(self, group=self.group[allowed], label=self.label[allowed], costs=costs)

    def least(self, objective: str, limits: Limits, gap: float) -> Solution | None:
        """The solution of the lowest sum of one cost within limits on others, to a relative gap; None without one."""
        limits = {name: (low - self.fixed[name], high - self.fixed[name]) for name, (low, high) in limits.items()}
        smaller = self._useful(objective, limits)
        if not smaller.has_all_groups():
            return None
        for margin in (0.0, _MARGIN):
            taken = smaller._solve(objective, {n: (low, high * (1 - margin)) for n, (low, high) in limits.items()}, gap)
            if taken is None:
                return None
            if all(smaller.costs[name][taken].sum() <= high for name, (_, high) in limits.items()):
                break
        labels = smaller.label[taken][np.argsort(smaller.group[taken])]
        return Solution(labels, {n: float(smaller.costs[n][taken].sum()) + own for n, own in self.fixed.items()})

    def has_all_groups(self) -> bool:
        """Whether each group has a choice left."""
        return len(np.unique(self.group)) == self.groups

    def _useful(self, objective: str, limits: Limits) -> "Knapsack":
        """Without choices that exceed a limit alone, or cost more of the objective than some whole solution.

        This narrows the range of the costs: importance spans e^50, which no solver resolves.
        """
        useful = np.ones(len(self.group), dtype=bool)
        for name, (_, high) in limits.items():
            useful &= self.costs[name] <= high
        if len(limits) == 1:
            [(name, (_, high))] = limits.items()
            useful &= self.costs[objective] <= self._simple_solution(self.costs[objective], self.costs[name], high)
        return self.only(useful)

    def _simple_solution(self, objective: np.ndarray, cost: np.ndarray, high: float) -> float:
        """The objective of a solution that is easy to find; -inf if no solution is within the limit.

        From each group the choice of the lowest cost among those whose objective is at most x, for the least x at which
        the sum of the costs is within the limit.
        """
        cheapest: dict[int, int] = {}
        for index in np.argsort(objective, kind="stable").tolist():
            group = int(self.group[index])
            if group not in cheapest or cost[index] < cost[cheapest[group]]:
                cheapest[group] = index
                taken = list(cheapest.values())
                if len(taken) == self.groups and cost[taken].sum() <= high:
                    return float(objective[taken].sum())
        return -np.inf

    def _solve(self, objective: str, limits: Limits, gap: float) -> np.ndarray | None:
        """The choices taken, bool [choices]."""
        choices = np.arange(len(self.group))
        constraints = [LinearConstraint(csr_array((np.ones(len(choices)), (self.group, choices))), 1, 1)]
        tiny = np.finfo(float).tiny
        for name, (low, high) in limits.items():
            scale = max(high, tiny)
            constraints.append(LinearConstraint(self.costs[name][None] / scale, low / scale, high / scale))
        values = self.costs[objective]
        result = milp(
            values / max(values.max(), tiny),
            constraints=constraints,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": _SECONDS},
        )
        return None if result.x is None else result.x > 0.5
