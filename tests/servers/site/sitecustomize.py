"""Patches the children of a patched server: Python imports this module at the start of every process."""

import importlib
import os
import sys

CHILDREN = ("inferpool.web_process", "inferpool.engine_process")

if any(module in sys.orig_argv for module in CHILDREN) and (name := os.environ.get("TESTS_SERVER")):
    importlib.import_module(name).patch()
