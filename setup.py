"""The C extension, found through pkg-config; everything else stands in pyproject.toml."""

import shlex
import subprocess
import sys

from setuptools import Extension, setup


def pkg_config(flag: str) -> list[str]:
    """What the installed libfuse3 wants on the compiler's command line."""
    try:
        done = subprocess.run(["pkg-config", flag, "fuse3"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("safefs needs pkg-config to find libfuse3: apt-get install pkg-config libfuse3-dev")
    except subprocess.CalledProcessError:
        sys.exit("safefs needs the headers of libfuse3: apt-get install libfuse3-dev")
    return shlex.split(done.stdout)


SOURCES = ("native", "opens", "walks", "loans", "closer", "hot_table", "hot_answers", "hot_readers", "hot_module")

FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread")

setup(
    ext_modules=[
        Extension(
            "safefs._native",
            sources=[f"safefs/fuse/{name}.c" for name in SOURCES],
            depends=["safefs/fuse/hot.h"],
            extra_compile_args=[*FLAGS, *pkg_config("--cflags")],
            extra_link_args=pkg_config("--libs"),
            libraries=["dl"],
        )
    ]
)
