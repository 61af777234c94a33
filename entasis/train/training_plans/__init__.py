"""The training plans, each registered in a file of its own, see `plan`; every module here is imported."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
