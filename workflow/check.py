"""python workflow/check.py small results: do the results of Tables 1 to 5 belong to these weights and manifests?"""
import sys

from nofa_nb.core.errors import NofaError
from nofa_nb.evaluation.tables import TABLES, check_provenance, measured

try:
    every = {}
    for number in TABLES:
        every |= measured(number, *sys.argv[1:3]).found
    check_provenance(every, sys.argv[1])
    print(f"{len(every)} files of results belong together")
except NofaError as error:
    sys.exit(f"tables: {error}")
