"Packaging: everything is read from settings.ini."
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def lines(key):
    "The entries of a many-line setting, one a line."
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


# Asked of the Python that is installed for, outside pip's own build environment: is PyTorch there already?
COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
from nofa_nb.ops.extension import extension
sys.exit(bool(extension()))
"""


class Build(build_py):
    "Compiles the kernels into the user's cache if that can be done now, else their first use does. NOFA_BUILD=0: no."

    def run(self):
        super().run()
        if os.environ.get("NOFA_BUILD", "1") == "0":
            return
        try:
            command = [sys.executable, "-I", "-W", "ignore", "-c", COMPILE, str(here)]
            ready = subprocess.run(command, capture_output=True, timeout=900).returncode == 0
        except (OSError, subprocess.SubprocessError):
            ready = False
        print("nofa_nb: the kernels " + ("are compiled" if ready else "will be compiled at their first use"))


extras = {name: lines(f"{name}_requirements") for name in ("dev", "fast", "asset", "samples", "judge")}
extras["dev"] += extras["fast"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["assets/**", "csrc/**", "weights/**"]},
    python_requires=f">={cfg['min_python']},<3.13",
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    cmdclass={"build_py": Build},
    zip_safe=False,
)
