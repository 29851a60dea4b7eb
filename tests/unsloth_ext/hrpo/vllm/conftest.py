"""Tests that start processes of their own run once, with the model runner that vLLM chooses on a CPU."""

import os


collect_ignore = ["test_processes.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
