# Everything here sets up what it needs first, asks nothing and can be run again.

# Most tests start daemons, and each would compile all of safefs where Python may not keep what it has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-modes test-nightly test-labs check bench clean

setup:
	@scripts/setup build

demo:
	@scripts/setup build
	@.venv/bin/python -m tests.tools.demo

# Where neither the kernel carries data nor C answers: what both have to leave as it is (all else in test-modes).
PLAIN = tests/mount/test_drafts.py
PYTEST = .venv/bin/python -m pytest -n 4 --dist worksteal

test:
	@scripts/setup test
	@SAFEFS_TEST_OPTIONS=passthrough=off,hot=off $(PYTEST) -q $(PLAIN)
	@$(PYTEST) --durations 15

# The whole suite once for each combination that `make test` does not run whole: half an hour.
test-modes:
	@scripts/setup test
	@SAFEFS_TEST_OPTIONS=passthrough=off $(PYTEST) -q
	@SAFEFS_TEST_OPTIONS=hot=off $(PYTEST) -q
	@SAFEFS_TEST_OPTIONS=passthrough=off,hot=off $(PYTEST) -q

# What is tried at random, a thousand times; what is searched through, further; and the locks of several nodes, ten
# thousand times and under many faults: three hours.
test-nightly:
	@scripts/setup test
	@SAFEFS_SEARCH=deep SAFEFS_MODEL_EXAMPLES=1000 $(PYTEST) -q tests/model
	@SAFEFS_CLUSTER=whole SAFEFS_CLUSTER_HOLDS=3400 SAFEFS_CLUSTER_ROUNDS=10 .venv/bin/python -m pytest -q tests/cluster

check:
	@scripts/setup build
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The locks of several nodes on real shared filesystems, each with two clients on this machine: 40 minutes.
# LABS=gluster: on that one alone.  rclone is refused, and has two probes instead.  A backing that hangs is the test's own.
LABS = rclone sshfs gluster juicefs moosefs moosefs-nolocks
ON_LABS = tests/cluster/test_labs.py tests/cluster/test_exclusion.py tests/cluster/test_faults.py
test-labs:
	@scripts/setup labs
	@for lab in $(LABS); do \
		echo "on $$lab:"; \
		case $$lab in rclone) tests=tests/labs/rclone_probe.py ;; *) tests="$(ON_LABS)" ;; esac; \
		SAFEFS_CLUSTER_LAB=$$lab SAFEFS_CLUSTER_HOLDS=1200 .venv/bin/python -m pytest -q -k "not etcd and not publish_hangs" $$tests \
			|| exit 1; \
	done

# make bench BENCH=--quick: other options of `python -m benchmarks`.
bench:
	@scripts/setup bench
	@.venv/bin/python -m benchmarks $(BENCH)

clean:
	rm -rf .venv build *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f safefs/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
