"""The benchmarks' own logic: medians, ratios, verdicts, reports, selection, failures.  Nothing is timed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from click.testing import CliRunner
from rich.console import Console

from benchmarks import report, results
from benchmarks.catalogue import SYSTEMS, select_systems
from benchmarks.cli import _record, main
from benchmarks.client import Client, Job
from benchmarks.contest import contend, judge
from benchmarks.errors import BenchError, MeasureFailedError, SystemFailedError
from benchmarks.locks import ETCD, LEASEFILE, MEMORY, SERVICES, lock_measures, swap_seconds
from benchmarks.measures import CROWDS, LOCKS, WALKS, Measure, all_measures, select_measures
from benchmarks.results import Crowd, Figure, Run, Sample, Spread, Walk
from benchmarks.rounds import Fleet, Rounds, rotated
from benchmarks.scale import FULL, QUICK, Scale
from benchmarks.session import Plan, carry_out
from benchmarks.systems import Place, System
from benchmarks.targets import TARGETS, ratio_text, verdicts
from benchmarks.turns import Turn, Value
from safefs.cluster.leasefile import LeasefileBackend, Site
from safefs.lease import Terms

RATE = Figure("create", "Names", "creates files", "1/s")
DURATION = Figure("load", "Programs", "loads a model", "s")


def make_run(*samples: tuple[str, str, list[float]]) -> Run:
    """A run with (measure, system, values by round)."""
    run = Run(quick=True, started="2026-01-01 00:00 UTC", machine={"kernel": "6.18"}, scale={"rounds": 3})
    run.systems = {"native": "bare", "safefs": "safefs", "bindfs": "bindfs"}
    run.figures = {figure.name: figure for figure in (RATE, DURATION)}
    for measure, system, values in samples:
        run.samples += [Sample(measure, system, number, value, 2e-6) for number, value in enumerate(values)]
    return run


class TestFigures:
    def test_median_and_range(self) -> None:
        assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)
        assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0, 2)
        assert Spread.of([]) is None

    def test_ratios_are_taken_within_a_round(self) -> None:
        # The machine was ten times as slow in the second round: the ratio does not notice.
        run = make_run(("create", "native", [100, 10, 100]), ("create", "safefs", [50, 5, 60]))
        assert run.ratio("create", "safefs") == Spread(0.5, 0.5, 0.6, 3)

    def test_a_shorter_duration_is_faster(self) -> None:
        run = make_run(("load", "native", [1.0]), ("load", "safefs", [2.0]), ("load", "bindfs", [0.5]))
        assert run.ratio("load", "safefs") == Spread(0.5, 0.5, 0.5, 1)
        assert run.ratio("load", "safefs", "bindfs") == Spread(0.25, 0.25, 0.25, 1)

    def test_a_round_that_one_of_them_lacks_does_not_count(self) -> None:
        run = make_run(("create", "native", [10, 10]), ("create", "safefs", [5]))
        assert run.ratio("create", "safefs") == Spread(0.5, 0.5, 0.5, 1)
        assert run.ratio("create", "bindfs") is None

    def test_memory_of_a_walk(self) -> None:
        walk = Walk("safefs", 1000, 1.0, 1_000_000, 1_500_000, 1_100_000)
        assert walk.bytes_per_file == 500
        assert walk.growth_after == 1.1
        bare = Walk("native", 1000, 1.0, 0, 0, 0)
        assert (bare.bytes_per_file, bare.growth_after) == (None, None)

    def test_results_can_be_kept(self, tmp_path: Path) -> None:
        run = make_run(("create", "native", [1.5]))
        run.walks, run.crowds, run.notes = [Walk("safefs", 10, 1.0, 1, 2, 3)], [Crowd("safefs", 2, 1.0, 5)], ["a note"]
        run.save(tmp_path / "run.json")
        assert results.load(tmp_path / "run.json") == run

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "samples": 3}'])
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "run.json"
        path.write_text(text)
        with pytest.raises(BenchError, match=r"run\.json"):
            results.load(path)


class TestTargets:
    def test_each_target_names_what_is_measured(self) -> None:
        measures = {measure.name for measure in all_measures(FULL)}
        systems = {system.name for system in SYSTEMS}
        assert {name for target in TARGETS for name in target.names()} <= measures
        assert {name for target in TARGETS for name in (target.system, target.against)} <= systems

    @pytest.mark.parametrize(("value", "met"), [(90, True), (89, False)])
    def test_met_and_missed(self, value: float, met: bool) -> None:
        run = make_run(("create", "bindfs", [100]), ("create", "safefs", [value]))
        assert [verdict.met for verdict in report.judged(run)] == [met]

    def test_what_was_not_measured_is_not_met(self) -> None:
        assert {verdict.met for verdict in verdicts(make_run())} == {None}

    def test_every_number_of_clients_counts(self) -> None:
        run = make_run()
        for clients, value in ((1, 2.0), (2, 2.0), (4, 0.5)):
            name = "open" if clients == 1 else f"open/{clients}"
            run.figures[name] = replace(RATE, name=name, clients=clients)
            run.samples += [Sample(name, "bindfs", 0, 1.0, 0), Sample(name, "safefs", 0, value, 0)]
        (verdict,) = report.judged(run)
        assert (verdict.met, verdict.measured) == (False, "2.00; 2.00; 0.50")

    def test_memory(self) -> None:
        run = make_run()
        run.walks = [Walk("safefs", 1_000_000, 1.0, 10**7, 10**7 + 2 * 10**9, 10**7)]
        assert [verdict.met for verdict in report.judged(run)] == [False, True]

    def test_two_digits_of_any_ratio(self) -> None:
        assert [ratio_text(ratio) for ratio in (12.3, 1, 0.974, 0.0123)] == ["12.30", "1.00", "0.97", "0.012"]


class TestReport:
    def test_ratios_in_a_table(self) -> None:
        run = make_run(("create", "native", [1234]), ("create", "safefs", [617]))
        (grid,) = [grid for grid in report.ratio_grids(run) if grid.rows[0][0] == "create"]
        assert grid.header == ["", "native", "safefs"]
        assert grid.rows == [["create", "1,234/s", "0.50"]]
        assert "| create | 1,234/s | 0.50 |" in grid.markdown()

    def test_whole_report(self) -> None:
        run = make_run(("create", "native", [1]), ("create", "safefs", [2]))
        run.left_out, run.notes = {"juicefs": "redis-server not installed"}, ["load on safefs: out of time"]
        text = report.markdown(run, ["plots/ratios.png"])
        for part in ("![ratios](plots/ratios.png)", "juicefs: redis-server not installed", "out of time", "6.18"):
            assert part in text

    def test_results_replace_those_before(self) -> None:
        document = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
        changed = report.put_between_markers(document, "new")
        assert "old" not in changed
        assert changed.startswith("above\n")
        assert changed.endswith("below\n")
        assert report.put_between_markers(changed, "new") == changed

    @pytest.mark.parametrize("document", ["", report.BEGIN, report.END])
    def test_a_document_without_a_place_is_refused(self, document: str) -> None:
        with pytest.raises(BenchError, match="no place"):
            report.put_between_markers(document, "new")

    def test_the_document_has_a_place(self) -> None:
        document = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
        report.put_between_markers(document.read_text(encoding="utf-8"), "new")


class TestSelection:
    @pytest.mark.parametrize("scale", [FULL, QUICK])
    def test_names_are_unique(self, scale: Scale) -> None:
        names = [measure.name for measure in all_measures(scale)]
        assert len(set(names)) == len(names)

    def test_measures(self) -> None:
        measures = all_measures(FULL)
        assert select_measures(measures, []) == (measures, {WALKS, CROWDS, LOCKS})
        chosen, series = select_measures(measures, ["publish*", "growth-f*"])
        assert [measure.name for measure in chosen] == ["publish", "publish/2", "publish/4", "publish/8"]
        assert series == {WALKS}
        with pytest.raises(BenchError, match="nosuch"):
            select_measures(measures, ["read-*", "nosuch"])

    def test_systems(self) -> None:
        assert select_systems([]) == list(SYSTEMS)
        assert [system.name for system in select_systems(["bindfs", "safefs"])] == ["native", "safefs", "bindfs"]
        with pytest.raises(BenchError, match="nosuch"):
            select_systems(["nosuch"])

    def test_what_is_missing_is_named(self) -> None:
        assert System("x", "x", programs=("no-such-program",)).missing() == "no-such-program not installed"
        assert System("x", "x", safefs_option="nosuch=off").missing() == "this safefs has no option nosuch"
        assert System("x", "x", programs=("sh",), safefs_option="temp=auto").missing() is None

    def test_order_rotates(self) -> None:
        assert [rotated("abc", by) for by in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
        assert rotated("", 1) == []

    def test_a_mistake_is_one_line(self) -> None:
        done = CliRunner().invoke(main, ["--record", "--only", "create", "--only", LOCKS])
        assert done.exit_code == 1
        assert done.output.startswith("benchmarks: --record is for whole runs")
        assert done.output.count("\n") == 1


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(tmp_path_factory.mktemp("client"))


class TestRounds:
    """Two bare directories as systems, and measures that only write down that they ran."""

    def go(
        self,
        tmp_path: Path,
        client: Client,
        workload: Callable[[Turn], Value],
        rounds: int = 2,
        more: Sequence[System] = (),
    ) -> Run:
        run = make_run()
        systems = [System("native", "bare"), System("safefs", "bare as well", publishes=True), *more]
        with ExitStack() as stack:
            fleet = Fleet(Place(tmp_path, stack), QUICK, run, with_package=False)
            measures = [Measure(RATE, workload), Measure(DURATION, workload)]
            Rounds(fleet, client, systems, measures, lambda _: None, lambda: None).go(rounds, 1000)
        return run

    def test_order(self, tmp_path: Path, client: Client) -> None:
        run = self.go(tmp_path, client, lambda _: Value(1.0, 0.0))
        order = [(sample.round, sample.measure, sample.system) for sample in run.samples]
        assert order == [
            *((0, measure, system) for measure in ("create", "load") for system in ("native", "safefs")),
            *((1, measure, system) for measure in ("create", "load") for system in ("safefs", "native")),
        ]

    def test_what_is_measured_once_is_in_the_first_round(self, tmp_path: Path, client: Client) -> None:
        run = self.go(tmp_path, client, lambda _: Value(1.0, 0.0), 3, [System("rclone", "bare too", once=True)])
        rounds = {
            system: sorted({s.round for s in run.samples if s.system == system}) for system in ("safefs", "rclone")
        }
        assert rounds == {"safefs": [0, 1, 2], "rclone": [0]}

    def test_a_failed_measure_is_not_tried_again(self, tmp_path: Path, client: Client) -> None:
        def workload(turn: Turn) -> Value:
            if turn.publishes:
                raise MeasureFailedError("not supported")
            return Value(1.0, 0.0)

        run = self.go(tmp_path, client, workload)
        assert run.notes == ["create on safefs: not supported", "load on safefs: not supported"]
        assert {sample.system for sample in run.samples} == {"native"}

    def test_a_hung_system_is_left_out(self, tmp_path: Path, client: Client) -> None:
        def workload(turn: Turn) -> Value:
            if turn.publishes:
                raise SystemFailedError("no answer")
            return Value(1.0, 0.0)

        run = self.go(tmp_path, client, workload)
        assert run.left_out == {"safefs": "create: no answer"}
        assert len(run.samples) == 4

    def test_what_was_written_goes_away(self, tmp_path: Path, client: Client) -> None:
        def workload(turn: Turn) -> Value:
            (turn.scratch / "file").write_bytes(b"x")
            return Value(1.0, 0.0)

        self.go(tmp_path, client, workload)
        assert list((tmp_path / "backing").iterdir()) == []


class TestInterruption:
    """Hours of measuring are not lost."""

    @pytest.fixture(autouse=True)
    def without_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is measured here needs no fixtures, and making them takes packages that only the benchmarks have."""
        monkeypatch.setattr("benchmarks.fixtures.lay_out", lambda *_: None)
        monkeypatch.setattr("benchmarks.fixtures.make_package", lambda _: None)
        monkeypatch.setattr("benchmarks.machine.PACKAGES", ("trio",))

    def run(self, tmp_path: Path) -> Run:
        calls = iter(range(10))

        def workload(_turn: Turn) -> Value:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return Value(1.0, 0.0)

        scale = replace(QUICK, file_bytes=4096, small_files=1, tree_files=10, listed_files=1)
        plan = Plan(scale, select_systems(["native"]), [Measure(RATE, workload), Measure(DURATION, workload)], set())
        return carry_out(plan, tmp_path, Console(quiet=True))

    def test_what_was_measured_is_kept(self, tmp_path: Path) -> None:
        run = self.run(tmp_path)
        assert run.interrupted
        assert [(sample.measure, sample.round) for sample in run.samples] == [("create", 0)]
        assert list(tmp_path.iterdir()) == []

    def test_it_is_not_recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        output = tmp_path / "output"
        run = self.run(tmp_path)
        monkeypatch.setattr("benchmarks.cli._check_libraries", lambda: None)
        monkeypatch.setattr("benchmarks.cli._measure", lambda *_: run)
        monkeypatch.setattr("benchmarks.cli._write", lambda run, output: run.save(output / "results.json"))
        monkeypatch.setattr("benchmarks.cli._show", lambda *_: None)
        monkeypatch.setattr("benchmarks.cli._record", lambda _: pytest.fail("recorded"))
        done = CliRunner().invoke(main, ["--record", "--output", str(output)])
        assert (done.exit_code, results.load(output / "results.json").interrupted) == (130, True)


