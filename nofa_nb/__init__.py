"""NOFA++ in notebooks: tuning-free, NeRF-based, one-shot facial avatars.

The modules are generated from the notebooks in nbs/; edit those. Importing the package is cheap: it pulls in nothing.
"""

__version__ = "0.1.0"
