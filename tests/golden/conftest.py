"""`pytest -v tests/golden` ends with each run's error that came closest to its tolerance, for docs/fidelity.md."""

from . import replay


def pytest_terminal_summary(terminalreporter, config):
    if config.option.verbose > 0 and replay.largest:
        terminalreporter.section("golden differences")
        for (run, tag), (share, error, what) in sorted(replay.largest.items()):
            terminalreporter.write_line(f"{run:<40} {tag}  {error:.1e}  ({share:.1%} of the tolerance; {what})")
