# Everything here sets up what it needs first, asks nothing and can be run again.

.PHONY: setup demo test check bench clean

setup:
	@scripts/setup build

demo:
	@scripts/setup build
	@.venv/bin/python -m tests.tools.demo

test:
	@scripts/setup test
	@.venv/bin/python -m pytest -n 3 --dist worksteal --durations 15

check:
	@scripts/setup build
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# make bench BENCH=--quick: other options of `python -m benchmarks`.
bench:
	@scripts/setup bench
	@.venv/bin/python -m benchmarks $(BENCH)

clean:
	rm -rf .venv build *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f safefs/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
