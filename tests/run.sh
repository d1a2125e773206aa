#!/usr/bin/env bash
# Runs lint, import rules and pytest. Makes its own environment; arguments go to pytest.
# TEST_PROCESSES files are tested at once (default: 4, even on two cores: tests start up to four
# processes, most of which wait).
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
ruff check .
ruff format --check --quiet .
lint-imports
exec python -m pytest -n "${TEST_PROCESSES:-4}" --dist loadfile --no-loadscope-reorder "$@"
