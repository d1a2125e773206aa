#!/usr/bin/env bash
# Passes the tests: lint, import rules, pytest. Makes its own environment; arguments go to pytest.
# TEST_PROCESSES files are tested at a time (default: 3, also on two cores: tests start up to four
# processes, most of which wait).
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
ruff check .
ruff format --check --quiet .
lint-imports
exec python -m pytest -n "${TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder "$@"
