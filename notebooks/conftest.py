"""What Binder gives is about 2 GB: a notebook that needs more fails the run."""

import resource

LIMIT_GB = 2.0


def _peak_gb():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def pytest_collection_modifyitems(items):
    """The last ones take longest: begun first, they do not run alone at the end."""
    items.reverse()


def pytest_sessionfinish(session):
    if _peak_gb() > LIMIT_GB:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    peak = _peak_gb()
    verdict = "within" if peak <= LIMIT_GB else "ABOVE"
    terminalreporter.write_line(f"largest notebook process: {peak:.2f} GB, {verdict} {LIMIT_GB} GB")
