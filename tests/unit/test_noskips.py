"""A skip anywhere fails the run."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

SKIPS = {
    "body": "import pytest\ndef test(): pytest.skip('no luck')\n",
    "mark": "import pytest\n@pytest.mark.skip('no luck')\ndef test(): pass\n",
    "module": "import pytest\npytest.skip('no luck', allow_module_level=True)\n",
    "import": "import pytest\npytest.importorskip('no_such_module', 'no luck')\n",
}


@pytest.mark.parametrize("kind", SKIPS)
def test_a_skip_fails(pytester: pytest.Pytester, kind: str) -> None:
    pytester.makepyfile(SKIPS[kind])
    result = pytester.runpytest_inprocess("-p", "tests.support.noskips", "-p", "no:cacheprovider")
    assert result.ret != 0
    assert result.parseoutcomes().get("skipped", 0) == 0
    result.stdout.fnmatch_lines("*counts as a failure here*")


def test_an_expected_failure_is_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.xfail\ndef test(): assert False\n")
    assert pytester.runpytest_inprocess("-p", "tests.support.noskips").parseoutcomes() == {"xfailed": 1}
