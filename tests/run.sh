#!/usr/bin/env bash
# Passes the tests: lint, import rules, pytest. Makes its own environment; arguments go to pytest.
# TEST_PROCESSES files at a time (default: 2); 0 runs one after another in a single process.
set -euo pipefail
cd "$(dirname "$0")/.."
. launchers/environment.sh
ruff check .
lint-imports
exec python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
