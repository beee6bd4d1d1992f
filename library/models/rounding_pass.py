"""Rounding by what makes the numbers: a pass over the graph of a compiled block.

A Linear layer in 8 bits rounds what it is given, row by row, and knows nothing of where that comes from. In a block it
often comes from an operator of `library.models.norms`, which has the row in registers and rounds it for next to
nothing. So a graph's

    y, ... = enter(..., rounded=False)            y, ..., low, scales = enter(..., rounded=True)
    low, scales = round_rows(y)           becomes

and the same of the gradients of branches. The numbers are the same, bit for bit.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

# Operators that round one of their results when asked to: which result that is, and which argument asks. The weights of
# columns, where they take some, are the next argument; the rounded numbers and scales are the last two results.
_MAKERS = {
    "polyrank.enter.default": (0, 3),
    "polyrank.leave_and_enter.default": (1, 5),
    "polyrank.leave_backward.default": (0, 3),
    "polyrank.leave_and_enter_backward.default": (1, 9),
}
_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")


class JoinRounding(CustomGraphPass):
    """Lets operators of a graph round what it rounds of their results, where they can."""

    def uuid(self) -> Any:
        """What tells compiled code of another pass from this one's."""
        return get_hash_for_files((__file__,))

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if str(node.target) == "polyrank.round_rows.default":
                _join(graph, node)


def _join(graph: fx.Graph, rounding: Any) -> None:
    x, by_column = rounding.args
    result = x
    while str(result.target) in _VIEWS and _width(result) == _width(result.args[0]):
        result = result.args[0]
    if result.target is not operator.getitem:
        return
    maker, place = result.args
    rounded, asking = _MAKERS.get(str(maker.target), (None, 0))
    arguments = list(maker.args)
    if place != rounded or arguments[asking]:
        return
    arguments[asking] = True
    if by_column is not None:
        if asking + 1 == len(arguments) or maker < by_column:
            return
        arguments[asking + 1] = by_column
    maker.args = tuple(arguments)
    results = (*maker.meta["val"][:-2], *rounding.meta["val"])
    maker.meta["val"] = results
    maker.meta.pop("eager_input_vals", None)  # they are the old arguments' strides
    for taken in list(rounding.users):
        taken.args = (maker, len(results) - 2 + taken.args[1])
    graph.erase_node(rounding)


def _width(node: fx.Node) -> Any:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape[-1]
