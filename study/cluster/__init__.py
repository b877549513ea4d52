"""Ray: joining or starting it, what its nodes reach, runs as Tune trials, the live table. Sets what Ray reads when it is imported."""

import os

# Before ray is imported: no usage reports, no rebuilding of the environment in every worker under `uv run`,
# no CSV, JSON and TensorBoard files per trial (the ledger has it all).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Signals are ours: a study saves its states before it ends.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# Ray's start waits so long for its dashboard; each of the dashboard's parts would otherwise be given up after half of it.
os.environ.setdefault("RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT", "60")
# Ray puts its workers far behind other processes (15), where the dashboard's could take most of the CPUs from them.
os.environ.setdefault("RAY_worker_niceness", "5")
