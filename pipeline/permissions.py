"""What a command line allows beyond the config: metric functions of the user's own, and weights that are pickled.

A config or a model may come from a stranger, so neither can allow anything to run; only who types the command can.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.wording import shown

if TYPE_CHECKING:
    from pipeline.metrics.metric import Metric

FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""How a metric function is named: ``package.module:function``."""


class PermissionsError(ValueError):
    """Something was allowed that is not there or cannot be what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What the command line allows; plain data, which the driver hands to every replica.

    Attributes
    ----------
    metrics : functions that may be metrics, as ``package.module:function``.
    pickled_weights : whether weights may be loaded that are not safetensors.
    folder : where the command ran; modules of metrics are looked for there too, after everything installed.
    """

    metrics: tuple[str, ...] = ()
    pickled_weights: bool = False
    folder: str = ""

    def apply(self) -> None:
        """Make exactly the allowed functions metrics of this process, importing their modules.

        Raises
        ------
        PermissionsError : a name that is none, a module that cannot be imported, no such function, or a function
            whose array in the store would have another's name.
        """
        from pipeline.metrics.metric import METRICS

        for name in [name for name, metric in METRICS.items() if metric.source and name not in self.metrics]:
            del METRICS[name]
        for name in self.metrics:
            if name not in METRICS:
                metric = self._metric(name)
                _require_free(name, metric, METRICS)
                METRICS[name] = metric

    def options(self) -> list[str]:
        """Return the words of a command line that allow the same."""
        words = [word for name in self.metrics for word in ("--allow-metric", name)]
        return [*words, "--allow-pickled-weights"] if self.pickled_weights else words

    def _metric(self, name: str) -> Metric:
        from pipeline.metrics.function import metric_of_function

        if not FUNCTION.fullmatch(name):
            raise PermissionsError(f"{shown(name)} names no function. Write it as package.module:function.")
        module, _, function = name.partition(":")
        return metric_of_function(name, function_of(self._import(name, module), name, function))

    def _import(self, name: str, module: str) -> Any:
        import importlib

        # Last, so that a file that happens to lie there is never taken for an installed module.
        sys.path += [f for f in dict.fromkeys((self.folder, os.getcwd())) if f and f not in sys.path]
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                where = self.folder or os.getcwd()
                raise PermissionsError(
                    f"metric {name}: there is no module {module}, neither installed nor in {where}."
                ) from error
            raise PermissionsError(f"metric {name}: its module needs {error.name}, which is not installed.") from error
        except (Exception, SystemExit) as error:
            # Importing runs the user's code, which may raise anything.
            raise PermissionsError(
                f"metric {name}: importing {module} raised {type(error).__name__}: {' '.join(str(error).split())}. "
                "Import it in Python to see where."
            ) from error


NOTHING = Permissions()


def array_name(name: str) -> str:
    """Return the name of a metric's array in the store: of a function, without ``:`` and ``.``."""
    return name.replace(":", "_").replace(".", "_")


def _require_free(name: str, metric: Metric, others: Mapping[str, Metric]) -> None:
    taken = {array: other for other, known in others.items() for array in _arrays(known)} | _coordinates()
    for array in _arrays(metric):
        if array in taken:
            raise PermissionsError(
                f"metric {name} would be stored as {array}, which is the name of {taken[array]}. Rename the function."
            )


def _arrays(metric: Metric) -> tuple[str, ...]:
    return metric.name, f"{metric.name}_by_step", f"{metric.name}_floor"


def _coordinates() -> dict[str, str]:
    """Return what else lies in the groups of a store: axes are fields of the intervention kinds."""
    from interventions.base import KINDS
    from pipeline.fields import FIELD_DIMS
    from pipeline.precision import LOOK, LOOK_SAMPLES, STOPPED
    from pipeline.screening import DRAWN, ESTIMATE, EXACT

    names = {"sample", "run", "sigma", "status", "pair", ESTIMATE, EXACT, DRAWN, STOPPED, LOOK, LOOK_SAMPLES}
    names |= set(FIELD_DIMS)
    names |= {field for cls in KINDS.values() for field in cls.model_fields}
    return dict.fromkeys(names, "an array of every store")


def function_of(module: Any, name: str, function: str) -> Any:
    """Return a function of a module.

    Raises
    ------
    PermissionsError : there is none of that name.
    """
    import difflib

    found = getattr(module, function, None)
    if callable(found):
        return found
    here = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    near = difflib.get_close_matches(function, here, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(here) or 'none'}."
    what = "is no function" if found is not None else "is not there"
    raise PermissionsError(f"metric {name}: {function} {what} in {module.__name__}. {hint}")
