"""python workflow/check_figures.py small results: do the tiles of the figures belong to these weights and lists?"""
import sys

from nofa_nb.core.errors import NofaError
from nofa_nb.evaluation.figures import FIGURES, figure

try:
    found = [figure(number, *sys.argv[1:3]).figure for number in FIGURES]
    print(f"{sum(f is not None for f in found)} figures belong to what is here; {sum(f is None for f in found)} are not run")
except NofaError as error:
    sys.exit(f"figures: {error}")
