"""python workflow/check_figures.py small results: do the tiles of the figures belong to these weights and lists?"""
import sys

from nofa_nb.core.errors import NofaError
from nofa_nb.evaluation.figures import FIGURES, figure, time_taken

try:
    found = [figure(number, *sys.argv[1:3]).figure for number in FIGURES]
    drawn = [f for f in found if f is not None]
    print(f"{len(drawn)} figures belong to what is here, {len(found) - len(drawn)} are not run; {time_taken(drawn)}")
except NofaError as error:
    sys.exit(f"figures: {error}")
