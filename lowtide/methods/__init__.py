"""One file per paper. METHODS maps a name to the function that gives its recipe."""

from collections.abc import Callable

from lowtide.methods import minmax, tfmq
from lowtide.plan import Settings
from lowtide.stages.base import Recipe

METHODS: dict[str, Callable[[Settings], Recipe]] = {"minmax": minmax.recipe, "tfmq": tfmq.recipe}
PAPERS: dict[str, str] = {name: (module.__doc__ or "").splitlines()[0] for name, module in (("minmax", minmax), ("tfmq", tfmq))}
