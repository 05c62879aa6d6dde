"""Patches the processes of a server: Python imports this module at the start of each of them."""

import importlib
import math
import os
import sys

CHILDREN = ("inferpool.web_process", "inferpool.engine_process")

if any(module in sys.orig_argv for module in CHILDREN) and (name := os.environ.get("TESTS_SERVER")):
    importlib.import_module(name).patch()

if "inferpool.engine.supervisor" in sys.orig_argv and os.environ.get("TESTS_SPARE_ENGINE") == "none":
    # As on a machine with too little memory for one.
    vars(importlib.import_module("inferpool.engine.spare_engine"))["LEAST_SPARE_BYTES"] = math.inf
