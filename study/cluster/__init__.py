"""Ray: join or start it, check its nodes, run trials, show them live. Importing this sets the environment that Ray reads."""

import os

# Before ray is imported: no usage reports, no rebuilding of the environment in every worker under `uv run`,
# no CSV, JSON and TensorBoard files per trial (the ledger has it all).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# The study handles signals itself: it saves its states before it ends.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# Ray's start waits 60 s for its dashboard; without this, each part of the dashboard would be given up after 30 s.
os.environ.setdefault("RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT", "60")
# Ray's default niceness of 15 would let the dashboard's processes take most of the CPU time from the workers.
os.environ.setdefault("RAY_worker_niceness", "5")
