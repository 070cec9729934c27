"Packaging: everything is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def lines(key):
    "The entries of a many-line setting, one a line."
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


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
    zip_safe=False,
)