def make_lock_run(handover: float, flock: float) -> Run:
    """A round of locks: an empty round trip takes 10 µs, and a swap 1 ms."""
    run = Run(quick=True, started="2026-02-02 00:00 UTC", machine={}, scale={"rounds": 1})
    run.systems = {service.name: service.system.title for service in SERVICES}
    run.figures = {measure.figure.name: measure.figure for measure in lock_measures(QUICK)}
    for service in (MEMORY, LEASEFILE, ETCD):
        run.samples += [Sample("empty", service, 0, 100_000.0, 0), Sample("flock", service, 0, flock, 0)]
    for service in (LEASEFILE, ETCD):
        run.samples += [Sample("swap", service, 0, 0.001, 0)]
        run.samples += [Sample(name, service, 0, handover, 0) for name in ("handover", "handover-late")]
    return run


class TestLocks:
    def test_names_are_unique(self) -> None:
        names = [measure.figure.name for measure in lock_measures(FULL)]
        assert len(set(names)) == len(names)
        assert {"acquire", "acquire/2", "acquire/4", "acquire-nodes/2", "acquire-nodes/4"} <= set(names)

    def test_rate_and_handover(self) -> None:
        # Two processes by turns: each holds for a second, and gets the lock half a second after the other lets it go.
        one = [(0.0, 0.0, 1.0), (1.0, 3.0, 4.0)]
        two = [(0.5, 1.5, 2.5)]
        contest = judge([one, two])
        assert contest.rate() == 3 / 4
        assert contest.handover_seconds() == 0.5

    def test_who_had_not_asked_was_handed_nothing(self) -> None:
        contest = judge([[(0.0, 0.0, 1.0)], [(2.0, 2.1, 3.0)]])
        with pytest.raises(MeasureFailedError, match="not handed over"):
            contest.handover_seconds()

    def test_a_lock_that_excludes_nobody_has_no_figure(self) -> None:
        with pytest.raises(MeasureFailedError, match="at the same time"):
            judge([[(0.0, 0.0, 1.0)], [(0.0, 0.5, 1.5)]])

    def test_processes_contend(self, tmp_path: Path) -> None:
        contest = contend("flock", [str(tmp_path / "lock")] * 2, 0.2, 0.01)
        assert {hold.process for hold in contest.holds} == {0, 1}

    def test_control_processes_that_lock_different_files(self, tmp_path: Path) -> None:
        with pytest.raises(MeasureFailedError, match="at the same time"):
            contend("flock", [str(tmp_path / "one"), str(tmp_path / "two")], 0.2, 0.01)

    def test_a_process_that_fails_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(MeasureFailedError, match="No such file or directory"):
            contend("flock", [str(tmp_path / "nosuch" / "lock")], 0.1)

    def test_a_swap_leaves_nothing(self, tmp_path: Path) -> None:
        backend = LeasefileBackend(Site(str(tmp_path), Terms(), {}, lambda _: False, lambda: 0))
        assert trio.run(swap_seconds, backend, 0.0) > 0
        assert trio.run(backend.all_names) == []

    @pytest.mark.parametrize(("handover", "flock", "met"), [(0.007, 90_000.0, True), (0.0071, 89_000.0, False)])
    def test_targets(self, handover: float, flock: float, met: bool) -> None:
        run = replace(make_run(), locks=make_lock_run(handover, flock))
        assert [verdict.met for verdict in report.judged(run)] == [met] * 7

    def test_they_are_recorded_beside_other_figures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = make_run(("create", "native", [1.5]), ("create", "safefs", [1.0]))
        before.save(tmp_path / "results.json")
        document = tmp_path / "performance.md"
        document.write_text(f"{report.BEGIN}\n{report.END}\n")
        monkeypatch.setattr("benchmarks.cli.RECORD", tmp_path)
        monkeypatch.setattr("benchmarks.cli.DOCUMENT", document)
        # The pictures take packages that only the benchmarks have.
        monkeypatch.setitem(sys.modules, "benchmarks.plots", SimpleNamespace(draw=lambda *_: []))
        locks = make_lock_run(0.006, 95_000.0)
        _record(replace(make_run(), locks=locks))
        assert results.load(tmp_path / "results.json") == replace(before, locks=locks)
        assert "safefs-leasefile: handover" in document.read_text()
        assert "| create | 1.5/s | 0.67 |" in document.read_text()


class TestClient:
    def test_units_of_all_processes(self, tmp_path: Path, client: Client) -> None:
        (tmp_path / "tree" / "below").mkdir(parents=True)
        (tmp_path / "tree" / "below" / "file").touch()
        loop = client.run(Job("walk", processes=2, steps=3), [tmp_path / "tree"], lambda: 0.0, 30)
        assert loop.units == 2 * 3 * 2

    def test_contents(self, tmp_path: Path, client: Client) -> None:
        job = Job("write-sync", steps=4, size=4 * 4096, block=4096)
        assert client.run(job, [tmp_path / "file"], lambda: 0.0, 30).units == 4 * 4096
        assert (tmp_path / "file").read_bytes() == b"x" * 4 * 4096

    def test_an_error_has_its_reason(self, tmp_path: Path, client: Client) -> None:
        with pytest.raises(MeasureFailedError, match="nosuch: No such file or directory"):
            client.run(Job("read", processes=2, steps=1), [tmp_path / "nosuch"], lambda: 0.0, 30)
